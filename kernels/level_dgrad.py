"""Level backward to the input: both branches in one product, dy read through the code, one launch.

Rows are input pixels, columns input channels, the sum runs over taps, branches and output channels.
An output's gradient belongs to the one pixel of its pooling window that the code names.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from lasem_fast.kernels.level_geometry import CLOSED, Geometry, device_of, needs_int64, same_strides
from lasem_fast.kernels.level_tiles import FMA_TILES, Tile, cdiv, default, fitting

TENSOR_CORE_TILES = (
    Tile(64, 64, 64, 4, 3),
    Tile(64, 32, 64, 4, 3),
    Tile(32, 32, 64, 4, 3),
    Tile(16, 32, 64, 2, 3),
    Tile(16, 16, 64, 2, 3),
)


@triton.jit
def level_dgrad_kernel(
    dy, code, weight0, weight1, dx,
    rows, samples, height, width, conv_h, conv_w, out_h, out_w,
    w_o, w_c, w_h, w_w,
    BRANCHES: tl.constexpr, C_IN: tl.constexpr, C_OUT: tl.constexpr,
    KH: tl.constexpr, KW: tl.constexpr, STRIDE_H: tl.constexpr, STRIDE_W: tl.constexpr,
    PAD_H: tl.constexpr, PAD_W: tl.constexpr, POOL: tl.constexpr, POOL_PAD: tl.constexpr,
    HAS_CODE: tl.constexpr, CLOSED: tl.constexpr, COVERS: tl.constexpr,
    PRECISION: tl.constexpr, WIDE: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, DEPTH: tl.constexpr,
):  # fmt: skip
    """dx [P, N, H, W, C] from dy and code [P, B, N, out_h, out_w, Co]; see level_dgrad.

    COVERS: the kernel lies on all of the image at once, so that every pixel has one tap, its own:
    rows are samples then, and columns are all of a sample's values.
    """
    index: tl.constexpr = tl.int64 if WIDE else tl.int32
    operand: tl.constexpr = dy.dtype.element_ty
    TAPS: tl.constexpr = 1 if COVERS else KH * KW
    STEPS: tl.constexpr = (BRANCHES * C_OUT + DEPTH - 1) // DEPTH
    WIDTH: tl.constexpr = KH * KW * C_IN if COVERS else C_IN
    row = tl.program_id(0).to(index) * ROWS + tl.arange(0, ROWS)
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    inside = row < rows
    used = column < WIDTH
    if COVERS:
        sample = row
        ih = row * 0
        iw = ih
        own_tap = column // C_IN
        weight = column % C_IN * w_c + own_tap // KW * w_h + own_tap % KW * w_w
    else:
        sample = row // width // height
        ih = row // width % height
        iw = row % width
        weight = column * w_c
    first = sample // samples * (BRANCHES * samples) + sample % samples
    plane = samples * out_h * out_w * C_OUT

    total = tl.zeros((ROWS, COLUMNS), tl.float32)
    for step in range(TAPS * STEPS):
        tap = step // STEPS
        k = step % STEPS * DEPTH + tl.arange(0, DEPTH)
        branch = (k // C_OUT).to(index)
        channel = (k % C_OUT).to(index)
        # the convolution's output pixel that reads this input pixel through this tap
        oh = ih + PAD_H - tap // KW
        ow = iw + PAD_W - tap % KW
        there = inside & (oh >= 0) & (ow >= 0)
        if STRIDE_H > 1:
            there = there & (oh % STRIDE_H == 0)
            oh = oh // STRIDE_H
        if STRIDE_W > 1:
            there = there & (ow % STRIDE_W == 0)
            ow = ow // STRIDE_W
        there = there & (oh < conv_h) & (ow < conv_w)
        oh += POOL_PAD
        ow += POOL_PAD
        ho = oh // POOL
        wo = ow // POOL
        there = there & (ho < out_h) & (wo < out_w)
        at = ((first * out_h + ho) * out_w + wo) * C_OUT
        read = there[:, None]
        read_w = used[None, :]
        if BRANCHES * C_OUT % DEPTH != 0:
            read = read & (k < BRANCHES * C_OUT)[None, :]
            read_w = read_w & (k < BRANCHES * C_OUT)[:, None]
        offset = at[:, None] + (branch * plane + channel)[None, :]
        gradient = tl.load(dy + offset, mask=read, other=0.0)
        if HAS_CODE:
            won = tl.load(code + offset, mask=read, other=CLOSED)
            position = oh % POOL * POOL + ow % POOL
            gradient = tl.where(won == position[:, None], gradient, 0.0)
        w_at = tl.where(branch == 1, weight1, weight0) + channel * w_o + tap // KW * w_h
        w_at = (w_at + tap % KW * w_w)[:, None] + weight[None, :]
        filters = tl.load(w_at, mask=read_w, other=0.0).to(operand)
        total = tl.dot(gradient, filters, total, input_precision=PRECISION)

    dx_at = dx + (row * WIDTH)[:, None] + column[None, :]
    tl.store(dx_at, total.to(dx.dtype.element_ty), mask=inside[:, None] & used[None, :])


def candidates(
    x_shape: tuple[int, ...],
    weights: list[Tensor],
    geometry: Geometry,
    dtype: torch.dtype,
    tf32: bool,
) -> list[Tile]:
    """The tiles that fit a level, in table order; arguments as in :func:`level_dgrad`."""
    tiles = FMA_TILES if dtype == torch.float32 and not tf32 else TENSOR_CORE_TILES
    return fitting(tiles, *_product(x_shape, weights, geometry))


def level_dgrad(
    dy: Tensor,
    code: Tensor,
    weights: list[Tensor],
    x_shape: tuple[int, ...],
    geometry: Geometry,
    dtype: torch.dtype,
    tf32: bool = False,
    tile: Tile | None = None,
) -> Tensor:
    """The gradient of a level's input: one launch.

    Args:
        dy: ``[P, B, N, out_h, out_w, Co]``, contiguous; its dtype is that of the product.
        code: of the forward.
        weights: one ``[Co, C, KH, KW]`` per branch, any strides.
        x_shape: ``(P, N, H, W, C)``.
        geometry: the level's sizes.
        dtype: of the result.
        tf32: whether a float32 product may round its operands to TF32.
        tile: block sizes; None: chosen by shape.

    Returns:
        ``[P, N, H, W, C]``, contiguous.
    """
    weights = same_strides(weights)
    dx = dy.new_empty(x_shape, dtype=dtype)
    if dx.numel() == 0:
        return dx
    rows, columns, _ = _product(x_shape, weights, geometry)
    tile = tile or default(candidates(x_shape, weights, geometry, dy.dtype, tf32), rows, columns)
    channels, kh, kw = weights[0].shape[1:]
    with device_of(dy):
        level_dgrad_kernel[cdiv(rows, tile.rows), cdiv(columns, tile.columns)](
            dy, code, weights[0], weights[-1], dx,
            rows, x_shape[1], x_shape[2], x_shape[3],
            geometry.conv_h, geometry.conv_w, geometry.out_h, geometry.out_w,
            *weights[0].stride(),
            BRANCHES=len(weights), C_IN=channels, C_OUT=dy.shape[-1], KH=kh, KW=kw,
            STRIDE_H=geometry.stride_h, STRIDE_W=geometry.stride_w,
            PAD_H=geometry.pad_h, PAD_W=geometry.pad_w,
            POOL=geometry.pool, POOL_PAD=geometry.pool_pad,
            HAS_CODE=geometry.has_code, CLOSED=CLOSED,
            COVERS=geometry.covers(x_shape, weights[0].shape),
            PRECISION="tf32" if tf32 else "ieee", WIDE=needs_int64((dy, dx, *weights), rows),
            ROWS=tile.rows, COLUMNS=tile.columns, DEPTH=tile.depth,
            num_warps=tile.warps, num_stages=tile.stages,
        )  # fmt: skip
    return dx


def _product(
    x_shape: tuple[int, ...], weights: list[Tensor], geometry: Geometry
) -> tuple[int, int, int]:
    """Rows, columns and depth of the matrix product."""
    prefixes, samples, height, width, channels = x_shape
    terms = len(weights) * weights[0].shape[0]
    if geometry.covers(x_shape, weights[0].shape):
        return prefixes * samples, height * width * channels, terms
    kernel = weights[0].shape[2] * weights[0].shape[3]
    return prefixes * samples * height * width, channels, terms * kernel
