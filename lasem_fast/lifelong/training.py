"""The one loop: a task's training, epoch by epoch, whatever the method."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lasem_fast._numbers import finite_number
from lasem_fast.configs import Configuration
from lasem_fast.lifelong import checkpoints
from lasem_fast.lifelong.clock import Clock
from lasem_fast.lifelong.method import Method, Phase
from lasem_fast.lifelong.records import RunRecord, TaskRecord
from lasem_fast.lifelong.run_checks import check_fit, checked_head, evaluating
from lasem_fast.lifelong.task_data import Task

_EVALUATION_BATCH = 128  # larger ones spend their time on getting memory


@dataclass(frozen=True)
class Progress:
    """What a callback is told after each epoch. ``epoch`` counts from 1 to ``epochs``.

    A method that tries several configurations trains a task in ``trials`` trials; ``trial`` counts
    from 1.
    """

    method: str
    task: str
    task_number: int  # from 1
    n_tasks: int
    epoch: int
    epochs: int
    label: str  # the best configuration so far, as in "{2,4}"; "" for a method without
    loss: float
    valid: float  # as last evaluated; NaN before that
    test: float
    trial: int = 1
    trials: int = 1


@dataclass
class Training:
    """What changes from epoch to epoch of one task's training."""

    number: int  # of the task, from 0
    entry: TaskRecord
    optimizer: torch.optim.Optimizer
    batches: torch.Generator
    epoch: int = 0  # epochs that are done
    curves: list[dict[str, Any]] = field(default_factory=list)


@dataclass(frozen=True)
class Run:
    """What all tasks of a run have in common."""

    make_method: Callable[[], Method]
    make_head: Callable[[Task], nn.Module]
    tasks: list[Task]
    optimizer: Callable[[list[nn.Parameter]], torch.optim.Optimizer]
    schedule: Callable[[int], float] | None
    name: str
    epochs: int
    batch_size: int
    drop_last: bool
    evaluate_every: int
    evaluate_earlier_every: int | None
    device: torch.device
    seeds: list[int]  # one for the net, then one per task: a task begins alike in every method
    identity: str
    save_every: float  # seconds

    def method(self) -> Method:
        """The method at the start of the run."""
        torch.manual_seed(self.seeds[0])
        method = self.make_method()
        method.module.to(self.device)
        return method

    def add_task(self, method: Method, number: int) -> list[nn.Parameter]:
        """Seeds, makes the head and adds the task; gives what its optimiser trains."""
        torch.manual_seed(self.seeds[1 + number])
        task = self.tasks[number]
        parameters = method.add_task(task, checked_head(self.make_head(task)).to(self.device))
        method.module.to(self.device)
        return parameters

    def training(self, number: int, parameters: list[nn.Parameter]) -> Training:
        """A task's training before its first epoch."""
        task = self.tasks[number]
        optimizer = self.optimizer(parameters)
        if not isinstance(optimizer, torch.optim.Optimizer):
            raise TypeError(
                f"optimizer: expected a function that returns a torch.optim.Optimizer, got one "
                f"that returns {type(optimizer).__name__}"
            )
        batches = torch.Generator().manual_seed(self.seeds[1 + number])
        return Training(number, TaskRecord(task.name, task.note, [], ""), optimizer, batches)


def train(
    run: Run, method: Method, now: Training, clock: Clock, saved: Callable[[bool], None]
) -> Iterator[Progress]:
    """Trains a task from where it stands to its last epoch.

    ``saved`` is called after every epoch, with whether it was the last.
    """
    task, entry, number = run.tasks[now.number], now.entry, now.number
    if now.epoch == 0:
        check_fit(method, task)
    while now.epoch < run.epochs:
        epoch = now.epoch + 1
        method.begin_epoch(task, Phase(epoch, run.epochs))
        _set_learning_rate(now.optimizer, run.schedule, number * run.epochs + now.epoch)
        with clock.time("train"):
            loss, posterior = _epoch(run, method, now)
        entry.loss.append(loss)
        if posterior is not None:
            entry.posterior.append(posterior)
        if epoch % run.evaluate_every == 0 or epoch == run.epochs:
            with clock.time("evaluate"):
                _evaluate(run, method, now, epoch)
        now.epoch = epoch
        saved(epoch == run.epochs)
        yield Progress(
            run.name, task.name, number + 1, len(run.tasks), epoch, run.epochs,
            label_of(method.config(task.name)), loss, *_last(entry),
        )  # fmt: skip


def _evaluate(run: Run, method: Method, now: Training, epoch: int) -> None:
    """Notes the accuracies on the task, and every so often on those before it."""
    number, entry = now.number, now.entry
    every = run.evaluate_earlier_every
    earlier = every is not None and (epoch % every == 0 or epoch == run.epochs)
    seen = run.tasks[: number + 1] if earlier else run.tasks[number : number + 1]
    valid = [accuracy(method, t.name, *t.valid) for t in seen]
    test = [accuracy(method, t.name, *t.test) for t in seen]
    entry.valid.append(valid[-1])
    entry.test.append(test[-1])
    if run.evaluate_every > 1:
        entry.evaluated.append(epoch)
    if earlier:
        now.curves.append({"task": number, "epoch": epoch, "valid": valid, "test": test})


def _last(entry: TaskRecord) -> tuple[float, float]:
    return (entry.valid[-1], entry.test[-1]) if entry.valid else (float("nan"),) * 2


def _set_learning_rate(
    optimizer: torch.optim.Optimizer, schedule: Callable[[int], float] | None, epoch: int
) -> None:
    """``epoch``: of the whole run, from 0."""
    if schedule is not None:
        factor = finite_number(schedule(epoch), f"schedule({epoch})", zero=True)
        for group in optimizer.param_groups:
            group["lr"] = group.setdefault("initial_lr", group["lr"]) * factor


def _epoch(run: Run, method: Method, now: Training) -> tuple[float, list[float] | None]:
    """One pass over the training data: mean loss and mean posterior [C] over mini-batches."""
    name, (x, y) = run.tasks[now.number].name, run.tasks[now.number].train
    order = torch.randperm(len(x), generator=now.batches).to(x.device).split(run.batch_size)
    if run.drop_last and len(order) > 1 and len(order[-1]) < run.batch_size:
        order = order[:-1]
    losses, posteriors = [], []
    for rows in order:
        found = method.step(x[rows], y[rows], name, now.optimizer)
        losses.append(found.loss.detach())
        if found.posterior is not None:
            posteriors.append(found.posterior)
    mean = torch.stack(losses).double().mean().item()
    return mean, torch.stack(posteriors).double().mean(0).tolist() if posteriors else None


@torch.no_grad()
def accuracy(method: Method, task: str, x: Tensor, y: Tensor) -> float:
    """Fraction of the samples that the method classifies right, as it stands now."""
    right = torch.zeros((), dtype=torch.int64, device=y.device)
    parts = zip(x.split(_EVALUATION_BATCH), y.split(_EVALUATION_BATCH), strict=True)
    with evaluating(method.module):
        for part, labels in parts:
            right += (method.logits(part, task).argmax(1) == labels).sum()
    return right.item() / len(y)


def label_of(config: Configuration | None) -> str:
    """The paper's name of a configuration: its shared stages, 1-based, as in ``"{2,4}"``."""
    if config is None:
        return ""
    return "{" + ",".join(str(stage + 1) for stage, bit in enumerate(config) if bit) + "}"


class Saver:
    """Writes a task's training after an epoch, at most every so many seconds, and at its end."""

    def __init__(
        self, path: Path, run: Run, method: Method, now: Training, clock: Clock, record: RunRecord
    ) -> None:
        self._path, self._run, self._method = path, run, method
        self._now, self._clock, self._record = now, clock, record
        self._last = time.monotonic()

    def __call__(self, at_the_end: bool) -> None:
        if not at_the_end and time.monotonic() - self._last < self._run.save_every:
            return
        self._clock.settle()
        now = self._now
        state = {
            "format": checkpoints.FORMAT,
            "identity": self._run.identity,
            "module": checkpoints.module_state(self._method.module),
            "optimizer": now.optimizer.state_dict(),
            "random": checkpoints.random_state(now.batches, self._run.device),
            "number": now.number,
            "epoch": now.epoch,
            "plain": json.dumps(
                {
                    "record": asdict(self._record),
                    "entry": asdict(now.entry),
                    "curves": now.curves,
                    "seconds": self._clock.seconds,
                }
            ),
        }
        checkpoints.write_state(self._path, state)
        self._last = time.monotonic()


def restored(run: Run, method: Method, now: Training, state: dict[str, Any]) -> dict[str, Any]:
    """Brings a method, all tasks added, and a training to what was saved; gives the plain rest."""
    plain = json.loads(state["plain"])
    checkpoints.load_module_state(method.module, state["module"])
    now.optimizer.load_state_dict(state["optimizer"])
    checkpoints.load_random_state(state["random"], now.batches, run.device)
    now.epoch, now.curves = state["epoch"], plain["curves"]
    now.entry = TaskRecord(**plain["entry"])
    return plain
