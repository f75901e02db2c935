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
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lasem_fast import metrics
from lasem_fast.backends import choices
from lasem_fast.configs import ConfigSpace, Configuration
from lasem_fast.em import LASEM
from lasem_fast.lifelong.records import RunRecord, TaskRecord
from lasem_fast.lifelong.run_checks import (
    check_fit,
    check_functions,
    check_numbers,
    checked_device,
    checked_head,
    checked_net,
    evaluating,
    own_copies,
)
from lasem_fast.lifelong.task_data import Task, check_tasks
from lasem_fast.net import TransferNet

METHODS = ("lasem", "all", "none")
_EVALUATION_BATCH = 1024


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


class SequenceError(RuntimeError):
    """A task of a sequence failed; what was found until then is not lost with it.

    Raised from the error itself, which is its ``__cause__``.

    Attributes:
        record: the :class:`RunRecord` of the tasks that had ended before.
        unfinished: the :class:`TaskRecord` of the task that failed, with the epochs that it had
            finished; configuration and prior are empty.
    """

    def __init__(self, message: str, record: RunRecord, unfinished: TaskRecord) -> None:
        super().__init__(message)
        self.record = record
        self.unfinished = unfinished

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (str(self), self.record, self.unfinished)  # so that it can be pickled


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
    on_task: Callable[[RunRecord], None] | None = None,
) -> RunRecord:
    """Train one network on ``tasks``, one after the other.

    Everything that can be checked beforehand, values of all splits of all tasks included, is
    checked before anything is trained. Objects in ``em_options`` that learn, such as a
    :class:`~lasem_fast.priors.Prior`, are copied: every run begins with them as they were given.

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
        on_task: called after every task with the record so far, for example to save its
            ``to_dict()``. What it or ``on_epoch`` raises ends the run as it is.

    Raises:
        TypeError, ValueError: an argument is not as described; nothing has been trained.
        RuntimeError: the device, or the backend that ``em_options`` names, cannot be used here.
        SequenceError: a task failed; its ``record`` holds the tasks that had ended before.
    """
    tasks = check_tasks(tasks)
    if not isinstance(method, str) or method not in METHODS:
        raise ValueError(f"method: expected one of {', '.join(METHODS)}, got {method!r}")
    check_functions(make_net=make_net, make_head=make_head, optimizer=optimizer)
    if on_epoch is not None:
        check_functions(on_epoch=on_epoch)
    check_numbers(
        seed, epochs=epochs, batch_size=batch_size, evaluate_earlier_every=evaluate_earlier_every
    )
    em_options = own_copies(em_options)
    device = checked_device(device)
    tasks = [task.to(device) for task in tasks]
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        # One seed for the net and one per task, so that a task begins alike in every method.
        seeds = _seeds(seed, 1 + len(tasks))
        torch.manual_seed(seeds[0])
        net = checked_net(make_net()).to(device)
        learner: _Search | _Static
        if method == "lasem":
            learner = _Search(LASEM(net, **em_options))
        else:
            space = ConfigSpace(net.depth)
            learner = _Static(net, space, space.all if method == "all" else space.bottom(0))
        record = RunRecord(method, seed, epochs, batch_size, learner.labels)
        record.seconds = {"train": 0.0, "evaluate": 0.0}
        run = _Run(
            net, learner, tasks, record, make_head, optimizer, evaluate_earlier_every, device
        )
        for number in range(len(tasks)):
            entry = TaskRecord(tasks[number].name, tasks[number].note, [], "")
            training = run.task(number, entry, seeds[1 + number])
            while True:
                with _failure_told(record, entry, number, len(tasks)):
                    progress = next(training, None)
                if progress is None:
                    break
                # out of the context: what a callback raises is its caller's own
                if on_epoch is not None:
                    on_epoch(progress)
            if on_task is not None:
                on_task(record)
    return record


@dataclass(frozen=True)
class _Run:
    """The parts of a run that all its tasks have in common."""

    net: TransferNet
    learner: _Search | _Static
    tasks: list[Task]
    record: RunRecord
    make_head: Callable[[Task], nn.Module]
    optimizer: Callable[[list[nn.Parameter]], torch.optim.Optimizer]
    evaluate_earlier_every: int
    device: torch.device

    def task(self, number: int, entry: TaskRecord, seed: int) -> Iterator[Progress]:
        """Trains one task, epoch by epoch, and records it."""
        learner, record, seconds = self.learner, self.record, self.record.seconds
        task, name, epochs = self.tasks[number], self.tasks[number].name, record.epochs
        torch.manual_seed(seed)
        batches = torch.Generator().manual_seed(seed)
        self.net.add_task(name, checked_head(self.make_head(task)).to(self.device))
        check_fit(self.net, task)
        stepper = self.optimizer(self.net.task_parameters(name))
        if not isinstance(stepper, torch.optim.Optimizer):
            raise TypeError(
                f"optimizer: expected a function that returns a torch.optim.Optimizer, got one "
                f"that returns {type(stepper).__name__}"
            )
        curves = []
        for epoch in range(1, epochs + 1):
            with _timed(seconds, "train", self.device):
                loss, posterior = _epoch(learner, task, stepper, record.batch_size, batches)
            entry.loss.append(loss)
            if posterior is not None:
                entry.posterior.append(posterior)
            earlier = epoch % self.evaluate_earlier_every == 0 or epoch == epochs
            seen = self.tasks[: number + 1] if earlier else [task]
            with _timed(seconds, "evaluate", self.device):
                valid = [learner.accuracy(t.name, *t.valid) for t in seen]
                test = [learner.accuracy(t.name, *t.test) for t in seen]
            entry.valid.append(valid[-1])
            entry.test.append(test[-1])
            if earlier:
                curves.append({"task": number, "epoch": epoch, "valid": valid, "test": test})
            yield Progress(
                record.method, name, number + 1, len(self.tasks), epoch, epochs,
                learner.label(learner.config(name)), loss, valid[-1], test[-1],
            )  # fmt: skip

        entry.peak = metrics.peak_accuracy(entry.valid, entry.test)
        entry.learning_curve_area = metrics.learning_curve_area(entry.test)
        entry.prior = learner.prior(name)
        config = learner.end(name)
        entry.config, entry.label = list(config), learner.label(config)
        ended = self.tasks[: number + 1]
        with _timed(seconds, "evaluate", self.device):
            row = [learner.accuracy(t.name, *t.test) for t in ended]
        record.add(entry, row, curves)
        kept = {p for t in ended for p in self.net.task_parameters(t.name)}
        record.parameters = sum(p.numel() for p in kept)
        record.choices = choices.in_force()


@contextmanager
def _failure_told(
    record: RunRecord, entry: TaskRecord, number: int, n_tasks: int
) -> Iterator[None]:
    """Turns an error into a `SequenceError` with the record so far."""
    try:
        yield
    except Exception as error:
        ended = ", ".join(repr(task.name) for task in record.tasks) or "none"
        raise SequenceError(
            f"task {entry.name!r} ({number + 1} of {n_tasks}) failed after {len(entry.test)} of "
            f"{record.epochs} epochs: {type(error).__name__}: {error} (ended before: {ended}; see "
            f"this error's .record)",
            record,
            entry,
        ) from error


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
    right = torch.zeros((), dtype=torch.int64, device=y.device)
    parts = zip(x.split(_EVALUATION_BATCH), y.split(_EVALUATION_BATCH), strict=True)
    with evaluating(net):
        for part, labels in parts:
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
