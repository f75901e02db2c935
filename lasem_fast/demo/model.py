"""The demo's network: four conv stages, and a linear head for each task."""

from __future__ import annotations

from torch import nn

DEPTH = 4


def make_stages(side: int, width: int = 16) -> list[nn.Module]:
    """Four stages conv 3 x 3 -> ReLU (-> max-pool 2) for images ``[N, 1, side, side]``.

    Channels are ``width, width, 2 width, 2 width``, as in the paper's CIFAR net of four layers;
    pools follow stages 2 and 4 (8 -> 4 -> 2), and stage 1 too where ``side >= 16``.
    """
    channels = [1, width, width, 2 * width, 2 * width]
    pools = [side >= 16, True, False, True]
    return [
        nn.Sequential(
            nn.Conv2d(channels[level], channels[level + 1], 3, padding=1),
            nn.ReLU(),
            *([nn.MaxPool2d(2)] if pools[level] else []),
        )
        for level in range(DEPTH)
    ]


def make_head(n_classes: int, side: int, width: int = 16) -> nn.Module:
    """One linear layer from the flattened output of the last stage to ``[N, n_classes]``."""
    last = side // (8 if side >= 16 else 4)
    return nn.Sequential(nn.Flatten(), nn.Linear(2 * width * last * last, n_classes))
