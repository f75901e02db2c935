"""Level backward to weights and biases: two launches, deterministic, or one where that is enough.

Rows are a kernel's taps and input channels, columns the filters of all branches, the sum runs over
the convolution's output pixels. It is split among programs, and the second launch adds up the parts
in a fixed order.
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
    gradient_buffers,
    is_ragged,
    needs_int64,
)
from lasem_fast.kernels.level_tiles import FMA_TILES, PROGRAMS, Tile, cdiv, default, fitting

TENSOR_CORE_TILES = (
    Tile(64, 64, 32, 4, 3),
    Tile(64, 32, 32, 4, 3),
    Tile(32, 32, 64, 4, 3),
    Tile(16, 16, 64, 2, 3),
)
# Where channels are read one by one, addresses take so many registers that others spill.
RAGGED_TILES = (Tile(64, 32, 32, 4, 3),)
# Elements that one program of the second launch adds up.
SUM_BLOCK = 256
# A part of the sum that is worth a program of its own, in steps of a tile's depth.
_STEPS = 4


@triton.jit
def level_wgrad_kernel(
    x, dy, code, dweight0, dweight1, dbias0, dbias1,
    pixels, part, samples, height, width, conv_h, conv_w, out_h, out_w,
    x_p, x_n, x_h, x_w, x_c, d_part, d_o, d_c, d_h, d_w, d_part_bias,
    BRANCHES: tl.constexpr, C_IN: tl.constexpr, C_OUT: tl.constexpr,
    KH: tl.constexpr, KW: tl.constexpr, STRIDE_H: tl.constexpr, STRIDE_W: tl.constexpr,
    PAD_H: tl.constexpr, PAD_W: tl.constexpr, POOL: tl.constexpr, POOL_PAD: tl.constexpr,
    HAS_CODE: tl.constexpr, HAS_BIAS: tl.constexpr, CLOSED: tl.constexpr,
    PRECISION: tl.constexpr, WIDE: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, DEPTH: tl.constexpr,
):  # fmt: skip
    """One part of dweight [Co, C, KH, KW] and dbias [Co] of both branches; see level_wgrad."""
    index: tl.constexpr = tl.int64 if WIDE else tl.int32
    operand: tl.constexpr = dy.dtype.element_ty
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    begin = tl.program_id(2).to(index) * part
    in_kernel = row < KH * KW * C_IN
    used = column < BRANCHES * C_OUT
    channel = (row % C_IN).to(index)
    kh = (row // C_IN // KW).to(index)
    kw = (row // C_IN % KW).to(index)
    branch = (column // C_OUT).to(index)
    channel_out = (column % C_OUT).to(index)
    plane = samples * out_h * out_w * C_OUT
    tap_at = x + kh * x_h + kw * x_w + channel * x_c

    total = tl.zeros((ROWS, COLUMNS), tl.float32)
    bias = tl.zeros((DEPTH, COLUMNS), tl.float32)
    for start in range(0, part, DEPTH):
        pixel = begin + start + tl.arange(0, DEPTH)
        inside = pixel < pixels
        ow = pixel % conv_w
        oh = pixel // conv_w % conv_h
        n = pixel // conv_w // conv_h % samples
        p = pixel // conv_w // conv_h // samples
        ih = oh * STRIDE_H - PAD_H
        iw = ow * STRIDE_W - PAD_W
        h = ih[None, :] + kh[:, None]
        w = iw[None, :] + kw[:, None]
        read_x = (h >= 0) & (h < height) & (w >= 0) & (w < width)
        read_x = read_x & inside[None, :] & in_kernel[:, None]
        corner = p * x_p + n * x_n + ih * x_h + iw * x_w
        values = tl.load(tap_at[:, None] + corner[None, :], mask=read_x, other=0.0)
        # a configuration that overflowed sends no gradient, and 0 * inf must not make it NaN
        values = tl.where(tl.abs(values.to(tl.float32)) < float("inf"), values, 0.0).to(operand)

        oh += POOL_PAD
        ow += POOL_PAD
        ho = oh // POOL
        wo = ow // POOL
        first = ((p * BRANCHES * samples + n) * out_h + ho) * out_w + wo
        offset = (first * C_OUT)[:, None] + (branch * plane + channel_out)[None, :]
        read = (inside & (ho < out_h) & (wo < out_w))[:, None] & used[None, :]
        gradient = tl.load(dy + offset, mask=read, other=0.0)
        if HAS_CODE:
            won = tl.load(code + offset, mask=read, other=CLOSED)
            position = oh % POOL * POOL + ow % POOL
            gradient = tl.where(won == position[:, None], gradient, 0.0)
        total = tl.dot(values, gradient, total, input_precision=PRECISION)
        if HAS_BIAS:
            bias += gradient.to(tl.float32)

    split = tl.program_id(2).to(index)
    dweight = tl.where(branch == 1, dweight1, dweight0) + split * d_part + channel_out * d_o
    at = dweight[None, :] + (kh * d_h + kw * d_w + channel * d_c)[:, None]
    keep = in_kernel[:, None] & used[None, :]
    tl.store(at, total.to(dweight0.dtype.element_ty), mask=keep)
    if HAS_BIAS:
        if tl.program_id(0) == 0:
            bias_at = tl.where(branch == 1, dbias1, dbias0) + split * d_part_bias + channel_out
            tl.store(bias_at, tl.sum(bias, axis=0).to(dbias0.dtype.element_ty), mask=used)


@triton.jit
def level_wgrad_sum_kernel(
    parts, bias_parts, dweight0, dweight1, dbias0, dbias1, splits, d_o, d_c, d_h, d_w,
    BRANCHES: tl.constexpr, C_IN: tl.constexpr, C_OUT: tl.constexpr,
    KH: tl.constexpr, KW: tl.constexpr, HAS_BIAS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """dweight and dbias from parts [S, B, Co, KH, KW, C] and bias_parts [S, B, Co]."""
    SIZE: tl.constexpr = BRANCHES * C_OUT * KH * KW * C_IN
    WEIGHT_BLOCKS: tl.constexpr = (SIZE + BLOCK - 1) // BLOCK
    block = tl.program_id(0)
    if block < WEIGHT_BLOCKS:
        at = block * BLOCK + tl.arange(0, BLOCK)
        inside = at < SIZE
        part_at = parts + at
        total = tl.zeros((BLOCK,), tl.float32)
        for _ in range(splits):
            total += tl.load(part_at, mask=inside, other=0.0)
            part_at += SIZE
        channel = at % C_IN
        kw = at // C_IN % KW
        kh = at // C_IN // KW % KH
        channel_out = at // (KH * KW * C_IN) % C_OUT
        branch = at // (C_OUT * KH * KW * C_IN)
        dweight = tl.where(branch == 1, dweight1, dweight0)
        dweight += channel_out * d_o + channel * d_c + kh * d_h + kw * d_w
        tl.store(dweight, total.to(dweight0.dtype.element_ty), mask=inside)
    elif HAS_BIAS:
        at = (block - WEIGHT_BLOCKS) * BLOCK + tl.arange(0, BLOCK)
        inside = at < BRANCHES * C_OUT
        part_at = bias_parts + at
        total = tl.zeros((BLOCK,), tl.float32)
        for _ in range(splits):
            total += tl.load(part_at, mask=inside, other=0.0)
            part_at += BRANCHES * C_OUT
        dbias = tl.where(at // C_OUT == 1, dbias1, dbias0) + at % C_OUT
        tl.store(dbias, total.to(dbias0.dtype.element_ty), mask=inside)


def candidates(
    x: Tensor, weights: list[Tensor], geometry: Geometry, dtype: torch.dtype, tf32: bool
) -> list[Tile]:
    """The tiles that fit a level, in table order; ``dtype`` is that of ``dy``."""
    tiles = RAGGED_TILES if is_ragged(x) else TENSOR_CORE_TILES
    if dtype == torch.float32 and not tf32:
        tiles = FMA_TILES
    return fitting(tiles, *_product(x, weights, geometry))


def level_wgrad(
    dy: Tensor,
    code: Tensor,
    x: Tensor,
    weights: list[Tensor],
    biases: list[Tensor],
    geometry: Geometry,
    tf32: bool = False,
    tile: Tile | None = None,
) -> tuple[list[Tensor], list[Tensor]]:
    """The gradients of a level's weights and biases: two launches, or one for a short sum.

    A value of ``x`` that is not finite counts as 0: it belongs to a configuration whose ``dy`` is 0
    or to a step whose loss is NaN.

    Args:
        dy: ``[P, B, N, out_h, out_w, Co]``, contiguous; its dtype is that of the product.
        code: of the forward.
        x, weights, biases, geometry: as in the forward.
        tf32: whether a float32 product may round its operands to TF32.
        tile: block sizes; None: chosen by shape.

    Returns:
        For every branch the gradient of its weight and of its bias (none without biases), in the
        layout and dtype of the parameters.
    """
    dweights = gradient_buffers(weights)
    dbiases = [torch.empty_like(bias) for bias in biases]
    if weights[0].numel() == 0:
        return dweights, [dbias.zero_() for dbias in dbiases]
    rows, columns, pixels = _product(x, weights, geometry)
    tile = tile or default(candidates(x, weights, geometry, dy.dtype, tf32), rows, columns)
    splits = _splits(tile, rows, columns, pixels)
    part = cdiv(cdiv(pixels, splits), tile.depth) * tile.depth
    channels_out, channels, kh, kw = weights[0].shape
    shape = {
        "BRANCHES": len(weights), "C_IN": channels, "C_OUT": channels_out, "KH": kh, "KW": kw,
        "HAS_BIAS": bool(biases),
    }  # fmt: skip
    if splits > 1:
        size = (splits, len(weights), channels_out, kh, kw, channels)
        parts = x.new_empty(size, dtype=torch.float32)
        bias_parts = x.new_empty(size[:3] if biases else (0,), dtype=torch.float32)
        targets = [parts[:, b].permute(0, 1, 4, 2, 3) for b in range(len(weights))]
        bias_targets = [bias_parts[:, b] for b in range(len(biases))]
    else:
        targets = [dweight.unsqueeze(0) for dweight in dweights]
        bias_targets = [dbias.unsqueeze(0) for dbias in dbiases]
    bias_targets = bias_targets or targets  # never written
    with device_of(x):
        level_wgrad_kernel[cdiv(rows, tile.rows), cdiv(columns, tile.columns), splits](
            x, dy, code, targets[0], targets[-1], bias_targets[0], bias_targets[-1],
            pixels, part, x.shape[1], x.shape[2], x.shape[3],
            geometry.conv_h, geometry.conv_w, geometry.out_h, geometry.out_w,
            *x.stride(), *targets[0].stride(), bias_targets[0].stride(0),
            STRIDE_H=geometry.stride_h, STRIDE_W=geometry.stride_w,
            PAD_H=geometry.pad_h, PAD_W=geometry.pad_w,
            POOL=geometry.pool, POOL_PAD=geometry.pool_pad,
            HAS_CODE=geometry.has_code, CLOSED=CLOSED,
            PRECISION="tf32" if tf32 else "ieee",
            WIDE=needs_int64((x, dy, *targets), pixels + part),
            ROWS=tile.rows, COLUMNS=tile.columns, DEPTH=tile.depth,
            num_warps=tile.warps, num_stages=tile.stages, **shape,
        )  # fmt: skip
        if splits > 1:
            blocks = cdiv(columns * rows, SUM_BLOCK) + (cdiv(columns, SUM_BLOCK) if biases else 0)
            dbias = dbiases or dweights  # the latter is never written
            level_wgrad_sum_kernel[blocks,](
                parts, bias_parts, dweights[0], dweights[-1], dbias[0], dbias[-1],
                splits, *dweights[0].stride(), BLOCK=SUM_BLOCK, num_warps=4, **shape,
            )  # fmt: skip
    return dweights, dbiases


def _product(x: Tensor, weights: list[Tensor], geometry: Geometry) -> tuple[int, int, int]:
    """Rows, columns and depth of the matrix product."""
    pixels = x.shape[0] * x.shape[1] * geometry.conv_h * geometry.conv_w
    return weights[0][0].numel(), len(weights) * weights[0].shape[0], pixels


def _splits(tile: Tile, rows: int, columns: int, pixels: int) -> int:
    """In how many parts the sum is cut: enough to fill the GPU twice, none of them very short."""
    wanted = cdiv(2 * PROGRAMS, tile.programs(rows, columns))
    return max(1, min(wanted, pixels // (_STEPS * tile.depth)))
