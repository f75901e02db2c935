"""The rows of a level: any list of pairs (parent, branch), and the tables that kernels read.

A launch does not depend on its list: programs look rows up in tables that are made once per list
and device, and stay there.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from typing import NamedTuple

import torch
from torch import Tensor

NOBODY = -1


@dataclass(frozen=True)
class Rows:
    """A level's rows in the order of its output.

    Attributes:
        parents: for each row, the parent that it reads.
        branches: for each row, the branch that it takes; with the parent, no pair comes twice.
        width: number of parents P; some may have no row.
        skips: for each row, the row of the skip that is added to it; empty without a skip.
        skip_width: number of rows S of the skip.
    """

    parents: tuple[int, ...]
    branches: tuple[int, ...]
    width: int
    skips: tuple[int, ...] = ()
    skip_width: int = 0

    def __post_init__(self) -> None:
        # lists of hundreds of rows are looked up several times per level
        numbers = self.parents, self.branches, self.width, self.skips, self.skip_width
        object.__setattr__(self, "_hash", hash(numbers))

    def __hash__(self) -> int:
        return self._hash

    @classmethod
    def full(cls, width: int, branches: int) -> Rows:
        """Every one of ``width`` parents through every branch, branch innermost."""
        return _full(width, branches)

    def __len__(self) -> int:
        return len(self.parents)

    def joined(self) -> Rows:
        """The list with runs of neighbours taken for one row each, as long as all of them can be.

        A run's rows go through one branch, and their parents are neighbours too, and their skip
        rows: samples of all of them, one after another, are a row of more samples.
        """
        return _joined(self)

    @property
    def skips_in_order(self) -> bool:
        """Whether every row has a skip row of its own, and that is its own number."""
        return self.skip_width == len(self) and self.skips == tuple(range(len(self)))


class Tables(NamedTuple):
    """What kernels read of a list, int32.

    Attributes:
        by_branch: ``[R, 3]``, rows of branch 0 before those of branch 1: row, parent, skip row.
        by_parent: ``[P, 1 + B]``, parents with the same branches side by side: parent, and its row
            in each branch or NOBODY.
        by_skip: ``[S, K]``: the rows that a skip row is added to, up to K, then NOBODY.
        counts: rows of each branch, on the host.
    """

    by_branch: Tensor
    by_parent: Tensor
    by_skip: Tensor
    counts: tuple[int, ...]


def tables_of(rows: Rows, branches: int, device: torch.device) -> Tables:
    """The tables of a list of rows that go through some of ``branches``.

    They are made once and kept for good: making one waits for the device, which a CUDA graph does
    not allow, and a graph goes on reading it.

    Raises:
        ValueError: rows that name a parent, branch or skip row that is not there, or a pair twice.
    """
    if torch.compiler.is_compiling():
        return _tables(rows, branches, device)
    return _kept_tables(rows, branches, device)


def in_rows(tensor: Tensor, rows: int) -> Tensor:
    """``[R, N, ...]`` with rows put together to fewer of more samples, or taken apart again."""
    if tensor.shape[0] == rows:
        return tensor
    samples = tensor.shape[0] * tensor.shape[1] // rows
    return tensor.view(rows, samples, *tensor.shape[2:])


@cache
def _joined(rows: Rows) -> Rows:
    count = len(rows)
    for run in range(count, 1, -1):
        if count % run or rows.width % run or rows.skip_width % run:
            continue
        starts = range(0, count, run)
        if (
            all(len({*rows.branches[i : i + run]}) == 1 for i in starts)
            and _in_runs(rows.parents, run)
            and _in_runs(rows.skips, run)
        ):
            return Rows(
                tuple(rows.parents[i] // run for i in starts),
                tuple(rows.branches[i] for i in starts),
                rows.width // run,
                tuple(rows.skips[i] // run for i in starts if rows.skips),
                rows.skip_width // run,
            )
    return rows


def _in_runs(numbers: Sequence[int], run: int) -> bool:
    return all(
        numbers[i] % run == 0 and numbers[i : i + run] == tuple(range(numbers[i], numbers[i] + run))
        for i in range(0, len(numbers), run)
    )


@cache
def _full(width: int, branches: int) -> Rows:
    pairs = [(p, b) for p in range(width) for b in range(branches)]
    return Rows(tuple(p for p, _ in pairs), tuple(b for _, b in pairs), width)


@cache
def _kept_tables(rows: Rows, branches: int, device: torch.device) -> Tables:
    with torch.inference_mode(False):
        return _tables(rows, branches, device)


def _tables(rows: Rows, branches: int, device: torch.device) -> Tables:
    _check(rows, branches)
    numbers = range(len(rows))
    skips = rows.skips or (0,) * len(rows)
    order = sorted(numbers, key=lambda row: rows.branches[row])
    by_branch = [[row, rows.parents[row], skips[row]] for row in order]
    of_parent = [[NOBODY] * branches for _ in range(rows.width)]
    for row in numbers:
        of_parent[rows.parents[row]][rows.branches[row]] = row
    # programs leave out a branch that none of their parents goes through
    alike = sorted(range(rows.width), key=lambda p: [row == NOBODY for row in of_parent[p]])
    by_parent = [[parent, *of_parent[parent]] for parent in alike]
    of_skip = [[] for _ in range(rows.skip_width)]
    for row, skip in enumerate(rows.skips):
        of_skip[skip].append(row)
    most = max([0, *map(len, of_skip)])
    by_skip = [shared + [NOBODY] * (most - len(shared)) for shared in of_skip]

    def table(entries: list[list[int]], columns: int) -> Tensor:
        return torch.tensor(entries, dtype=torch.int32, device=device).view(len(entries), columns)

    counts = tuple(rows.branches.count(b) for b in range(branches))
    return Tables(table(by_branch, 3), table(by_parent, 1 + branches), table(by_skip, most), counts)


def _check(rows: Rows, branches: int) -> None:
    count = len(rows)
    if len(rows.branches) != count:
        raise ValueError(f"rows: expected a branch for each of {count} parents, "
                         f"got {len(rows.branches)} branches")  # fmt: skip
    if rows.skips and len(rows.skips) != count:
        raise ValueError(f"rows: expected a skip row for each of {count} rows, "
                         f"got {len(rows.skips)}")  # fmt: skip
    named = [
        ("parents", rows.parents, rows.width),
        ("branches", rows.branches, branches),
        ("skips", rows.skips, rows.skip_width),
    ]
    for name, values, limit in named:
        wrong = [value for value in values if not 0 <= value < limit]
        if wrong:
            raise ValueError(f"rows: expected {name} from 0 to {limit - 1}, got {wrong[0]}")
    if len(set(zip(rows.parents, rows.branches, strict=True))) != count:
        raise ValueError("rows: expected no pair of parent and branch twice, got one that is")
