"""A training run over a sequence of tasks, and the plain record it leaves.

One run is one method on one sequence: the search (`lasem`), or one of the paper's two static
comparators, transfer at all stages (`all`) and no transfer (`none`). Two runs with the same
arguments, on the CPU with the same number of threads, are equal bit for bit, if none of them
measures its ways anew (`lasem_fast.choices`; by default nothing is timed). Methods that are given
the same seed see the same initial weights at the start, the same new heads and specific branches
at each task, and the same mini-batches.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lasem_fast import choices, metrics
from lasem_fast.configs import ConfigSpace, Configuration
from lasem_fast.em import LASEM
from lasem_fast.net import TransferNet

METHODS = ("lasem", "all", "none")
_EVALUATION_BATCH = 1024

Split = tuple[Tensor, Tensor]


@dataclass(frozen=True)
class Task:
    """One task: inputs ``[N, ...]`` and int64 labels ``[N]`` in ``0..n_classes-1``, per split."""

    name: str
    train: Split
    valid: Split
    test: Split
    n_classes: int
    note: str = ""

    def to(self, device: torch.device | str) -> Task:
        """The same task with its tensors on ``device``."""
        splits = ((x.to(device), y.to(device)) for x, y in (self.train, self.valid, self.test))
        return Task(self.name, *splits, n_classes=self.n_classes, note=self.note)


@dataclass(frozen=True)
class Progress:
    """What a callback is told after each epoch. ``epoch`` counts from 1 to ``epochs``."""

    method: str
    task: str
    task_number: int  # from 1
    n_tasks: int
    epoch: int
    epochs: int
    label: str  # the best configuration so far, as in "{2,4}"
    loss: float
    valid: float
    test: float


@dataclass
class TaskRecord:
    """One task of a run. Lists over epochs (E) belong to the task's own training.

    Losses and accuracies are of the configuration that was best at that moment, except ``loss``
    under the search, which is the posterior-weighted loss.
    """

    name: str
    note: str
    config: list[bool]  # [d], the one kept (search) or prescribed (static)
    label: str
    loss: list[float] = field(default_factory=list)  # [E], mean over mini-batches
    valid: list[float] = field(default_factory=list)  # [E]
    test: list[float] = field(default_factory=list)  # [E]
    peak: float = float("nan")  # `metrics.peak_accuracy`
    learning_curve_area: float = float("nan")  # `metrics.learning_curve_area`
    posterior: list[list[float]] = field(default_factory=list)  # [E][C], mean over mini-batches
    prior: list[float] = field(default_factory=list)  # [C], at the end of the task


@dataclass
class RunRecord:
    """A run: JSON-able through `to_dict`, where what a run does not have is None, never NaN.

    ``matrix[i][j]``: test accuracy on task j after task i has ended, roll-back included; None
    above the diagonal. ``curves``: while task ``task`` (from 0) is trained, after ``epoch`` (from
    1), the accuracies on all tasks seen so far. Those of earlier tasks are measured with the
    shared weights of that moment, before any roll-back. ``seconds``: wall clock by phase.
    """

    method: str
    seed: int
    epochs: int
    batch_size: int
    configurations: list[str]  # [C] labels of the rows of posteriors and priors; [] if static
    tasks: list[TaskRecord] = field(default_factory=list)
    matrix: list[list[float | None]] = field(default_factory=list)
    curves: list[dict[str, Any]] = field(default_factory=list)
    share_frequency: list[float] = field(default_factory=list)  # [d]
    choices: choices.Ways = field(default_factory=dict)  # in force at the end; {}: by the rule
    parameters: int = 0  # numbers that have to be kept for all tasks, heads included
    seconds: dict[str, float] = field(default_factory=dict)

    def accuracy_matrix(self) -> metrics.Floats:
        """``R`` of `lasem_fast.metrics`: ``[T, T]``, NaN above the diagonal."""
        return np.array(self.matrix, dtype=np.float64)

    def summary(self) -> dict[str, float | None]:
        """The run in one number per measure; None where a single task leaves it undefined."""
        R = self.accuracy_matrix()
        peaks = [task.peak for task in self.tasks]
        values = {
            "peak_accuracy": float(np.mean(peaks)),
            "learning_curve_area": float(np.mean([t.learning_curve_area for t in self.tasks])),
            "average_accuracy": metrics.average_accuracy(R),
            "backward_transfer": metrics.backward_transfer(R),
            "forgetting": metrics.forgetting(R),
            "forgetting_ratio_to_end": metrics.forgetting_ratio(R[-1], R.diagonal()),
            "forgetting_ratio_to_peak": metrics.forgetting_ratio(R[-1], peaks),
        }
        return {name: value if value == value else None for name, value in values.items()}

    def to_dict(self) -> dict[str, Any]:
        return {**asdict(self), "summary": self.summary()}


def train_sequence(
    make_net: Callable[[], TransferNet],
    make_head: Callable[[Task], nn.Module],
    tasks: Sequence[Task],
    *,
    method: str = "lasem",
    epochs: int = 50,
    batch_size: int = 16,
    optimizer: Callable[[list[nn.Parameter]], torch.optim.Optimizer] = torch.optim.Adam,
    seed: int = 0,
    evaluate_earlier_every: int = 1,
    em_options: dict[str, Any] | None = None,
    device: torch.device | str = "cpu",
    on_epoch: Callable[[Progress], None] | None = None,
) -> RunRecord:
    """Train one network on ``tasks``, one after the other.

    Args:
        make_net: gives a new net without tasks. Called once, after seeding.
        make_head: gives a new head ``-> [N, task.n_classes]``. Called once per task.
        tasks: with different names.
        method: ``"lasem"``, ``"all"`` (every stage shared) or ``"none"`` (no stage shared). The
            static ones train one configuration by cross-entropy, without search or roll-back.
        epochs: per task.
        batch_size: mini-batches are shuffled anew in every epoch; the last may be smaller.
        optimizer: from ``net.task_parameters(task)`` to an optimiser; a new one for each task.
        seed: of initial weights and mini-batches. The caller's random state is left as it was.
        evaluate_earlier_every: every how many epochs the tasks before the current one are
            evaluated too. The current task is evaluated after every epoch.
        em_options: keyword arguments for `LASEM`.
        device: where to train.
        on_epoch: called after every epoch.

    Raises:
        ValueError: an argument is not as described.
    """
    _check(tasks, method, epochs, batch_size, evaluate_earlier_every)
    device = torch.device(device)
    tasks = [task.to(device) for task in tasks]
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        # One seed for the net and one per task, so that a task begins alike in every method.
        seeds = _seeds(seed, 1 + len(tasks))
        torch.manual_seed(seeds[0])
        net = make_net().to(device)
        learner: _Search | _Static
        if method == "lasem":
            learner = _Search(LASEM(net, **(em_options or {})))
        else:
            space = ConfigSpace(net.depth)
            learner = _Static(net, space, space.all if method == "all" else space.bottom(0))
        record = RunRecord(method, seed, epochs, batch_size, learner.labels)
        seconds = {"train": 0.0, "evaluate": 0.0}

        for number, task in enumerate(tasks):
            torch.manual_seed(seeds[1 + number])
            batches = torch.Generator().manual_seed(seeds[1 + number])
            net.add_task(task.name, make_head(task).to(device))
            stepper = optimizer(net.task_parameters(task.name))
            entry = TaskRecord(task.name, task.note, [], "")

            for epoch in range(1, epochs + 1):
                with _timed(seconds, "train", device):
                    loss, posterior = _epoch(learner, task, stepper, batch_size, batches)
                entry.loss.append(loss)
                if posterior is not None:
                    entry.posterior.append(posterior)
                earlier = epoch % evaluate_earlier_every == 0 or epoch == epochs
                seen = tasks[: number + 1] if earlier else [task]
                with _timed(seconds, "evaluate", device):
                    valid = [learner.accuracy(t.name, *t.valid) for t in seen]
                    test = [learner.accuracy(t.name, *t.test) for t in seen]
                entry.valid.append(valid[-1])
                entry.test.append(test[-1])
                if earlier:
                    curve = {"task": number, "epoch": epoch, "valid": valid, "test": test}
                    record.curves.append(curve)
                if on_epoch is not None:
                    label = learner.label(learner.config(task.name))
                    on_epoch(
                        Progress(
                            method, task.name, number + 1, len(tasks), epoch, epochs, label,
                            loss, valid[-1], test[-1],
                        )
                    )  # fmt: skip

            entry.peak = metrics.peak_accuracy(entry.valid, entry.test)
            entry.learning_curve_area = metrics.learning_curve_area(entry.test)
            entry.prior = learner.prior(task.name)
            config = learner.end(task.name)
            entry.config, entry.label = list(config), learner.label(config)
            record.tasks.append(entry)
            with _timed(seconds, "evaluate", device):
                row = [learner.accuracy(t.name, *t.test) for t in tasks[: number + 1]]
            record.matrix.append(row + [None] * (len(tasks) - len(row)))

    shared = metrics.share_frequency([entry.config for entry in record.tasks])
    record.share_frequency = shared.tolist()
    kept = {p for task in tasks for p in net.task_parameters(task.name)}
    record.parameters = sum(p.numel() for p in kept)
    record.seconds = seconds
    record.choices = choices.in_force()
    return record


class _Search:
    """Training by EM: the configuration is searched for."""

    def __init__(self, em: LASEM) -> None:
        self.module = em
        self.labels = [em.space.label(row) for row in range(len(em.space))]

    def step(self, x: Tensor, y: Tensor, task: str) -> tuple[Tensor, Tensor | None]:
        step = self.module(x, y, task=task)
        return step.loss, step.posterior.detach()

    def config(self, task: str) -> Configuration:
        return self.module.best_config(task)

    def label(self, config: Configuration) -> str:
        return self.labels[self.module.space.index(config)]

    def prior(self, task: str) -> list[float]:
        return self.module.prior(task).tolist()

    def end(self, task: str) -> Configuration:
        return self.module.end_task(task)

    def accuracy(self, task: str, x: Tensor, y: Tensor) -> float:
        return _accuracy(self.module.net, task, self.config(task), x, y)


class _Static:
    """Training of one prescribed configuration by cross-entropy."""

    def __init__(self, net: TransferNet, space: ConfigSpace, config: Configuration) -> None:
        self.module = net
        self.labels: list[str] = []
        self._config = config
        self._label = space.label(space.index(config))

    def step(self, x: Tensor, y: Tensor, task: str) -> tuple[Tensor, Tensor | None]:
        return F.cross_entropy(self.module(x, task, config=self._config), y), None

    def config(self, task: str) -> Configuration:
        return self._config

    def label(self, config: Configuration) -> str:
        return self._label

    def prior(self, task: str) -> list[float]:
        return []

    def end(self, task: str) -> Configuration:
        self.module.keep(task, self._config)
        return self._config

    def accuracy(self, task: str, x: Tensor, y: Tensor) -> float:
        return _accuracy(self.module, task, self._config, x, y)


def _epoch(
    learner: _Search | _Static,
    task: Task,
    optimizer: torch.optim.Optimizer,
    batch_size: int,
    generator: torch.Generator,
) -> tuple[float, list[float] | None]:
    """One pass over the training data: mean loss and mean posterior [C] over mini-batches."""
    x, y = task.train
    learner.module.train()
    losses, posteriors = [], []
    for rows in torch.randperm(len(x), generator=generator).to(x.device).split(batch_size):
        optimizer.zero_grad()
        loss, posterior = learner.step(x[rows], y[rows], task.name)
        loss.backward()
        optimizer.step()
        losses.append(loss.detach())
        if posterior is not None:
            posteriors.append(posterior)
    mean = torch.stack(losses).double().mean().item()
    return mean, torch.stack(posteriors).double().mean(0).tolist() if posteriors else None


@torch.no_grad()
def _accuracy(net: TransferNet, task: str, config: Configuration, x: Tensor, y: Tensor) -> float:
    net.eval()
    right = torch.zeros((), dtype=torch.int64, device=y.device)
    for part, labels in zip(x.split(_EVALUATION_BATCH), y.split(_EVALUATION_BATCH), strict=True):
        right += (net(part, task, config=config).argmax(1) == labels).sum()
    return right.item() / len(y)


def _seeds(seed: int, n: int) -> list[int]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(2**31, (n,), generator=generator).tolist()


@contextmanager
def _timed(seconds: dict[str, float], phase: str, device: torch.device) -> Iterator[None]:
    start = time.perf_counter()
    yield
    # Without it a phase would pay for kernels that the one before it has launched.
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    seconds[phase] += time.perf_counter() - start


def _check(tasks: Sequence[Task], method: str, epochs: int, batch_size: int, every: int) -> None:
    names = [task.name for task in tasks]
    if not names or len(set(names)) != len(names):
        raise ValueError(f"tasks must be at least one, with different names, got {names}")
    if method not in METHODS:
        raise ValueError(f"method must be one of {', '.join(METHODS)}, got {method!r}")
    for name, value in (
        ("epochs", epochs),
        ("batch_size", batch_size),
        ("evaluate_earlier_every", every),
    ):
        if value < 1:
            raise ValueError(f"{name} must be at least 1, got {value}")
