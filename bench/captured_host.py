"""The host's own work in a call of a captured step, on a CPU with a graph that does nothing.

    python -m bench.captured_host [--calls N]

Microseconds per call: the smallest of many, because other processes only add to it. On a GPU the
copies and the replay cost their launches on top.
"""

from __future__ import annotations

import argparse
import sys
import time
import warnings
from collections.abc import Callable
from unittest import mock

import torch

import lasem_fast as lf
from bench.cases import TASK, Case
from lasem_fast.capture import CapturedStep

_TOGETHER = 10
_ROWS = [Case("cifar-4", 10), Case("residual-17", 10, groups=(1,) * 8)]


class _Graph:
    """Stands in for a CUDA graph."""

    def replay(self) -> None:
        pass


def _no_index() -> None:
    """The current device's index, as ``torch.device("cpu")`` has it; a mock would be too slow."""


def captured_step(case: Case) -> tuple[CapturedStep, Callable[[], object]]:
    """A step that believes to have a graph, and one call of it."""
    problem = case.problem()
    em = lf.LASEM(problem.net, problem.space, backend="torch")
    optimizer = torch.optim.Adam(problem.net.task_parameters(TASK), lr=1e-3, foreach=True)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)  # no GPU: it would run eagerly
        step = lf.capture(em, optimizer, problem.x, problem.y, TASK)
    step.why_eager = None
    step._result = step.eager(problem.x, problem.y)
    trained = [p for p in problem.net.parameters() if p.grad is not None]
    step._grads = trained, [p.grad for p in trained]
    step._graph, step._recorded = _Graph(), step._taken_in()
    step._holds.remember()
    return step, lambda: step(problem.x, problem.y)


def microseconds(step: CapturedStep, work: Callable[[], object], calls: int) -> float:
    """Of one call of ``work``."""
    best = float("inf")
    for _ in range(calls):
        step._holds.remember()
        start = time.perf_counter_ns()
        for _ in range(_TOGETHER):
            work()
        best = min(best, (time.perf_counter_ns() - start) / _TOGETHER)
    return 1e-3 * best


def main(arguments: list[str] | None = None) -> None:
    """Prints a line per row."""
    parser = argparse.ArgumentParser(prog="python -m bench.captured_host", description=__doc__)
    parser.add_argument("--calls", type=int, default=1000, help="rounds of ten calls (1000)")
    calls = parser.parse_args(arguments).calls
    print(f"{'us per call':34} {'all':>7} {'copies':>7} {'quick check':>12} {'full check':>11}")
    with (
        mock.patch.object(torch.cuda, "current_device", _no_index),
    ):
        for case in _ROWS:
            step, call = captured_step(case)
            x, y = step._x.clone(), step._y.clone()
            parts = [
                call,
                lambda step=step, x=x, y=y: torch._foreach_copy_([step._x, step._y], [x, y]),
                step._holds.seem_the_same,
                step._taken_in,
            ]
            times = [microseconds(step, part, calls) for part in parts]
            columns = zip(times, (7, 7, 12, 11), strict=True)
            print(f"{case.id:34} " + " ".join(f"{t:{width}.1f}" for t, width in columns))


if __name__ == "__main__":
    main(sys.argv[1:])
