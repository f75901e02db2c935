"""All that the filters of a convolution read, side by side for every output pixel; one launch."""

from __future__ import annotations

from math import prod

import torch
import triton
import triton.language as tl
from torch import Tensor

from lasem_fast.kernels.box_form import BoxForm
from lasem_fast.kernels.level_geometry import Geometry, device_of, needs_int64
from lasem_fast.kernels.level_tiles import cdiv

_BLOCK = 2048


@triton.jit
def unfolded_kernel(
    x, columns, size, samples, x_p, x_n, x_h, x_w, x_c,
    C_IN: tl.constexpr, HEIGHT: tl.constexpr, WIDTH: tl.constexpr,
    CONV_H: tl.constexpr, CONV_W: tl.constexpr, KH: tl.constexpr, KW: tl.constexpr,
    STRIDE_H: tl.constexpr, STRIDE_W: tl.constexpr, PAD_H: tl.constexpr, PAD_W: tl.constexpr,
    LINE: tl.constexpr, WIDE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """columns [P, N, conv_h, conv_w, LINE] of x [P, N, H, W, C]."""
    index: tl.constexpr = tl.int64 if WIDE else tl.int32
    at = tl.program_id(0).to(index) * BLOCK + tl.arange(0, BLOCK)
    inside = at < size
    place = at % LINE
    pixel = at // LINE
    channel = place % C_IN
    ih = pixel // CONV_W % CONV_H * STRIDE_H - PAD_H + place // (C_IN * KW)
    iw = pixel % CONV_W * STRIDE_W - PAD_W + place // C_IN % KW
    image = pixel // (CONV_H * CONV_W)
    from_image = x + image // samples * x_p + image % samples * x_n
    read = inside & (place < KH * KW * C_IN)
    read = read & (ih >= 0) & (ih < HEIGHT) & (iw >= 0) & (iw < WIDTH)
    value = tl.load(from_image + ih * x_h + iw * x_w + channel * x_c, mask=read, other=0.0)
    tl.store(columns + at, value.to(columns.dtype.element_ty), mask=inside)


def unfolded(
    x: Tensor, kernel: tuple[int, int], geometry: Geometry, form: BoxForm, dtype: torch.dtype
) -> Tensor:
    """``[P, N, conv_h, conv_w, line]`` in ``dtype``, contiguous.

    Args:
        x: ``[P, N, H, W, C]``, any strides.
        kernel: height and width of the filters.
        geometry: of the convolution.
        form: of the same level.
        dtype: of the result.
    """
    columns = x.new_empty(form.x_shape, dtype=dtype)
    size, kh, kw = prod(form.x_shape), *kernel
    with device_of(x):
        unfolded_kernel[cdiv(size, _BLOCK),](
            x, columns, size, x.shape[1], *x.stride(),
            C_IN=x.shape[4], HEIGHT=x.shape[2], WIDTH=x.shape[3],
            CONV_H=geometry.conv_h, CONV_W=geometry.conv_w, KH=kh, KW=kw,
            STRIDE_H=geometry.stride_h, STRIDE_W=geometry.stride_w,
            PAD_H=geometry.pad_h, PAD_W=geometry.pad_w, LINE=form.channels,
            WIDE=needs_int64((x, columns), size), BLOCK=_BLOCK, num_warps=8,
        )  # fmt: skip
    return columns
