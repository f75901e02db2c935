"""Sums that several programs share: each stores a part, and the last to come adds all of them up.

Of many parts the last of every group adds up the group's, and the last of those the groups' sums.
Whoever is last adds in the order of the parts, so that a sum does not depend on who it is. Arrivals
are counted in memory that holds zeros before a launch, and again behind it: for every sum those of
each group's parts, then those of groups.
"""

from __future__ import annotations

from fractions import Fraction
from functools import cache

import triton
import triton.language as tl

from lasem_fast.kernels.level_tiles import MOST_SHARED, MULTIPROCESSORS, cdiv

_COUNTED = tl.constexpr(MOST_SHARED)
_BLOCK = tl.constexpr(triton.next_power_of_2(MOST_SHARED))
# Parts that one program adds up alone; of more, those of a group.
_ALONE, _GROUPS = 8, (4, 8, 16)
# A part of the sum that is worth a program of its own, in steps of a tile's depth.
_STEPS = 4
# Values that are read at once, of as many parts as that takes: one part after another, each would
# wait for memory.
_AT_ONCE = 2**13


def parts_at_once(values: int) -> int:
    """How many parts of so many values are read at once."""
    return max(1, _AT_ONCE // values)


def group_of(parts: int) -> int:
    """How many parts are a group, or 0 where one program adds up all of them."""
    if parts <= _ALONE:
        return 0
    return next((group for group in _GROUPS if group * group >= parts // 2), _GROUPS[-1])


def groups_of(parts: int) -> int:
    """How many sums of groups so many parts have."""
    group = group_of(parts)
    return cdiv(parts, group) if group else 0


@cache
def splits_of(programs: int, steps: int) -> int:
    """In how many parts a sum of so many steps is cut, none of them very short.

    As many as give every multiprocessor two programs, less where that leaves fewer of them idle at
    the end: the busiest one decides.
    """
    most = min(cdiv(MOST_SHARED, programs), steps // _STEPS)
    return min(
        range(max(1, most), 0, -1), key=lambda n: Fraction(cdiv(n * programs, MULTIPROCESSORS), n)
    )


@triton.jit
def nobody_yet(arrivals):
    """Zeros, by one program of a launch before that which counts."""
    at = tl.arange(0, _BLOCK)
    tl.store(arrivals + at, 0, mask=at < _COUNTED)


@triton.jit
def place_in(part, parts, GROUP: tl.constexpr):
    """The group of a part, how many parts that has, and how many groups there are.

    Without groups number 0 of none, which has all parts.
    """
    group = 0
    in_group = parts
    groups = 0
    if GROUP > 0:
        group = part // GROUP
        in_group = tl.minimum(GROUP, parts - group * GROUP)
        groups = tl.cdiv(parts, GROUP)
    return group, in_group, groups


@triton.jit
def is_last(arrivals, count):
    """Whether all others of so many have come to ``arrivals`` before, with what they stored."""
    # The stores of all threads come before the arrival, which releases them to whoever is next.
    tl.debug_barrier()
    last = tl.atomic_add(arrivals, 1, sem="acq_rel", scope="gpu") == count - 1
    if last:
        tl.atomic_add(arrivals, -count, sem="acq_rel", scope="gpu")
    return last


@triton.jit
def added_up(at, keep, parts, size, AT_ONCE: tl.constexpr):
    """The sum over parts, ``size`` values from one to the next, in their order."""
    total = tl.zeros(at.shape, tl.float32)
    for part in range(0, parts, AT_ONCE):
        for i in tl.static_range(AT_ONCE):
            total += tl.load(at + (part + i) * size, mask=keep & (part + i < parts), other=0.0)
    return total


@triton.jit
def few_added_up(at, keep, parts, size, AT_ONCE: tl.constexpr):
    """The same of a line of few values and many parts, always in one order."""
    part = tl.arange(0, AT_ONCE)
    total = tl.zeros((AT_ONCE, at.shape[0]), tl.float32)
    for start in range(0, parts, AT_ONCE):
        read = (start + part < parts)[:, None] & keep[None, :]
        total += tl.load(at[None, :] + ((start + part) * size)[:, None], mask=read, other=0.0)
    return tl.sum(total, axis=0)
