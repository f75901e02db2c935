"""A level as kernels that read boxes (TMA) compute it, and its filters in that form.

- A linear layer on images becomes one on pixels that hold a whole image.
- A convolution with a stride, or with channels that a copy cannot start at, becomes one of 1 x 1 on
  an input that was unfolded: all that a filter reads side by side, zeros up to a full run.
- Every other level stays what it is.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import prod
from typing import NamedTuple

from torch import Tensor

from lasem_fast.kernels.level_geometry import Geometry

# Channels that a copy can start at: 16 bytes of 2 each.
RUN = 8
# What a copy may start at, in bytes; also where every image, row and column begins.
BOX_ALIGNMENT = 16


class BoxForm(NamedTuple):
    """The sizes that boxes are read by.

    Attributes:
        geometry: of the level, with the stride and padding of what is read.
        x_shape: ``[P, N, H, W, C]`` of what is read.
        kernel: height and width of a filter on it.
        unfolds: whether it has to be made first, see
            :func:`~lasem_fast.kernels.unfolded.unfolded`.
    """

    geometry: Geometry
    x_shape: tuple[int, ...]
    kernel: tuple[int, int]
    unfolds: bool

    @property
    def channels(self) -> int:
        return self.x_shape[-1]


class Filters(NamedTuple):
    """The filters of all branches as boxes of them are read.

    Attributes:
        data: ``[B * Co, KH * KW, C]``, contiguous, of the product's dtype.
        arrivals: zeros, for sums that programs share, see :mod:`lasem_fast.kernels.parts`.
        branches: B.
        kernel: KH and KW.
    """

    data: Tensor
    arrivals: Tensor
    branches: int
    kernel: tuple[int, int]

    @property
    def channels_out(self) -> int:
        return self.data.shape[0] // self.branches

    @property
    def channels(self) -> int:
        return self.data.shape[2]


def box_form(x_shape: Sequence[int], weight_shape: Sequence[int], geometry: Geometry) -> BoxForm:
    """What a level of ``[P, N, H, W, C]`` and ``[Co, C, KH, KW]`` becomes."""
    parents, samples, *image = x_shape
    kernel = tuple(weight_shape[2:])
    if geometry.covers(x_shape, weight_shape):
        return BoxForm(geometry, (parents, samples, 1, 1, prod(image)), (1, 1), False)
    if (geometry.stride_h, geometry.stride_w) == (1, 1) and image[-1] % RUN == 0:
        return BoxForm(geometry, tuple(x_shape), kernel, False)
    line = -(-prod(weight_shape[1:]) // RUN) * RUN
    shape = parents, samples, geometry.conv_h, geometry.conv_w, line
    read = geometry._replace(stride_h=1, stride_w=1, pad_h=0, pad_w=0)
    return BoxForm(read, shape, (1, 1), True)
