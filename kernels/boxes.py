"""Boxes of pixels, which the tensor copies of sm_90 (TMA) read at once; zeros beyond the border.

A box has a power of two of images, rows and columns. All taps of a convolution read boxes of the
same shape, shifted, so that a program computes no address but a box's corner.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache
from typing import NamedTuple

import torch
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from lasem_fast.kernels.level_geometry import Geometry
from lasem_fast.kernels.level_tiles import MULTIPROCESSORS, Tile, cdiv

DTYPES = (torch.float16, torch.bfloat16)
# What a copy may start at, in bytes; also where every image, row and column begins.
_ALIGNMENT = 16
_RUN = _ALIGNMENT // 2  # channels
# Of the forward and of the gradient of the input: rows are a box's pixels.
TILES = (
    Tile(128, 128, 64, 8, 3),
    Tile(128, 64, 64, 4, 4),
    Tile(128, 32, 64, 4, 4),
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


@cache
def box_for(pixels: int, samples: int, height: int, width: int, least: int = 1) -> Box:
    """The box of so many pixels that covers the images with the fewest boxes; wide ones first.

    Args:
        pixels: a power of two.
        samples, height, width: what is to be covered.
        least: height and width are at least that, a power of two.
    """
    sides = [2**i for i in range(pixels.bit_length())]
    boxes = [
        Box(pixels // (h * w), h, w)
        for w in reversed(sides)
        for h in reversed(sides)
        if h * w <= pixels and min(h, w) >= least
    ]

    def boxes_needed(box: Box) -> int:
        images, rows, columns = box.counts(samples, height, width)
        return images * rows * columns

    return min(boxes, key=boxes_needed)


def cheapest(tiles: Sequence[Tile], programs: Callable[[Tile], int]) -> Tile:
    """The tile whose programs read the least, small images' padding included; the first of equals.

    Fewer programs than there are multiprocessors take as long as one on each of them.
    """
    return min(tiles, key=lambda t: max(programs(t), MULTIPROCESSORS) * (t.rows + t.columns))


def described(tensor: Tensor, block: Sequence[int]) -> TensorDescriptor:
    """A tensor as a kernel copies blocks of it."""
    return TensorDescriptor.from_tensor(tensor, list(block))


def why_not(
    geometry: Geometry, channels: int, channels_out: int, dtype: torch.dtype, has_skip: bool
) -> str:
    """Why a level's products cannot be read in boxes whatever its input's memory, or ""."""
    if dtype not in DTYPES:
        return f"products in {dtype}: boxes are for 16 bits"
    if (geometry.stride_h, geometry.stride_w) != (1, 1):
        return f"stride {(geometry.stride_h, geometry.stride_w)}: boxes are for stride 1"
    if channels % _RUN or channels_out % _RUN:
        return f"{channels} to {channels_out} channels: boxes need multiples of {_RUN}"
    if geometry.pool > 2 and has_skip:
        return f"a skip before a pool of {geometry.pool}"
    return ""


def can_read(x: Tensor) -> bool:
    """Whether a tensor ``[P, N, H, W, C]`` of 16 bits lies so that boxes of it can be copied."""
    runs = all(stride > 0 and stride % _RUN == 0 for stride in x.stride()[:-1])
    return x.stride(-1) == 1 and runs and 0 not in x.shape and x.data_ptr() % _ALIGNMENT == 0
