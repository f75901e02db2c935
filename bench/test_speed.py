"""One test per row and column. The times come from :mod:`bench.race`, one round for all columns.

pytest-benchmark measures a replay of the race on a clock of its own, which makes its statistics and
its file those of the race.
"""

from __future__ import annotations

import pytest

from bench.record import extra_info


class RaceClock:
    """Time that moves only when it is told to."""

    now = 0.0

    def __call__(self) -> float:
        return self.now

    def advance(self, seconds: float) -> None:
        self.now += seconds


CLOCK = RaceClock()


@pytest.mark.benchmark(timer=CLOCK, disable_gc=False)
def test_step(benchmark, case, column, lane, peaks):
    """One training step without the optimiser: forward, posterior, backward."""
    benchmark.group = case.id
    if lane.refused:
        pytest.fail(lane.refused, pytrace=False)
    recorded = iter(lane.seconds)
    benchmark.pedantic(lambda: CLOCK.advance(next(recorded)), rounds=len(lane.seconds))
    benchmark.extra_info.update(extra_info(case, column, lane, peaks))
