"""The work on an experiment's folder, by any number of processes, on one machine or on several.

A lock per run lets one process at a time work on it, and goes with the process. On a brute-force
search all processes work that have nothing else to do; its trials have locks of their own.
"""

from __future__ import annotations

import json
import time
import traceback
from collections.abc import Callable
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock, ReadWriteLock, Timeout

from lasem_fast.experiments import results
from lasem_fast.experiments.curves import curve_writer
from lasem_fast.experiments.experiment import Experiment, Unit
from lasem_fast.lifelong import Progress, train_sequence
from lasem_fast.lifelong.checkpoints import write_text

_TELL_EVERY = 0.3  # seconds


def work(plain: dict[str, Any], out: str) -> None:
    """Works on all runs of a config that are left, and waits for those that others work on."""
    experiment = Experiment.of(plain, Path(out))
    torch.set_num_threads(experiment.config.threads)
    _import_all()
    failed: set[Path] = set()
    # what is free, then together what is shared out, then what another one had and may have left
    for shared, wait in ((False, False), (True, False), (False, True)):
        for unit in experiment.units():
            if unit.finished and unit.state.exists():
                _tidy(unit)
            if unit.shared != shared or unit.finished or unit.folder in failed:
                continue
            if not _done(experiment, unit, wait):
                failed.add(unit.folder)


def _import_all() -> None:
    """A process's first optimiser step imports for seconds, which no run's times should hold."""
    weight = torch.zeros(1, requires_grad=True)
    weight.sum().backward()
    torch.optim.SGD([weight], lr=0.0).step()


def _done(experiment: Experiment, unit: Unit, wait: bool) -> bool:
    """Works on a run if it is free, or waits for it; False if it failed."""
    unit.lock.parent.mkdir(parents=True, exist_ok=True)
    try:
        if unit.shared:
            _take_part(experiment, unit)
            return True
        with FileLock(unit.lock).acquire(timeout=-1 if wait else 0):
            if not unit.finished:
                _train(experiment, unit)
            results.remove_state(unit)
    except Timeout:
        return True
    except Exception as error:  # of a method, of its making or of its data: the others go on
        write_text(unit.folder / "error.txt", "".join(traceback.format_exception(error)))
        return False
    return True


def _tidy(unit: Unit) -> None:
    """Removes the state of a finished run whose worker was killed before it did so."""
    unit.lock.parent.mkdir(parents=True, exist_ok=True)
    with suppress(Timeout), ExitStack() as stack:  # while another one works on it, it stays
        if unit.shared:
            lock = ReadWriteLock(f"{unit.lock}.shared")
            stack.enter_context(lock.write_lock(timeout=0))
        else:
            stack.enter_context(FileLock(unit.lock).acquire(timeout=0))
        results.remove_state(unit)


def _take_part(experiment: Experiment, unit: Unit) -> None:
    """Works on a run together with others; the last to leave removes its state."""
    lock = ReadWriteLock(f"{unit.lock}.shared")
    with lock.read_lock():
        if not unit.finished:  # looked at under the lock: the state is there as long as it is held
            _train(experiment, unit)
    with suppress(Timeout), lock.write_lock(timeout=0):  # while another one reads, it stays
        results.remove_state(unit)


def _train(experiment: Experiment, unit: Unit) -> None:
    with ExitStack() as stack:
        tell = [_progress_file(unit)]
        if experiment.config.tensorboard and not unit.shared:
            tell.append(stack.enter_context(curve_writer(unit.folder / "tensorboard")))

        def on_epoch(now: Progress) -> None:
            for told in tell:
                told(now)

        record = train_sequence(
            **experiment.arguments(unit),
            folder=unit.state,
            save_every=experiment.config.save_every,
            on_epoch=on_epoch,
        )
    with FileLock(f"{unit.lock}.result"):
        if not unit.finished:
            results.write_run(experiment, unit, record)


def _progress_file(unit: Unit) -> Callable[[Progress], None]:
    """Notes where a run stands, for whoever shows it."""
    last = [0.0]

    def tell(now: Progress) -> None:
        if unit.shared or time.monotonic() - last[0] < _TELL_EVERY:
            return
        last[0] = time.monotonic()
        done = (now.task_number - 1) * now.epochs + now.epoch
        where = f"task {now.task_number}/{now.n_tasks} epoch {now.epoch}/{now.epochs} {now.label}"
        told = {"fraction": done / (now.n_tasks * now.epochs), "where": where.strip()}
        write_text(unit.state / "progress.json", json.dumps(told))

    return tell
