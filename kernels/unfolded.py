"""All that the filters of a convolution read, side by side for every output pixel; one launch."""

from __future__ import annotations

from math import prod

import torch
import triton
import triton.language as tl
from torch import Tensor

from lasem_fast.kernels.box_form import BoxForm
from lasem_fast.kernels.early_launch import early, wait_for_others
from lasem_fast.kernels.kept import kept
from lasem_fast.kernels.launches import Launch
from lasem_fast.kernels.level_geometry import Geometry, passes_int32, reach
from lasem_fast.kernels.level_tiles import cdiv

# Elements of a program.
_BLOCK, _MOST_COLUMNS = 4096, 128


@triton.jit
def unfolded_kernel(
    x, columns, pixels, samples, x_p, x_n, x_h, x_w, x_c,
    C_IN: tl.constexpr, HEIGHT: tl.constexpr, WIDTH: tl.constexpr,
    CONV_H: tl.constexpr, CONV_W: tl.constexpr, KH: tl.constexpr, KW: tl.constexpr,
    STRIDE_H: tl.constexpr, STRIDE_W: tl.constexpr, PAD_H: tl.constexpr, PAD_W: tl.constexpr,
    LINE: tl.constexpr, WIDE: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
    EARLY: tl.constexpr,
):  # fmt: skip
    """columns [P, N, conv_h, conv_w, LINE] of x [P, N, H, W, C]."""
    wait_for_others(EARLY)
    index: tl.constexpr = tl.int64 if WIDE else tl.int32
    pixel = tl.program_id(0).to(index) * ROWS + tl.arange(0, ROWS)
    place = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    kh = place // (C_IN * KW)
    kw = place // C_IN % KW
    image = pixel // (CONV_H * CONV_W)
    top = pixel // CONV_W % CONV_H * STRIDE_H - PAD_H
    left = pixel % CONV_W * STRIDE_W - PAD_W
    corner = image // samples * x_p + image % samples * x_n + top * x_h + left * x_w
    tap = kh.to(index) * x_h + kw * x_w + place % C_IN * x_c
    ih = top[:, None] + kh[None, :]
    iw = left[:, None] + kw[None, :]
    read = (ih >= 0) & (ih < HEIGHT) & (iw >= 0) & (iw < WIDTH)
    read = read & (pixel < pixels)[:, None] & (place < KH * KW * C_IN)[None, :]
    value = tl.load(x + (corner[:, None] + tap[None, :]), mask=read, other=0.0)
    keep = (pixel < pixels)[:, None] & (place < LINE)[None, :]
    at = (pixel * LINE)[:, None] + place[None, :]
    tl.store(columns + at, value.to(columns.dtype.element_ty), mask=keep)


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
    launch = _launch(tuple(x.shape), x.stride(), kernel, geometry, form.x_shape, x.device)
    launch(x, columns)
    return columns


@kept
def _launch(
    x: tuple[int, ...], strides: tuple[int, ...], kernel: tuple[int, int], geometry: Geometry,
    columns: tuple[int, ...], device: torch.device,
) -> Launch:  # fmt: skip
    *_, line = columns
    kh, kw = kernel
    pixels = prod(columns[:-1])
    block = min(_MOST_COLUMNS, triton.next_power_of_2(line))
    return Launch(
        unfolded_kernel, (cdiv(pixels, _BLOCK // block), cdiv(line, block)),
        (pixels, x[1], *strides),
        C_IN=x[4], HEIGHT=x[2], WIDTH=x[3],
        CONV_H=geometry.conv_h, CONV_W=geometry.conv_w, KH=kh, KW=kw,
        STRIDE_H=geometry.stride_h, STRIDE_W=geometry.stride_w,
        PAD_H=geometry.pad_h, PAD_W=geometry.pad_w, LINE=line,
        WIDE=passes_int32(reach(x, strides), prod(columns), pixels),
        ROWS=_BLOCK // block, COLUMNS=block, num_warps=8, **early(device),
    )  # fmt: skip
