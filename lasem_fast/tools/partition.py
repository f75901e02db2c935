"""Which stages to bind into groups, so that a search fits a budget.

A stage of the k-th group has 2^k rows: stages in late groups are doubled most often, so the best
partitions put few and cheap stages there.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from itertools import combinations, pairwise
from typing import NamedTuple

from lasem_fast.tools.calibration import StageTime

_MOST_PARTITIONS = 1_000_000
_MOST_TRIES = 20


class Partition(NamedTuple):
    """Groups of consecutive stages.

    Attributes:
        sizes: of the groups, first group first.
        seconds: predicted time of a step.
        peak: predicted peak memory of a step, in bytes.
    """

    sizes: tuple[int, ...]
    seconds: float
    peak: int


def best_partition(
    times: Sequence[StageTime],
    held: Sequence[int],
    groups: int,
    peak_of: Callable[[tuple[int, ...]], int],
    *,
    max_seconds: float = math.inf,
    max_memory: float = math.inf,
) -> Partition | None:
    """The fastest partition into ``groups`` groups within the budget; None if there is none.

    Args:
        times: of each stage and, last, of the head.
        held: bytes that one row of each stage adds to the step's memory, about.
        groups: number of groups.
        peak_of: the peak memory of given group sizes, in bytes; called for the few best.
        max_seconds: per step.
        max_memory: bytes of peak memory.

    Raises:
        ValueError: there are too many partitions to look at all of them.
    """
    depth = len(times) - 1
    if math.comb(depth - 1, groups - 1) > _MOST_PARTITIONS:
        raise ValueError(
            f"groups: expected at most {_MOST_PARTITIONS} partitions of {depth} stages, got "
            f"{math.comb(depth - 1, groups - 1)} into {groups} groups"
        )
    timed = sorted((_seconds(times, sizes), sizes) for sizes in partitions(depth, groups))
    tries = 0
    for seconds, sizes in timed:
        if seconds > max_seconds or tries == _MOST_TRIES:
            return None
        if sum(b * r for b, r in zip(held, rows_of(sizes), strict=True)) > max_memory:
            continue
        tries += 1
        peak = peak_of(sizes)
        if peak <= max_memory:
            return Partition(sizes, seconds, peak)
    return None


def partitions(depth: int, groups: int) -> Iterator[tuple[int, ...]]:
    """All ways to cut ``depth`` stages into ``groups`` runs, as sizes."""
    for cuts in combinations(range(1, depth), groups - 1):
        edges = (0, *cuts, depth)
        yield tuple(b - a for a, b in pairwise(edges))


def rows_of(sizes: Sequence[int]) -> list[int]:
    """For each stage the number of rows of its level."""
    return [2 ** (k + 1) for k, size in enumerate(sizes) for _ in range(size)]


def _seconds(times: Sequence[StageTime], sizes: Sequence[int]) -> float:
    rows = rows_of(sizes)
    return sum(t.seconds(r) for t, r in zip(times, [*rows, rows[-1]], strict=True))
