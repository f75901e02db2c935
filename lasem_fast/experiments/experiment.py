"""A config worked out: the runs it asks for, where they go, what each of them is trained with."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from lasem_fast.experiments import config as configs
from lasem_fast.experiments import presets, registry, schema, task_source
from lasem_fast.experiments.config import Checked, ConfigError, suggestion
from lasem_fast.experiments.network import Network
from lasem_fast.experiments.variants import Variant, expand
from lasem_fast.lifelong import Task
from lasem_fast.optim import TFRMSprop

OPTIMIZERS: dict[str, Callable[..., torch.optim.Optimizer]] = {
    "tf-rmsprop": TFRMSprop,
    "adam": torch.optim.Adam,
    "sgd": torch.optim.SGD,
}


@dataclass(frozen=True)
class Unit:
    """One run: a variant with a seed, and the folder that it leaves."""

    variant: Variant
    seed: int
    folder: Path

    @property
    def finished(self) -> bool:
        return (self.folder / "run.json").exists()

    @property
    def state(self) -> Path:
        """Where the state is kept while the run is under way."""
        return self.folder / "state"

    @property
    def shared(self) -> bool:
        """Whether several workers take a part of it each."""
        return self.variant.settings["method"] == "brute-force"

    @property
    def lock(self) -> Path:
        name = f"{self.variant.slug}-seed{self.seed}.lock"
        return self.folder.parent.parent / "locks" / name


@dataclass
class Experiment:
    """What a checked config asks for.

    Raises:
        ConfigError: names, options and values do not fit together.
    """

    checked: Checked
    out: Path
    planned: bool = False  # nothing is to be trained: tasks of the same form will do
    _tasks: dict[int, list[Task]] = field(default_factory=dict)
    _length: int | None = None

    def __post_init__(self) -> None:
        self.config: schema.Config = self.checked.config
        task_source.check(self.config.data)
        self.network = Network(self.config.net)
        self.variants = expand(self.checked.methods, self.network)
        self.built = {v.slug: registry.build(v, self.network) for v in self.variants}
        if len(set(self.config.seeds)) != len(self.config.seeds):
            raise ConfigError(f"seeds: expected different ones, got {self.config.seeds}")

    @classmethod
    def of(
        cls, plain: dict[str, Any], out: Path | None = None, planned: bool = False
    ) -> Experiment:
        """The experiment of a config that has been read."""
        checked = configs.check(plain)
        return cls(checked, checked.out if out is None else out, planned)

    def units(self) -> list[Unit]:
        """All runs, seed by seed in the order of the config."""
        return [
            Unit(variant, seed, self.out / variant.slug / f"seed{seed}")
            for seed in self.config.seeds
            for variant in self.variants
        ]

    def tasks(self, unit: Unit) -> list[Task]:
        """The tasks of a run."""
        tasks = self._of_seed(unit.seed)
        if unit.variant.tasks is not None and unit.variant.tasks > len(tasks):
            raise ConfigError(
                f"tasks of {unit.variant.label!r}: expected at most the sequence's {len(tasks)}, "
                f"got {unit.variant.tasks}"
            )
        return tasks[: unit.variant.tasks]

    def n_tasks(self, variant: Variant | None = None) -> int:
        """Number of tasks of the sequence, or of a variant's part of it."""
        if self._length is None:
            self._length = len(self._of_seed(self.config.seeds[0]))
        most = None if variant is None else variant.tasks
        return self._length if most is None else most

    def _of_seed(self, seed: int) -> list[Task]:
        if seed not in self._tasks:
            load = task_source.load_stand_ins if self.planned else task_source.load
            most = self.config.training.test_samples
            # those of one seed at a time: they may be large
            self._tasks = {
                seed: [_with_fewer_tests(task, most) for task in load(self.config.data, seed)]
            }
        return self._tasks[seed]

    def training(self) -> dict[str, Any]:
        """Optimiser, epochs and so on: the preset's, and over them the config's own."""
        given = self.config.training.model_dump(exclude={"preset"}, exclude_none=True)
        name = self.config.training.preset
        if name is None:
            name = presets.STAND_INS.get(self.config.data.name, self.config.data.name)
            name = name if name in presets.TRAINING else None
        elif name not in presets.TRAINING:
            raise ConfigError(
                f"training.preset: expected one of {', '.join(presets.TRAINING)}, got {name!r}"
                f"{suggestion(name, presets.TRAINING)}"
            )
        if name is not None:
            shared_out = "epochs_in_all" in presets.TRAINING[name] and "epochs" not in given
            n_tasks = self.n_tasks() if shared_out else 1
            given = {**presets.training(name, n_tasks), **given}
        defaults = {"batch_size": self.network.batch_size, "lr_decay": 0.0, "drop_last": False}
        found = {**{k: v for k, v in defaults.items() if v is not None}, **given}
        missing = [k for k in ("epochs", "batch_size", "optimizer", "lr") if k not in found]
        if missing:
            raise ConfigError(
                f"training: expected {', '.join(missing)}, or a preset ("
                f"{', '.join(presets.TRAINING)}), because {self.config.data.name!r} has none"
            )
        return found

    def settings(self, unit: Unit) -> dict[str, Any]:
        """All that decides what a run computes, JSON-able."""
        data = {"name": self.config.data.name, **self.config.data.options()}
        return {
            "label": unit.variant.label,
            "method": unit.variant.settings,
            "tasks": unit.variant.tasks,
            "seed": unit.seed,
            "data": data,
            "net": self.config.net.model_dump(),
            "training": self.training(),
            "threads": self.config.threads,
            "device": self.config.device,
        }

    def arguments(self, unit: Unit) -> dict[str, Any]:
        """The keyword arguments of `train_sequence`."""
        training, built = self.training(), self.built[unit.variant.slug]
        tasks, epochs = self.tasks(unit), training["epochs"]
        if len(tasks) > 1 and epochs < built.least_epochs:
            raise ConfigError(
                f"training.epochs: expected at least {built.least_epochs} for "
                f"{unit.variant.label!r}, got {epochs}"
            )
        every = training["evaluate_earlier_every"]
        return {
            "make_net": built.make_net,
            "make_head": built.make_head,
            "tasks": tasks,
            "method": built,
            "epochs": epochs,
            "batch_size": training["batch_size"],
            "optimizer": partial(OPTIMIZERS[training["optimizer"]], lr=training["lr"]),
            "schedule": falling(training["lr_decay"]),
            "drop_last": training["drop_last"],
            "evaluate_every": training["evaluate_every"],
            "evaluate_earlier_every": None if every == "never" else every,
            "seed": unit.seed,
            "device": self.config.device,
        }


def _with_fewer_tests(task: Task, most: int | None) -> Task:
    x, y = task.test
    if most is None or most >= len(x):
        return task
    rows = torch.arange(most) * len(x) // most
    return replace(task, test=(x[rows], y[rows]))


def falling(decay: float) -> Callable[[int], float] | None:
    """The factor on the learning rate, ``e`` epochs into the whole run: 1 / (1 + e decay)."""
    return (lambda e: 1 / (1 + e * decay)) if decay else None
