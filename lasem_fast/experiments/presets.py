"""Named settings of the paper's experiments and of the authors' release.

Of optimiser, learning rate, epochs and mini-batches paper and release say the same, so there is one
preset per data set. Where they differ, in the search itself, there are two: ``paper`` and
``release``.

Source: the release (github.com/Lifelong-ML/LASEM, commit c4ec052), LASEM's section 5.
"""

from __future__ import annotations

from typing import Any

LASEM = {
    "paper": {"likelihood": "joint", "prior": "count", "redraw_unclaimed": False},
    "release": {"likelihood": "mean", "prior": "mean_posterior", "redraw_unclaimed": True},
}

# lr_decay: the rate falls as lr / (1 + e lr_decay), e epochs into the whole run
_COMMON = {"optimizer": "tf-rmsprop", "drop_last": True}
TRAINING: dict[str, dict[str, Any]] = {
    "mnist": {"lr": 1e-3, "lr_decay": 1 / 250, "epochs_in_all": 500, "batch_size": 10},
    "cifar-10": {"lr": 2.5e-4, "lr_decay": 1 / 1000, "epochs_in_all": 2000, "batch_size": 20},
    "cifar-100": {"lr": 1e-4, "lr_decay": 1 / 4000, "epochs": 2000, "batch_size": 10},
    "office-home": {"lr": 2e-5, "lr_decay": 1e-4, "epochs": 1000, "batch_size": 16},
    "stl-10": {"lr": 1e-4, "lr_decay": 0.0, "epochs": 500, "batch_size": 10},
}
STAND_INS = {"fashion-mnist": "cifar-100", "digits": "cifar-100"}


def training(name: str, n_tasks: int) -> dict[str, Any]:
    """What the preset ``name`` says for a sequence of ``n_tasks`` tasks.

    MNIST and CIFAR-10 share a number of epochs among their tasks.
    """
    settings = {**_COMMON, **TRAINING[name]}
    if "epochs_in_all" in settings:
        settings["epochs"] = settings.pop("epochs_in_all") // n_tasks
    return settings


def static_configurations(depth: int, first_shared: int = 1) -> list[str | list[int]]:
    """The static configurations that the release defines for a net of so many stages.

    ``first_shared``: 3 for Office-Home with 6 layers, whose first two layers are never shared.

    Raises:
        ValueError: there are none for this depth.
    """
    known: dict[tuple[int, int], list[str | list[int]]] = {
        (4, 1): [
            "all", "top-1", "top-2", "top-3", "bottom-1", "bottom-2", "bottom-3", [2, 4], [1, 3],
        ],
        (6, 1): ["all", *(f"top-{k}" for k in range(1, 6)), *(f"bottom-{k}" for k in range(1, 6)),
                 [2, 4, 6]],
        (6, 3): ["top-4", "top-1", "top-2", "top-3", [3], [3, 4], [3, 4, 5], [4, 6], [3, 5]],
        (8, 1): [
            "all", "top-2", "top-4", "top-6", "bottom-2", "bottom-4", "bottom-6", [2, 4, 6, 8],
            [1, 3, 5, 7],
        ],
        (9, 1): ["all"],
        (17, 1): ["all"],
    }  # fmt: skip
    if (depth, first_shared) not in known:
        depths = sorted({d for d, first in known if first == first_shared})
        raise ValueError(f"config: 'release' is defined for nets of {depths} stages, got {depth}")
    return known[depth, first_shared]
