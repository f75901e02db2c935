"""The sizes of one level: convolution, ReLU, sum with a skip, ReLU and max-pool."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from lasem_fast.kernels.level_rows import Tables
from lasem_fast.kernels.level_tiles import MOST_SHARED

# The code of an output is the window position that won; CLOSED says that no gradient passes it,
# SHUT is added where the convolution's own ReLU is closed and only the skip gets the gradient.
CLOSED = 255
SHUT = 16


class Geometry(NamedTuple):
    """What a level does besides its weights. A linear layer is a kernel as large as its image.

    Attributes:
        stride_h, stride_w: of the convolution.
        pad_h, pad_w: rows and columns of zeros before the image.
        conv_h, conv_w: the convolution's output size, which says what padding follows the image.
        pool: window and stride of the max-pool; 1 is none.
        pool_pad: padding before the first window, at most ``pool // 2``; never wins.
        out_h, out_w: the pooled size; windows are clipped at the border.
        relu: 1 where a ReLU comes behind the convolution, before or behind the pool, else 0; before
            the sum where there is a skip.
        relu_after: 1 where a ReLU comes behind the sum with a skip, else 0.
    """

    stride_h: int
    stride_w: int
    pad_h: int
    pad_w: int
    conv_h: int
    conv_w: int
    pool: int
    pool_pad: int
    out_h: int
    out_w: int
    relu: int
    relu_after: int = 0

    @property
    def has_code(self) -> bool:
        """Whether the backward to the convolution needs a code."""
        return bool(self.relu or self.relu_after) or self.pool > 1

    @property
    def skip_has_code(self) -> bool:
        """Whether the backward to the skip does: a ReLU before the sum is nothing to it."""
        return bool(self.relu_after) or self.pool > 1

    def covers(self, x_shape: Sequence[int], weight_shape: Sequence[int]) -> bool:
        """Whether the kernel lies on all of the image at once, as that of a linear layer does."""
        return tuple(weight_shape[2:]) == tuple(x_shape[2:4]) and self[2:6] == (0, 0, 1, 1)


def output_shape(
    rows: int, x: Tensor, weights: list[Tensor], geometry: Geometry
) -> tuple[int, ...]:
    """The shape ``[R, N, out_h, out_w, Co]`` of a level's output."""
    return rows, x.shape[1], geometry.out_h, geometry.out_w, weights[0].shape[0]


def passes_int32(*offsets: int) -> bool:
    """Whether one of the offsets, or what a block reaches beyond it, may pass 32 bits."""
    # a block is never larger than 2^12
    return max(offsets) >= 2**31 - 2**12


def reach(shape: Sequence[int], strides: Sequence[int]) -> int:
    """The offset of a tensor's last element."""
    return sum((n - 1) * s for n, s in zip(shape, strides, strict=True))


def same_strides(weights: list[Tensor]) -> list[Tensor]:
    """The weights with one layout: as they are, or contiguous where they differ."""
    if all(weight.stride() == weights[0].stride() for weight in weights):
        return weights
    return [weight.contiguous() for weight in weights]


def is_ragged(shape: Sequence[int], strides: Sequence[int]) -> bool:
    """Whether channels, the last dimension, have to be read one by one, not in runs of 8."""
    return strides[-1] != 1 or shape[-1] % 8 != 0


def gradient_buffers(weights: list[Tensor]) -> list[Tensor]:
    """Memory for the weights' gradients, all in one layout: the weights' own where they agree."""
    buffers = [torch.empty_like(weight) for weight in weights]
    if all(buffer.stride() == buffers[0].stride() for buffer in buffers):
        return buffers
    return [torch.empty_like(w, memory_format=torch.contiguous_format) for w in weights]


def arrivals_buffer(x: Tensor) -> Tensor:
    """Memory, int32, to count in which programs have added to a sum that they share."""
    return x.new_empty(MOST_SHARED, dtype=torch.int32)


def skip_buffer(dy: Tensor, rows: Tables, geometry: Geometry, dtype: torch.dtype | None) -> Tensor:
    """Memory for the gradient of a skip; empty without a dtype."""
    if dtype is None:
        return dy.new_empty(0)
    shape = (len(rows.by_skip), dy.shape[1], geometry.conv_h, geometry.conv_w, dy.shape[-1])
    return dy.new_empty(shape, dtype=dtype)
