"""Trials: a task trained once in each of several configurations, by any number of processes.

A trial leaves two files in the run's folder: what its module ended with, and after it, as JSON, how
it went, which is the sign that it is done. A lock per trial keeps two processes from one and the
same trial; it goes with the process that holds it. All processes adopt the same trial, because they
choose by the same files.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock, Timeout
from torch import nn

from lasem_fast.configs import Configuration
from lasem_fast.lifelong import checkpoints
from lasem_fast.lifelong.clock import Clock
from lasem_fast.lifelong.method import TryingMethod
from lasem_fast.lifelong.records import RunRecord, TaskRecord
from lasem_fast.lifelong.training import Progress, Run, Saver, label_of, restored, train

_WAIT = 0.2  # seconds between two looks at the trials of other processes


class Trials:
    """The trials of one task.

    Args:
        run: what all tasks have in common.
        method: at the start of the task, which has been added.
        number: of the task, from 0.
        folder: where the trials' files are.
    """

    def __init__(self, run: Run, method: TryingMethod, number: int, folder: Path) -> None:
        self._run, self._method, self._number, self._folder = run, method, number, folder
        self._task = run.tasks[number]
        self._candidates: Sequence[Configuration] = method.candidates(self._task)
        self._start = _copied(checkpoints.module_state(method.module))

    def run(self, record: RunRecord) -> Iterator[Progress]:
        """Makes all trials that are left, or waits for those that other processes make."""
        while left := [c for c in self._candidates if not self._result(c).exists()]:
            made = 0
            for candidate in left:
                try:
                    with FileLock(self._path(candidate, ".lock")).acquire(timeout=0):
                        if not self._result(candidate).exists():
                            yield from self._trial(candidate, record)
                        made += 1
                except Timeout:
                    continue
            if not made:
                try:
                    with FileLock(self._path(left[0], ".lock")).acquire(timeout=_WAIT):
                        pass
                except Timeout:
                    continue

    def _trial(self, candidate: Configuration, record: RunRecord) -> Iterator[Progress]:
        run, method = self._run, self._method
        now = run.training(self._number, self._set_up(candidate))
        seconds: dict[str, float] = {}
        unfinished = self._path(candidate, ".partial.pt")
        state = checkpoints.read_state(unfinished, run.identity)
        if state is not None:
            seconds.update(restored(run, method, now, state)["seconds"])
        clock = Clock(seconds, run.device)
        save = Saver(unfinished, run, method, now, clock, record)
        where = {"trial": 1 + self._candidates.index(candidate), "trials": len(self._candidates)}
        for progress in train(run, method, now, clock, save):
            yield replace(progress, label=label_of(candidate), **where)
        clock.settle()
        result = {"entry": asdict(now.entry), "curves": now.curves, "seconds": seconds}
        weights = {
            "format": checkpoints.FORMAT,
            "identity": run.identity,
            "module": checkpoints.module_state(method.module),
            "random": checkpoints.random_state(now.batches, run.device),
        }
        checkpoints.write_state(self._path(candidate, ".pt"), weights)
        checkpoints.write_text(self._result(candidate), json.dumps(result))
        unfinished.unlink(missing_ok=True)

    def adopt(self) -> tuple[TaskRecord, list[dict[str, Any]], dict[str, float]]:
        """Goes on with the best trial; gives its record, its curves and the times of all."""
        results = [json.loads(self._result(c).read_text()) for c in self._candidates]
        scores = [max(result["entry"]["valid"]) for result in results]
        best = scores.index(max(scores))
        chosen = self._candidates[best]
        path = self._path(chosen, ".pt")
        state = checkpoints.read_state(path, self._run.identity)
        if state is None:
            raise FileNotFoundError(f"folder: expected the weights of a trial in {path}, got none")
        self._set_up(chosen)
        checkpoints.load_module_state(self._method.module, state["module"])
        checkpoints.load_random_state(state["random"], torch.Generator(), self._run.device)
        for candidate in self._candidates:
            if candidate != chosen:
                self._path(candidate, ".pt").unlink(missing_ok=True)
        entry = TaskRecord(**results[best]["entry"])
        entry.trials = [
            _summary(candidate, result["entry"])
            for candidate, result in zip(self._candidates, results, strict=True)
        ]
        phases = results[0]["seconds"]
        seconds = {phase: sum(result["seconds"][phase] for result in results) for phase in phases}
        return entry, results[best]["curves"], seconds

    def _set_up(self, candidate: Configuration) -> list[nn.Parameter]:
        checkpoints.load_module_state(self._method.module, self._start)
        torch.manual_seed(self._run.seeds[1 + self._number])  # trials do not depend on their order
        return self._method.try_out(self._task, candidate)

    def _result(self, candidate: Configuration) -> Path:
        return self._path(candidate, ".json")

    def _path(self, candidate: Configuration, suffix: str) -> Path:
        bits = "".join("1" if bit else "0" for bit in candidate)
        return self._folder / f"task{self._number + 1}-{bits}{suffix}"


def _summary(candidate: Configuration, entry: dict[str, Any]) -> dict[str, Any]:
    epoch = entry["valid"].index(max(entry["valid"]))
    return {
        "label": label_of(candidate),
        "config": list(candidate),
        "valid": entry["valid"][epoch],
        "peak": entry["test"][epoch],
    }


def _copied(state: dict[str, Any]) -> dict[str, Any]:
    """The state with tensors of its own, which training does not change."""
    weights = {
        name: value.detach().clone() if hasattr(value, "detach") else value
        for name, value in state["weights"].items()
    }
    return {**state, "weights": weights}
