"""Level forward: convolution of every prefix in every branch, bias, ReLU and max-pool, one launch.

An implicit matrix product: rows are output pixels, columns the filters of all branches, the sum
runs over taps and input channels. The pool's window positions are computed one after another, and
the running maximum starts at 0 with the code "closed", so that ReLU and pool are one comparison.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from lasem_fast.kernels.level_geometry import (
    CLOSED,
    Geometry,
    device_of,
    is_ragged,
    needs_int64,
    output_shape,
    same_strides,
)
from lasem_fast.kernels.level_tiles import FMA_TILES, Tile, cdiv, default, fitting

# Without spills on sm_80 and sm_90; the first one only without a pool, see MOST_POOLED.
TENSOR_CORE_TILES = (
    Tile(64, 64, 64, 4, 3),
    Tile(64, 32, 64, 4, 3),
    Tile(64, 32, 32, 4, 3),
    Tile(32, 32, 64, 4, 3),
    Tile(16, 32, 64, 2, 3),
    Tile(16, 16, 128, 4, 3),
)
# Where channels are read one by one, addresses take so many registers that others spill.
RAGGED_TILES = (Tile(32, 32, 32, 4, 3),)
# Per thread: behind a pool there is a running maximum for every accumulator.
MOST_POOLED = 16


@triton.jit
def level_forward_kernel(
    x, weight0, weight1, bias0, bias1, y, code,
    pixels, depth, samples, height, width, conv_h, conv_w, out_h, out_w,
    x_p, x_n, x_h, x_w, x_c, w_o, w_c, w_h, w_w,
    BRANCHES: tl.constexpr, C_IN: tl.constexpr, C_OUT: tl.constexpr,
    KH: tl.constexpr, KW: tl.constexpr, STRIDE_H: tl.constexpr, STRIDE_W: tl.constexpr,
    PAD_H: tl.constexpr, PAD_W: tl.constexpr, POOL: tl.constexpr, POOL_PAD: tl.constexpr,
    RELU: tl.constexpr, HAS_BIAS: tl.constexpr, CLOSED: tl.constexpr,
    PRECISION: tl.constexpr, WIDE: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, DEPTH: tl.constexpr,
):  # fmt: skip
    """y [P, B, N, out_h, out_w, Co] and its code from x [P, N, H, W, C]; see level_forward."""
    index: tl.constexpr = tl.int64 if WIDE else tl.int32
    operand: tl.constexpr = y.dtype.element_ty
    pixel = tl.program_id(0).to(index) * ROWS + tl.arange(0, ROWS)
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    inside = pixel < pixels
    used = column < BRANCHES * C_OUT
    branch = (column // C_OUT).to(index)
    channel_out = (column % C_OUT).to(index)
    wo = pixel % out_w
    ho = pixel // out_w % out_h
    n = pixel // out_w // out_h % samples
    p = pixel // out_w // out_h // samples
    weight = tl.where(branch == 1, weight1, weight0) + channel_out * w_o
    image = x + p * x_p + n * x_n

    best = tl.full((ROWS, COLUMNS), 0.0 if RELU else float("-inf"), tl.float32)
    winner = tl.full((ROWS, COLUMNS), CLOSED, tl.uint8)
    bias = tl.zeros((COLUMNS,), tl.float32)
    if HAS_BIAS:
        bias_at = tl.where(branch == 1, bias1, bias0) + channel_out
        bias = tl.load(bias_at, mask=used, other=0.0).to(tl.float32)
    for position in range(POOL * POOL):
        oh = ho * POOL - POOL_PAD + position // POOL
        ow = wo * POOL - POOL_PAD + position % POOL
        valid = inside & (oh >= 0) & (oh < conv_h) & (ow >= 0) & (ow < conv_w)
        ih = oh * STRIDE_H - PAD_H
        iw = ow * STRIDE_W - PAD_W
        corner = image + ih * x_h + iw * x_w
        total = tl.zeros((ROWS, COLUMNS), tl.float32)
        for start in range(0, depth, DEPTH):
            # decoded per value: with scalars per step, where that is possible, registers spill
            k = start + tl.arange(0, DEPTH)
            channel = (k % C_IN).to(index)
            kh = k // C_IN // KW
            kw = k // C_IN % KW
            h = ih[:, None] + kh[None, :]
            w = iw[:, None] + kw[None, :]
            read_x = valid[:, None] & (h >= 0) & (h < height) & (w >= 0) & (w < width)
            read_w = used[None, :]
            if KH * KW * C_IN % DEPTH != 0:
                read_x = read_x & (k < depth)[None, :]
                read_w = read_w & (k < depth)[:, None]
            x_at = corner[:, None] + (kh * x_h + kw * x_w + channel * x_c)[None, :]
            w_at = weight[None, :] + (kh * w_h + kw * w_w + channel * w_c)[:, None]
            values = tl.load(x_at, mask=read_x, other=0.0).to(operand)
            filters = tl.load(w_at, mask=read_w, other=0.0).to(operand)
            total = tl.dot(values, filters, total, input_precision=PRECISION)
        total += bias[None, :]
        # NaN wins, as in PyTorch: a configuration that overflows has to show
        take = (total > best) | (total != total)
        if not RELU:
            take = take | (winner == CLOSED)
        take = take & valid[:, None]
        best = tl.where(take, total, best)
        winner = tl.where(take, tl.full((), position, tl.uint8), winner)

    plane = samples * out_h * out_w * C_OUT
    first = ((p * BRANCHES * samples + n) * out_h + ho) * out_w + wo
    offset = (first * C_OUT)[:, None] + (branch * plane + channel_out)[None, :]
    keep = inside[:, None] & used[None, :]
    tl.store(y + offset, best.to(operand), mask=keep)
    if RELU or POOL > 1:
        tl.store(code + offset, winner, mask=keep)


def candidates(
    x: Tensor, weights: list[Tensor], geometry: Geometry, dtype: torch.dtype, tf32: bool
) -> list[Tile]:
    """The tiles that fit a level, in table order; arguments as in :func:`level_forward`."""
    tiles = RAGGED_TILES if is_ragged(x) else TENSOR_CORE_TILES
    if dtype == torch.float32 and not tf32:
        tiles = FMA_TILES
    if geometry.pool > 1:
        tiles = [tile for tile in tiles if tile.accumulators <= MOST_POOLED]
    return fitting(tiles, *_product(x, weights, geometry))


def level_forward(
    x: Tensor,
    weights: list[Tensor],
    biases: list[Tensor],
    geometry: Geometry,
    dtype: torch.dtype,
    tf32: bool = False,
    tile: Tile | None = None,
) -> tuple[Tensor, Tensor]:
    """Runs a level: one launch.

    Args:
        x: ``[P, N, H, W, C]``, any strides; float32, float16 or bfloat16.
        weights: one ``[Co, C, KH, KW]`` per branch, one or two, any strides; converted to ``dtype``
            as they are read.
        biases: one contiguous ``[Co]`` per branch, or none.
        geometry: the level's sizes.
        dtype: of the product's operands and of the output; sums are float32.
        tf32: whether a float32 product may round its operands to TF32.
        tile: block sizes; None: chosen by shape.

    Returns:
        ``y``, ``[P, B, N, out_h, out_w, Co]``, and its uint8 ``code``: the window position that won
        or ``CLOSED``; empty where the level has neither ReLU nor pool.
    """
    weights = same_strides(weights)
    shape = output_shape(x, weights, geometry)
    y = x.new_empty(shape, dtype=dtype)
    code = x.new_empty(shape if geometry.has_code else (0,), dtype=torch.uint8)
    if y.numel() == 0:
        return y, code
    rows, columns, depth = _product(x, weights, geometry)
    tile = tile or default(candidates(x, weights, geometry, dtype, tf32), rows, columns)
    channels, kh, kw = weights[0].shape[1:]
    with device_of(x):
        level_forward_kernel[cdiv(rows, tile.rows), cdiv(columns, tile.columns)](
            x, weights[0], weights[-1], *_biases(weights, biases), y, code,
            rows, depth, x.shape[1], x.shape[2], x.shape[3],
            geometry.conv_h, geometry.conv_w, geometry.out_h, geometry.out_w,
            *x.stride(), *weights[0].stride(),
            BRANCHES=len(weights), C_IN=channels, C_OUT=shape[-1], KH=kh, KW=kw,
            STRIDE_H=geometry.stride_h, STRIDE_W=geometry.stride_w,
            PAD_H=geometry.pad_h, PAD_W=geometry.pad_w,
            POOL=geometry.pool, POOL_PAD=geometry.pool_pad, RELU=bool(geometry.relu),
            HAS_BIAS=bool(biases), CLOSED=CLOSED,
            PRECISION="tf32" if tf32 else "ieee", WIDE=needs_int64((x, y, *weights), rows),
            ROWS=tile.rows, COLUMNS=tile.columns, DEPTH=tile.depth,
            num_warps=tile.warps, num_stages=tile.stages,
        )  # fmt: skip
    return y, code


def _biases(weights: list[Tensor], biases: list[Tensor]) -> tuple[Tensor, Tensor]:
    """A bias per branch; where there is none, something that is never read."""
    return (biases[0], biases[-1]) if biases else (weights[0], weights[-1])


def _product(x: Tensor, weights: list[Tensor], geometry: Geometry) -> tuple[int, int, int]:
    """Rows, columns and depth of the matrix product."""
    pixels = x.shape[0] * x.shape[1] * geometry.out_h * geometry.out_w
    return pixels, len(weights) * weights[0].shape[0], weights[0][0].numel()
