"""ReLU and max-pool of a convolution that is there at full size, with the code; one launch."""

from __future__ import annotations

from math import prod

import torch
import triton
import triton.language as tl
from torch import Tensor

from lasem_fast.kernels.early_launch import early, wait_for_others
from lasem_fast.kernels.kept import kept
from lasem_fast.kernels.launches import Launch
from lasem_fast.kernels.level_geometry import CLOSED, Geometry, passes_int32
from lasem_fast.kernels.level_tiles import cdiv

_ROWS, _MOST_COLUMNS = 32, 64


@triton.jit
def box_pool_kernel(
    z, y, code, windows,
    C_OUT: tl.constexpr, CONV_H: tl.constexpr, CONV_W: tl.constexpr,
    OUT_H: tl.constexpr, OUT_W: tl.constexpr, POOL: tl.constexpr, POOL_PAD: tl.constexpr,
    RELU: tl.constexpr, CLOSED: tl.constexpr, WIDE: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr,
    EARLY: tl.constexpr,
):  # fmt: skip
    """y [images, out_h, out_w, Co] and its code from z [images, conv_h, conv_w, Co]."""
    wait_for_others(EARLY)
    index: tl.constexpr = tl.int64 if WIDE else tl.int32
    window = tl.program_id(0).to(index) * ROWS + tl.arange(0, ROWS)
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    keep = (window < windows)[:, None] & (column < C_OUT)[None, :]
    top = window // OUT_W % OUT_H * POOL - POOL_PAD
    left = window % OUT_W * POOL - POOL_PAD
    image = window // (OUT_W * OUT_H) * (CONV_H * CONV_W)
    best = tl.full((ROWS, COLUMNS), 0.0 if RELU else float("-inf"), tl.float32)
    winner = tl.full((ROWS, COLUMNS), CLOSED, tl.uint8)
    for position in tl.static_range(POOL * POOL):
        oh = top + position // POOL
        ow = left + position % POOL
        valid = ((oh >= 0) & (oh < CONV_H) & (ow >= 0) & (ow < CONV_W))[:, None] & keep
        at = ((image + oh * CONV_W + ow) * C_OUT)[:, None] + column[None, :]
        value = tl.load(z + at, mask=valid, other=0.0).to(tl.float32)
        # NaN wins, as in PyTorch: a configuration that overflows has to show
        take = (value > best) | (value != value)
        if not RELU:
            take = take | (winner == CLOSED)
        take = take & valid
        best = tl.where(take, value, best)
        winner = tl.where(take, position, winner).to(tl.uint8)
    at = (window * C_OUT)[:, None] + column[None, :]
    tl.store(y + at, best.to(y.dtype.element_ty), mask=keep)
    tl.store(code + at, winner, mask=keep)


def box_pool(z: Tensor, geometry: Geometry) -> tuple[Tensor, Tensor]:
    """``max_pool2d(relu(z))``, or without the ReLU: one launch.

    Args:
        z: ``[R, N, conv_h, conv_w, Co]``, contiguous.
        geometry: the level's sizes; no ReLU behind a skip.

    Returns:
        ``[R, N, out_h, out_w, Co]`` and its code, as
        :func:`~lasem_fast.kernels.level_forward.level_forward` gives them.
    """
    shape = (*z.shape[:2], geometry.out_h, geometry.out_w, z.shape[-1])
    y, code = z.new_empty(shape), z.new_empty(shape, dtype=torch.uint8)
    _launch(tuple(z.shape), geometry, z.device)(z, y, code)
    return y, code


@kept
def _launch(z: tuple[int, ...], geometry: Geometry, device: torch.device) -> Launch:
    images, channels = z[0] * z[1], z[-1]
    windows = images * geometry.out_h * geometry.out_w
    columns = min(_MOST_COLUMNS, triton.next_power_of_2(channels))
    return Launch(
        box_pool_kernel, (cdiv(windows, _ROWS), cdiv(channels, columns)), (windows,),
        C_OUT=channels, CONV_H=geometry.conv_h, CONV_W=geometry.conv_w,
        OUT_H=geometry.out_h, OUT_W=geometry.out_w, POOL=geometry.pool,
        POOL_PAD=geometry.pool_pad, RELU=bool(geometry.relu), CLOSED=CLOSED,
        WIDE=passes_int32(prod(z), windows * channels, windows + _ROWS), ROWS=_ROWS,
        COLUMNS=columns, num_warps=4, **early(device),
    )  # fmt: skip
