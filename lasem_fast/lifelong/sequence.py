"""A training run over a sequence of tasks, and the plain record it leaves.

One run is one method on one sequence: the search (`lasem`), transfer at all stages (`all`), no
transfer (`none`), or any :class:`~lasem_fast.lifelong.method.Method`. Two runs with the same
arguments, on the CPU with the same number of threads, are equal bit for bit, if none of them
measures its ways anew (`lasem_fast.choices`; by default nothing is timed), interrupted and resumed
or not. Methods that are given the same seed see the same initial weights at the start, the same
new heads and specific branches at each task, and the same mini-batches.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock
from torch import nn

from lasem_fast import metrics
from lasem_fast._numbers import seed_number, whole_number
from lasem_fast.backends import choices
from lasem_fast.em import LASEM
from lasem_fast.lifelong import checkpoints
from lasem_fast.lifelong.clock import Clock
from lasem_fast.lifelong.failures import SequenceError, failure_told, guarded
from lasem_fast.lifelong.method import Method, MethodFactory
from lasem_fast.lifelong.methods import Search, Static
from lasem_fast.lifelong.records import RunRecord, TaskRecord
from lasem_fast.lifelong.run_checks import (
    check_epochs,
    check_functions,
    checked_device,
    checked_folder,
    checked_method,
    checked_net,
    own_copies,
)
from lasem_fast.lifelong.task_data import Task, check_tasks
from lasem_fast.lifelong.training import (
    Progress,
    Run,
    Saver,
    Training,
    accuracy,
    label_of,
    restored,
    train,
)
from lasem_fast.lifelong.trials import Trials
from lasem_fast.net import TransferNet

__all__ = ["METHODS", "SequenceError", "train_sequence"]

METHODS = ("lasem", "all", "none")
_STATE = "state.pt"


def train_sequence(
    make_net: Callable[[], TransferNet],
    make_head: Callable[[Task], nn.Module],
    tasks: Sequence[Task],
    *,
    method: str | MethodFactory = "lasem",
    epochs: int = 50,
    batch_size: int = 16,
    optimizer: Callable[[list[nn.Parameter]], torch.optim.Optimizer] = torch.optim.Adam,
    seed: int = 0,
    evaluate_earlier_every: int | None = 1,
    em_options: dict[str, Any] | None = None,
    device: torch.device | str = "cpu",
    on_epoch: Callable[[Progress], None] | None = None,
    on_task: Callable[[RunRecord], None] | None = None,
    schedule: Callable[[int], float] | None = None,
    drop_last: bool = False,
    evaluate_every: int = 1,
    folder: str | os.PathLike[str] | None = None,
    save_every: float = 0.0,
) -> RunRecord:
    """Train one network on ``tasks``, one after the other.

    Everything that can be checked beforehand, values of all splits of all tasks included, is
    checked before anything is trained. Objects in ``em_options`` that learn, such as a
    :class:`~lasem_fast.priors.Prior`, are copied: every run begins with them as they were given.

    Args:
        make_net: gives a new net without tasks. Called once, after seeding, unless the method asks
            for more.
        make_head: gives a new head ``-> [N, task.n_classes]``. Called once per task.
        tasks: with different names.
        method: ``"lasem"``, ``"all"`` (every stage shared), ``"none"`` (no stage shared), or a
            function that makes a :class:`~lasem_fast.lifelong.method.Method`, given ``make_net``.
            The static ones train one configuration by cross-entropy, without search or roll-back.
        epochs: per task.
        batch_size: mini-batches are shuffled anew in every epoch; the last may be smaller.
        optimizer: from ``net.task_parameters(task)`` to an optimiser; a new one for each task.
        seed: of initial weights and mini-batches. The caller's random state is left as it was.
        evaluate_earlier_every: every how many epochs the tasks before the current one are
            evaluated too, and after the last; None: only once a task has ended. The current task
            is evaluated after every epoch.
        em_options: keyword arguments for `LASEM`, with ``method="lasem"``.
        device: where to train.
        on_epoch: called after every epoch.
        on_task: called after every task with the record so far, for example to save its
            ``to_dict()``. What it or ``on_epoch`` raises ends the run as it is.
        schedule: a factor on the learning rate, finite and at least 0, given the number of epochs
            that the whole run has behind it; None: no change.
        drop_last: leave out a last mini-batch that is smaller, unless it is the only one.
        evaluate_every: every how many epochs, and after the last, the current task is evaluated;
            the best epoch is sought among these. Tasks before it are evaluated then at most.
        folder: keeps the state of the run, after every epoch; a run with the same arguments goes
            on from there, to the same end. For a method that tries configurations, several
            processes may share the folder: each of them takes a part of the trials and gives the
            whole record. Of other methods a second process waits for the first. The files can be
            removed once the run has ended.
        save_every: seconds that have to lie between two such savings of a task.

    Raises:
        TypeError, ValueError: an argument is not as described, or ``folder`` holds the state of
            another run; nothing has been trained.
        OSError: ``folder`` cannot be made or written.
        RuntimeError: the device, or the backend that ``em_options`` names, cannot be used here.
        SequenceError: a task failed; its ``record`` holds the tasks that had ended before.
    """
    tasks = check_tasks(tasks)
    makes_methods = callable(method) and not isinstance(method, nn.Module)
    if not makes_methods and (not isinstance(method, str) or method not in METHODS):
        raise ValueError(
            f"method: expected one of {', '.join(METHODS)}, got {method!r} (or a function that "
            f"makes a Method)"
        )
    check_functions(
        make_net=(make_net, ""), make_head=(make_head, "task"), optimizer=(optimizer, "parameters")
    )
    optional = {
        "on_epoch": (on_epoch, "progress"),
        "on_task": (on_task, "record"),
        "schedule": (schedule, "epoch"),
    }
    check_functions(**{name: given for name, given in optional.items() if given[0] is not None})
    seed = seed_number(seed, "seed")
    epochs = whole_number(epochs, "epochs")
    batch_size = whole_number(batch_size, "batch_size")
    evaluate_every = whole_number(evaluate_every, "evaluate_every")
    if evaluate_earlier_every is not None:
        evaluate_earlier_every = whole_number(evaluate_earlier_every, "evaluate_earlier_every")
    if not isinstance(drop_last, bool):
        raise TypeError(f"drop_last: expected True or False, got {drop_last!r}")
    place = checked_folder(folder, save_every)
    em_options = own_copies(em_options)
    if em_options and callable(method):
        raise ValueError(f"em_options: expected None for a method of your own, got {em_options}")
    device = checked_device(device)
    tasks = [task.to(device) for task in tasks]
    name = method if isinstance(method, str) else _name_of(method)

    def new_net() -> TransferNet:
        return checked_net(make_net()).to(device)

    def new_method() -> Method:
        return checked_method(_factory(method, em_options)(new_net))

    arguments = {"method": name, "seed": seed, "epochs": epochs, "batch_size": batch_size}
    arguments |= {"drop_last": drop_last, "evaluate_every": evaluate_every}
    arguments |= {"evaluate_earlier_every": evaluate_earlier_every}
    identity = "" if place is None else checkpoints.identity_of(tasks, **arguments)
    run = Run(
        new_method, make_head, tasks, optimizer, schedule, name, epochs, batch_size, drop_last,
        evaluate_every, evaluate_earlier_every, device, _seeds(seed, 1 + len(tasks)),
        identity, save_every,
    )  # fmt: skip
    with ExitStack() as stack:
        stack.enter_context(
            torch.random.fork_rng(devices=[device] if device.type == "cuda" else [])
        )
        learner = run.method()
        check_epochs(learner, epochs, len(tasks))
        record = RunRecord(name, seed, epochs, batch_size, list(learner.labels))
        if hasattr(learner, "candidates"):
            if place is None:
                place = Path(stack.enter_context(tempfile.TemporaryDirectory()))
            entries = _by_trials(run, learner, record, place)
        else:
            if place is not None:
                stack.enter_context(FileLock(place / "state.lock"))
            entries = _straight_on(run, learner, record, place)
        for told in entries:
            if isinstance(told, Progress):
                if on_epoch is not None:
                    on_epoch(told)
            elif on_task is not None:
                on_task(record)
    return record


def _straight_on(
    run: Run, method: Method, record: RunRecord, folder: Path | None
) -> Iterator[Progress | None]:
    """Trains every task once; gives progress after every epoch, None after every task."""
    state = None if folder is None else checkpoints.read_state(folder / _STATE, run.identity)
    first = 0 if state is None else state["number"]
    for number in range(first):
        with failure_told(run, record, TaskRecord(run.tasks[number].name, "", [], "")):
            run.add_task(method, number)
    clock = Clock(record.seconds, run.device)
    for number in range(first, len(run.tasks)):
        entry = TaskRecord(run.tasks[number].name, run.tasks[number].note, [], "")
        with failure_told(run, record, entry):
            now = run.training(number, run.add_task(method, number))
            if state is not None:
                saved = RunRecord.from_dict(restored(run, method, now, state)["record"])
                record.__dict__.update(saved.__dict__)
                clock, state = Clock(record.seconds, run.device), None
            entry = now.entry
        save: Callable[[bool], None] = _not_saved
        if folder is not None:
            save = Saver(folder / _STATE, run, method, now, clock, record)
        yield from guarded(train(run, method, now, clock, save), run, record, entry)
        with failure_told(run, record, entry):
            _end(run, method, record, now, clock)
        yield None


def _by_trials(
    run: Run, method: Method, record: RunRecord, folder: Path
) -> Iterator[Progress | None]:
    """Trains every task in trials, or takes over what other processes have trained."""
    seconds: dict[str, float] = {}
    clock = Clock(seconds, run.device)
    for number, task in enumerate(run.tasks):
        entry = TaskRecord(task.name, task.note, [], "")
        with failure_told(run, record, entry):
            run.add_task(method, number)
            trials = Trials(run, method, number, folder)
        yield from guarded(trials.run(record), run, record, entry)
        with failure_told(run, record, entry):
            entry, curves, spent = trials.adopt()
            evaluated = seconds["evaluate"]
            now = Training(number, entry, None, torch.Generator(), run.epochs, curves)
            _end(run, method, record, now, clock)
            spent["evaluate"] += seconds["evaluate"] - evaluated
        record.seconds = {k: record.seconds.get(k, 0.0) + spent[k] for k in spent}
        yield None


def _end(run: Run, method: Method, record: RunRecord, now: Training, clock: Clock) -> None:
    """Ends a task and enters it into the record."""
    entry, task = now.entry, run.tasks[now.number]
    entry.peak = metrics.peak_accuracy(entry.valid, entry.test)
    entry.learning_curve_area = metrics.learning_curve_area(entry.test)
    entry.prior = list(method.prior(task.name))
    config = method.end_task(task)
    entry.config = [] if config is None else list(config)
    entry.label = label_of(config)
    with clock.time("evaluate"):
        ended = run.tasks[: now.number + 1]
        row = [accuracy(method, t.name, *t.test) for t in ended]
    record.add(entry, row, now.curves)
    record.parameters = method.kept_parameters()
    record.choices = choices.in_force()
    clock.settle()


def _factory(method: str | MethodFactory, em_options: dict[str, Any]) -> MethodFactory:
    if not isinstance(method, str):
        return method
    if method == "lasem":
        return lambda make_net: Search(LASEM(make_net(), **em_options))

    def static(make_net: Callable[[], TransferNet]) -> Static:
        net = make_net()
        return Static(net, [method == "all"] * net.depth)

    return static


def _name_of(factory: MethodFactory) -> str:
    named = getattr(factory, "name", None) or getattr(factory, "__name__", None)
    return named if isinstance(named, str) else type(factory).__name__


def _not_saved(at_the_end: bool) -> None:
    """What is called after an epoch of a run without a folder."""


def _seeds(seed: int, n: int) -> list[int]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(2**31, (n,), generator=generator).tolist()
