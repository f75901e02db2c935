"""One test per row and column. The times come from :mod:`bench.race`, one round for all columns.

pytest-benchmark measures a replay of the race on a clock of its own, which makes its statistics and
its file those of the race.
"""

from __future__ import annotations

from functools import lru_cache

import pytest

from bench.cases import TASK, Case
from lasem_fast.tools.costs import StepCost, step_cost


class RaceClock:
    """Time that moves only when it is told to."""

    now = 0.0

    def __call__(self) -> float:
        return self.now

    def advance(self, seconds: float) -> None:
        self.now += seconds


CLOCK = RaceClock()


@lru_cache
def _cost(case: Case) -> StepCost:
    problem = case.problem()
    return step_cost(problem.net, TASK, problem.space, problem.x[0].cpu(), case.batch)


@pytest.mark.benchmark(timer=CLOCK, disable_gc=False)
def test_step(benchmark, case, column, lane, peaks):
    """One training step without the optimiser: forward, posterior, backward."""
    benchmark.group = case.id
    if lane.refused:
        pytest.fail(lane.refused, pytrace=False)
    recorded = iter(lane.seconds)
    benchmark.pedantic(lambda: CLOCK.advance(next(recorded)), rounds=len(lane.seconds))
    cost = _cost(case)
    flops = cost.flops if column.all_configurations else cost.base_flops
    peak = max(p for name, p in peaks.items() if p and name.endswith(case.dtype))
    benchmark.extra_info.update(
        row=case.id,
        net=case.net,
        batch=case.batch,
        dtype=case.dtype,
        device=case.device,
        choices=len(case.groups) if case.groups else len(cost.levels) - 1,
        column=column.name,
        seconds=lane.seconds,
        first_step=lane.first_step,
        peak_memory=lane.peak_memory,
        errors=lane.errors,
        tree_flops=cost.flops,
        # Of the work that the tree needs, whatever the column does: how close it is to the floor.
        fraction_of_peak=flops / sorted(lane.seconds)[len(lane.seconds) // 2] / peak,
    )
