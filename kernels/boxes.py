"""Boxes of pixels, which the tensor copies of sm_90 (TMA) read at once; zeros beyond the border.

A box has a power of two of images, rows and columns. All taps of a convolution read boxes of the
same shape, shifted, so that a program computes no address but a box's corner.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from math import ceil, prod
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from lasem_fast.kernels.box_form import BOX_ALIGNMENT, RUN
from lasem_fast.kernels.kept import kept
from lasem_fast.kernels.level_geometry import Geometry
from lasem_fast.kernels.level_tiles import MULTIPROCESSORS, Tile, cdiv, fitting

DTYPES = (torch.float16, torch.bfloat16)
# From the times of every tile on the benchmark's levels on an H100 (bench.tile_times): nanoseconds
# until a step's boxes are there, and more for each of their bytes; bytes that a multiprocessor
# reads in one; and programs that it runs at a time.
_LATENCY, _PER_BYTE, _READ, _RESIDENT = 100.0, 0.007, 75.0, 2
# Nanoseconds that adding up takes for each byte of the parts.
ADDING = 0.0006
# How many times fewer reads make up for pixels that do not lie side by side.
_WORTH_NARROW_BOXES = 8 / 7
# Of the forward and of the gradient of the input: rows are a box's pixels.
TILES = (
    Tile(128, 128, 64, 8, 3),
    Tile(128, 64, 64, 4, 4),
    Tile(128, 32, 64, 4, 4),
    Tile(64, 64, 128, 4, 4),
    Tile(64, 64, 64, 4, 4),
    Tile(64, 32, 64, 4, 4),
    Tile(128, 64, 32, 4, 4),
    Tile(128, 32, 32, 4, 4),
    Tile(64, 32, 32, 4, 4),
    Tile(64, 16, 16, 4, 4),
)


class Box(NamedTuple):
    """Sides of a box, powers of two."""

    images: int
    height: int
    width: int

    @property
    def pixels(self) -> int:
        return self.images * self.height * self.width

    def counts(self, samples: int, height: int, width: int) -> tuple[int, int, int]:
        """How many boxes cover so many images of that size, in each direction."""
        sizes = zip((samples, height, width), self, strict=True)
        images, rows, columns = (cdiv(size, side) for size, side in sizes)
        return images, rows, columns


class Taps(NamedTuple):
    """Along one side of an image: which taps of a convolution meet it at all.

    Attributes:
        kernel: how many taps there are.
        shift: what tap 0 reads beside pixel 0: a box from pixel i on reads through tap t from
            i + shift + t on.
        size: of what is read.
    """

    kernel: int = 1
    shift: int = 0
    size: int = 1

    def met(self, begin: int, side: int) -> int:
        """How many taps of a box of ``side`` pixels from ``begin`` on read anything but zeros."""
        first = max(0, 1 - side - begin - self.shift)
        return max(0, min(self.kernel, self.size - begin - self.shift) - first)

    def of_boxes(self, begin: int, side: int, count: int) -> int:
        """The same for ``count`` boxes side by side, added up."""
        return sum(self.met(begin + i * side, side) for i in range(count))


class Convolution(NamedTuple):
    """The taps that boxes of a convolution's pixels read through.

    Attributes:
        down, across: along both sides.
        begin: of the first box, in both directions.
    """

    down: Taps
    across: Taps
    begin: int = 0


@kept
def box_for(
    pixels: int, samples: int, height: int, width: int, least: int = 1,
    convolution: Convolution | None = None,
) -> Box:  # fmt: skip
    """The box of so many pixels that reads the least; wide ones first.

    Args:
        pixels: a power of two.
        samples, height, width: what is to be covered.
        least: height and width are at least that, a power of two.
        convolution: how boxes are read: through taps that meet only zeros they are not. None: once.
    """
    sides = [2**i for i in range(pixels.bit_length())]
    boxes = [
        Box(pixels // (h * w), h, w)
        for w in reversed(sides)
        for h in reversed(sides)
        if h * w <= pixels and min(h, w) >= least
    ]

    def fewest(convolution: Convolution | None) -> Box:
        return min(boxes, key=lambda box: reads(box, samples, height, width, convolution))

    plain, best = fewest(None), fewest(convolution)
    before, after = (reads(box, samples, height, width, convolution) for box in (plain, best))
    return best if after * _WORTH_NARROW_BOXES <= before else plain


def reads(
    box: Box, samples: int, height: int, width: int, convolution: Convolution | None = None
) -> int:
    """How many boxes are read in all, see :func:`box_for`."""
    images, rows, columns = box.counts(samples, height, width)
    if convolution is None:
        return images * rows * columns
    down, across, begin = convolution
    return (
        images * down.of_boxes(begin, box.height, rows) * across.of_boxes(begin, box.width, columns)
    )


@triton.jit
def met_taps(begin, SIDE: tl.constexpr, KERNEL: tl.constexpr, SHIFT: tl.constexpr,
             SIZE: tl.constexpr):  # fmt: skip
    """The first and the number of the taps that :class:`Taps` says a box meets."""
    first = tl.maximum(0, 1 - SIDE - begin - SHIFT)
    return first, tl.maximum(0, tl.minimum(KERNEL, SIZE - begin - SHIFT) - first)


class Work(NamedTuple):
    """What a launch has to do with one tile.

    Attributes:
        programs: how many there are.
        steps: that one of them takes, on average.
        bytes: that a step reads.
        besides: nanoseconds of what follows.
    """

    programs: int
    steps: float
    bytes: int
    besides: float = 0.0

    @property
    def time(self) -> float:
        """Nanoseconds, padding included: of waiting for boxes, or of reading them."""
        together = self.programs / MULTIPROCESSORS
        waits = (_LATENCY + _PER_BYTE * self.bytes) * cdiv(ceil(together), _RESIDENT)
        return self.steps * max(waits, together * self.bytes / _READ) + self.besides


def cheapest(tiles: Sequence[Tile], work: Callable[[Tile], Work]) -> Tile:
    """The tile that should take the least time; the first of equals."""
    return min(tiles, key=lambda tile: work(tile).time)


def work_of(
    tile: Tile, box: Box, rows: int, size: tuple[int, int, int], columns: int, channels: int,
    convolution: Convolution, sums: int = 1,
) -> Work:  # fmt: skip
    """What a product on boxes has to do with a tile and its box, see :func:`tiled`."""
    boxes = prod(box.counts(*size))
    taps = reads(box, *size, convolution=convolution) / boxes
    return Work(
        programs=rows * boxes * cdiv(columns, tile.columns),
        steps=taps * sums * cdiv(channels, tile.depth),
        bytes=2 * (tile.rows + tile.columns) * tile.depth,
    )


@kept
def tiled(
    rows: int, size: tuple[int, int, int], columns: int, channels: int, convolution: Convolution,
    sums: int = 1, least: int = 1, tile: Tile | None = None,
) -> tuple[Tile, Box, bool]:  # fmt: skip
    """The tile of a product on boxes, its box, and whether all boxes are read through all taps.

    Args:
        rows: how many times ``size`` (samples, height, width) there is.
        columns, channels: of the product, and of one tap's sum.
        convolution: how boxes are read.
        sums: how many convolutions are added up.
        least: of a box's height and width.
        tile: the one to take; None: the cheapest.
    """
    every = convolution.down.kernel * convolution.across.kernel

    def box_of(tile: Tile) -> Box:
        return box_for(tile.rows, *size, least=least, convolution=convolution)

    def work(tile: Tile) -> Work:
        return work_of(tile, box_of(tile), rows, size, columns, channels, convolution, sums)

    tiles = fitting(TILES, rows * prod(size), columns, channels)
    tile = tile or cheapest(tiles, work)
    box = box_of(tile)
    met = reads(box, *size, convolution=convolution)
    return tile, box, met == prod(box.counts(*size)) * every


def why_not(
    geometry: Geometry, channels: int, channels_out: int, dtype: torch.dtype, has_skip: bool
) -> str:
    """Why a level's products cannot be read in boxes whatever its input's memory, or "".

    Args:
        geometry, channels: of what is read, see :class:`~lasem_fast.kernels.box_form.BoxForm`.
        channels_out: of the level.
        dtype: of the products.
        has_skip: whether a skip is added.
    """
    if dtype not in DTYPES:
        return f"products in {dtype}: boxes are for 16 bits"
    if channels % RUN or channels_out % RUN:
        return f"{channels} to {channels_out} channels: boxes need multiples of {RUN}"
    if geometry.pool > 2 and has_skip:
        return f"a skip before a pool of {geometry.pool}"
    return ""


def can_read(x: Tensor) -> bool:
    """Whether a tensor ``[P, N, H, W, C]`` of 16 bits lies so that boxes of it can be copied."""
    runs = all(stride > 0 and stride % RUN == 0 for stride in x.stride()[:-1])
    return x.stride(-1) == 1 and runs and 0 not in x.shape and x.data_ptr() % BOX_ALIGNMENT == 0
