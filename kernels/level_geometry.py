"""The sizes of one level: a convolution of every prefix in every branch, ReLU and max-pool."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

# The code of an output whose ReLU is closed; any other is the window position that won.
CLOSED = 255


class Geometry(NamedTuple):
    """What a level does besides its weights. A linear layer is a kernel as large as its image.

    Attributes:
        stride_h, stride_w: of the convolution.
        pad_h, pad_w: rows and columns of zeros before the image.
        conv_h, conv_w: the convolution's output size, which says what padding follows the image.
        pool: window and stride of the max-pool; 1 is none.
        pool_pad: padding before the first window, at most ``pool // 2``; never wins.
        out_h, out_w: the pooled size; windows are clipped at the border.
        relu: 1 where a ReLU comes before or behind the pool, else 0.
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

    @property
    def has_code(self) -> bool:
        """Whether the backward needs to know which window position won."""
        return bool(self.relu) or self.pool > 1

    def covers(self, x_shape: Sequence[int], weight_shape: Sequence[int]) -> bool:
        """Whether the kernel lies on all of the image at once, as that of a linear layer does."""
        return tuple(weight_shape[2:]) == tuple(x_shape[2:4]) and self[2:6] == (0, 0, 1, 1)


def output_shape(x: Tensor, weights: list[Tensor], geometry: Geometry) -> tuple[int, ...]:
    """The shape ``[P, B, N, out_h, out_w, Co]`` of a level's output."""
    prefixes, samples = x.shape[:2]
    return (
        prefixes, len(weights), samples, geometry.out_h, geometry.out_w, weights[0].shape[0],
    )  # fmt: skip


def needs_int64(tensors: Iterable[Tensor], *counts: int) -> bool:
    """Whether an element's offset, or one of the counts, may pass the range of 32 bits."""
    # Lanes beyond the end count too: a block is never larger than 2^12.
    limit = 2**31 - 2**12
    spans = (sum((n - 1) * s for n, s in zip(t.shape, t.stride(), strict=True)) for t in tensors)
    return max(*spans, *counts) >= limit


def same_strides(weights: list[Tensor]) -> list[Tensor]:
    """The weights with one layout: as they are, or contiguous where they differ."""
    if all(weight.stride() == weights[0].stride() for weight in weights):
        return weights
    return [weight.contiguous() for weight in weights]


def is_ragged(x: Tensor) -> bool:
    """Whether the channels of ``x`` have to be read one by one, not in runs of 8."""
    return x.stride(-1) != 1 or x.shape[-1] % 8 != 0


def gradient_buffers(weights: list[Tensor]) -> list[Tensor]:
    """Memory for the weights' gradients, all in one layout: the weights' own where they agree."""
    buffers = [torch.empty_like(weight) for weight in weights]
    if all(buffer.stride() == buffers[0].stride() for buffer in buffers):
        return buffers
    return [torch.empty_like(w, memory_format=torch.contiguous_format) for w in weights]


def device_of(x: Tensor) -> torch.cuda.device_of:
    """A context in which kernels run on the tensor's device, on its current stream."""
    return torch.cuda.device_of(x)
