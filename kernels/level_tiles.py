"""Block sizes of the level kernels: the candidates, and which of them a shape takes by default."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple


class Tile(NamedTuple):
    """Block sizes of one matrix product, and how it is run.

    Attributes:
        rows, columns: of the output that one program computes.
        depth: how much of the sum one step takes.
        warps: at most 4 where a step computes addresses and masks, because such loops over taps
            have been miscompiled with 8 (pytorch#173068).
        stages: of the software pipeline.
    """

    rows: int
    columns: int
    depth: int
    warps: int
    stages: int

    @property
    def accumulators(self) -> int:
        """How many output values a thread holds."""
        return self.rows * self.columns // (32 * self.warps)

    def programs(self, rows: int, columns: int) -> int:
        """How many programs cover a ``rows`` by ``columns`` output."""
        return cdiv(rows, self.rows) * cdiv(columns, self.columns)


# Of float32 products without tensor cores, forward and to the input.
FMA_TILES = (Tile(32, 32, 16, 4, 2), Tile(16, 16, 16, 2, 2))
# As many programs as fill a large GPU once.
PROGRAMS = 128
# Of an H100 or H200. Not read from the device: the order of a sum is a rule of its shape.
MULTIPROCESSORS = 132
# Sums that programs of one launch can share: with more of them no multiprocessor is idle anyway.
MOST_SHARED = 2 * MULTIPROCESSORS


def cdiv(a: int, b: int) -> int:
    """a / b, rounded up."""
    return -(-a // b)


def fitting(table: Sequence[Tile], rows: int, columns: int, depth: int) -> list[Tile]:
    """The tiles that are less than twice as large as a product, in table order, or the smallest."""
    tiles = [t for t in table if t.rows < 2 * rows and t.columns < 2 * columns]
    tiles = [t for t in tiles if t.depth < 2 * depth] or tiles
    return tiles or [min(table, key=lambda t: (t.rows * t.columns, t.depth))]


def default(tiles: Sequence[Tile], rows: int, columns: int) -> Tile:
    """The first tile that fills the GPU, else the one with the most programs."""
    for tile in tiles:
        if tile.programs(rows, columns) >= PROGRAMS:
            return tile
    return max(tiles, key=lambda t: t.programs(rows, columns))
