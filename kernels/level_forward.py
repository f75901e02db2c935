"""Level forward: a list of rows, each convolution, bias, ReLU, skip, ReLU and max-pool; one launch.

An implicit matrix product per branch: rows are the output pixels of its rows one after another,
columns its filters, the sum runs over taps and input channels. The pool's window positions are
computed one after another. The running maximum starts at 0 with the code "closed" where a ReLU is
the last before the pool, so that both are one comparison.
"""

from __future__ import annotations

from math import prod
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from lasem_fast.kernels.early_launch import early, wait_for_others
from lasem_fast.kernels.kept import kept
from lasem_fast.kernels.launches import Launch
from lasem_fast.kernels.level_geometry import (
    CLOSED,
    SHUT,
    Geometry,
    arrivals_buffer,
    is_ragged,
    passes_int32,
    reach,
    same_strides,
)
from lasem_fast.kernels.level_rows import Tables
from lasem_fast.kernels.level_tiles import FMA_TILES, Tile, cdiv, default, fitting
from lasem_fast.kernels.parts import nobody_yet

# Without spills on sm_80 and sm_90; the first one only without a pool, see MOST_POOLED.
TENSOR_CORE_TILES = (
    Tile(64, 64, 64, 4, 3),
    Tile(64, 32, 64, 4, 4),
    Tile(64, 32, 32, 4, 3),
    Tile(32, 32, 64, 4, 3),
    Tile(16, 32, 64, 2, 3),
    Tile(16, 16, 128, 4, 3),
)
# Where channels are read one by one, addresses take so many registers that others spill.
RAGGED_TILES = (Tile(32, 32, 32, 4, 3),)
# Per thread: behind a pool there is a running maximum for every accumulator.
MOST_POOLED = 16


@triton.jit(do_not_specialize=["count0", "count1"])
def level_forward_kernel(
    x, weight0, weight1, bias0, bias1, skip, by_branch, y, code, arrivals,
    count0, count1, samples, depth,
    x_p, x_n, x_h, x_w, x_c, w_o, w_c, w_h, w_w, s_s, s_n, s_h, s_w, s_c,
    BRANCHES: tl.constexpr, C_IN: tl.constexpr, C_OUT: tl.constexpr,
    HEIGHT: tl.constexpr, WIDTH: tl.constexpr, CONV_H: tl.constexpr, CONV_W: tl.constexpr,
    OUT_H: tl.constexpr, OUT_W: tl.constexpr,
    KH: tl.constexpr, KW: tl.constexpr, STRIDE_H: tl.constexpr, STRIDE_W: tl.constexpr,
    PAD_H: tl.constexpr, PAD_W: tl.constexpr, POOL: tl.constexpr, POOL_PAD: tl.constexpr,
    RELU: tl.constexpr, RELU_AFTER: tl.constexpr, HAS_BIAS: tl.constexpr, HAS_SKIP: tl.constexpr,
    CLOSED: tl.constexpr, SHUT: tl.constexpr, PRECISION: tl.constexpr, WIDE: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, DEPTH: tl.constexpr,
    EARLY: tl.constexpr,
):  # fmt: skip
    """y [R, N, out_h, out_w, Co] and its code from x [P, N, H, W, C]; see level_forward."""
    wait_for_others(EARLY)
    if tl.program_id(0) + tl.program_id(1) == 0:
        nobody_yet(arrivals)
    index: tl.constexpr = tl.int64 if WIDE else tl.int32
    operand: tl.constexpr = y.dtype.element_ty
    ENDS_CLOSED: tl.constexpr = RELU_AFTER if HAS_SKIP else RELU
    SIZE: tl.constexpr = KH * KW * C_IN
    # rows of branch 0 come first; no program has pixels of both
    tile = tl.program_id(0)
    first, count, weight, bias_at = 0, count0, weight0, bias0
    if BRANCHES == 2:
        pixels0 = count0.to(index) * samples * (OUT_H * OUT_W)
        tiles0 = tl.cdiv(pixels0, ROWS).to(tl.int32)
        second = tile >= tiles0
        tile = tl.where(second, tile - tiles0, tile)
        first = tl.where(second, count0, 0)
        count = tl.where(second, count1, count0)
        weight = tl.where(second, weight1, weight0)
        bias_at = tl.where(second, bias1, bias0)
    pixel = tile.to(index) * ROWS + tl.arange(0, ROWS)
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    inside = pixel < count.to(index) * samples * (OUT_H * OUT_W)
    used = column < C_OUT
    wo = pixel % OUT_W
    ho = pixel // OUT_W % OUT_H
    image_of_branch = pixel // (OUT_W * OUT_H)
    row_of_branch = image_of_branch // samples
    n = image_of_branch - row_of_branch * samples
    entry = by_branch + (first + row_of_branch) * 3
    row = tl.load(entry, mask=inside, other=0).to(index)
    # of the output, computed here because what it is made of would be held in more registers
    offset = (pixel + (row - row_of_branch) * samples * (OUT_W * OUT_H)) * C_OUT
    parent = tl.load(entry + 1, mask=inside, other=0).to(index)
    channel_out = column.to(index)
    weight += channel_out * w_o
    image = x + parent * x_p + n * x_n
    if HAS_SKIP:
        added = tl.load(entry + 2, mask=inside, other=0).to(index)
        added_at = skip + added * s_s + n * s_n

    best = tl.full((ROWS, COLUMNS), 0.0 if ENDS_CLOSED else float("-inf"), tl.float32)
    winner = tl.full((ROWS, COLUMNS), CLOSED, tl.uint8)
    bias = tl.zeros((COLUMNS,), tl.float32)
    if HAS_BIAS:
        bias = tl.load(bias_at + channel_out, mask=used, other=0.0).to(tl.float32)
    for position in range(POOL * POOL):
        oh = ho * POOL - POOL_PAD + position // POOL
        ow = wo * POOL - POOL_PAD + position % POOL
        valid = inside & (oh >= 0) & (oh < CONV_H) & (ow >= 0) & (ow < CONV_W)
        ih = oh * STRIDE_H - PAD_H
        iw = ow * STRIDE_W - PAD_W
        corner = image + ih * x_h + iw * x_w
        total = tl.zeros((ROWS, COLUMNS), tl.float32)
        for start in range(0, depth, DEPTH):  # depth is SIZE: as a constant it would be unrolled
            # decoded per value: with scalars per step, where that is possible, registers spill
            k = start + tl.arange(0, DEPTH)
            channel = (k % C_IN).to(index)
            kh = k // C_IN // KW
            kw = k // C_IN % KW
            h = ih[:, None] + kh[None, :]
            w = iw[:, None] + kw[None, :]
            read_x = valid[:, None] & (h >= 0) & (h < HEIGHT) & (w >= 0) & (w < WIDTH)
            read_w = used[None, :]
            if SIZE % DEPTH != 0:
                read_x = read_x & (k < SIZE)[None, :]
                read_w = read_w & (k < SIZE)[:, None]
            x_at = corner[:, None] + (kh * x_h + kw * x_w + channel * x_c)[None, :]
            w_at = weight[None, :] + (kh * w_h + kw * w_w + channel * w_c)[:, None]
            values = tl.load(x_at, mask=read_x, other=0.0).to(operand)
            filters = tl.load(w_at, mask=read_w, other=0.0).to(operand)
            total = tl.dot(values, filters, total, input_precision=PRECISION)
        total += bias[None, :]
        name = tl.full((ROWS, COLUMNS), position, tl.uint8)
        if HAS_SKIP:
            if RELU:
                shut = total <= 0
                total = tl.where(shut, 0.0, total)
                name = tl.where(shut, name + SHUT, name)
            s_at = (added_at + oh * s_h + ow * s_w)[:, None] + (channel_out * s_c)[None, :]
            total += tl.load(s_at, mask=valid[:, None] & used[None, :], other=0.0).to(tl.float32)
        # NaN wins, as in PyTorch: a configuration that overflows has to show
        take = (total > best) | (total != total)
        if not ENDS_CLOSED:
            take = take | (winner == CLOSED)
        take = take & valid[:, None]
        best = tl.where(take, total, best)
        winner = tl.where(take, name, winner)

    at = offset[:, None] + channel_out[None, :]
    keep = inside[:, None] & used[None, :]
    tl.store(y + at, best.to(operand), mask=keep)
    if RELU or RELU_AFTER or POOL > 1:
        tl.store(code + at, winner, mask=keep)


def level_forward(
    x: Tensor,
    weights: list[Tensor],
    biases: list[Tensor],
    skip: Tensor | None,
    rows: Tables,
    geometry: Geometry,
    dtype: torch.dtype,
    tf32: bool = False,
    tile: Tile | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Runs a level: one launch.

    Args:
        x: ``[P, N, H, W, C]``, any strides; float32, float16 or bfloat16.
        weights: one ``[Co, C, KH, KW]`` per branch, one or two, any strides; converted to ``dtype``
            as they are read.
        biases: one contiguous ``[Co]`` per branch, or none.
        skip: ``[S, N, conv_h, conv_w, Co]``, any strides, or None.
        rows: the R rows.
        geometry: the level's sizes.
        dtype: of the product's operands and of the output; sums are float32.
        tf32: whether a float32 product may round its operands to TF32.
        tile: block sizes; None: chosen by shape.

    Returns:
        ``y``, ``[R, N, out_h, out_w, Co]``, and its uint8 ``code``: the window position that won,
        ``+ SHUT`` where the ReLU before a skip is closed, or ``CLOSED``; empty where the level has
        neither ReLU nor pool; and zeros for the arrivals of the backward, see
        :mod:`lasem_fast.kernels.parts`.
    """
    weights = same_strides(weights)
    added = x if skip is None else skip  # never read where there is none
    work = _work(
        tuple(x.shape), x.stride(), len(weights), tuple(weights[0].shape), weights[0].stride(),
        bool(biases), None if skip is None else tuple(skip.shape), added.stride(), rows.counts,
        geometry, dtype, tf32, tile, x.device,
    )  # fmt: skip
    y = x.new_empty(work.shape, dtype=dtype)
    code = x.new_empty(work.shape if geometry.has_code else (0,), dtype=torch.uint8)
    arrivals = arrivals_buffer(x)
    if work.launch is None:
        return y, code, arrivals.zero_()
    biased = biases or weights  # never read where there is none
    work.launch(
        x, weights[0], weights[-1], biased[0], biased[-1], added, rows.by_branch, y, code, arrivals
    )
    return y, code, arrivals


class _Work(NamedTuple):
    """The output's shape, and the launch, if there is anything to be done."""

    shape: tuple[int, ...]
    launch: Launch | None


@kept
def _work(
    x: tuple[int, ...], x_strides: tuple[int, ...], branches: int, weight: tuple[int, ...],
    strides: tuple[int, ...], has_bias: bool, skip: tuple[int, ...] | None,
    skip_strides: tuple[int, ...], counts: tuple[int, ...], geometry: Geometry,
    dtype: torch.dtype, tf32: bool, tile: Tile | None, device: torch.device,
) -> _Work:  # fmt: skip
    channels_out, channels, kh, kw = weight
    shape = sum(counts), x[1], geometry.out_h, geometry.out_w, channels_out
    if 0 in shape:
        return _Work(shape, None)
    pixels, depth = geometry.out_h * geometry.out_w * x[1], channels * kh * kw
    # of the products of all branches, one below the other
    size = shape[0] * pixels, channels_out, depth
    if tile is None:
        tile = default(_fitting(size, is_ragged(x, x_strides), geometry, dtype, tf32), *size[:2])
    tiles = sum(cdiv(count * pixels, tile.rows) for count in counts)
    offsets = reach(x, x_strides), prod(shape), reach(skip or x, skip_strides)
    launch = Launch(
        level_forward_kernel, (tiles, cdiv(channels_out, tile.columns)),
        (counts[0], counts[-1], x[1], depth, *x_strides, *strides, *skip_strides),
        BRANCHES=branches, C_IN=channels, C_OUT=channels_out,
        HEIGHT=x[2], WIDTH=x[3], CONV_H=geometry.conv_h, CONV_W=geometry.conv_w,
        OUT_H=geometry.out_h, OUT_W=geometry.out_w, KH=kh, KW=kw,
        STRIDE_H=geometry.stride_h, STRIDE_W=geometry.stride_w,
        PAD_H=geometry.pad_h, PAD_W=geometry.pad_w,
        POOL=geometry.pool, POOL_PAD=geometry.pool_pad,
        RELU=bool(geometry.relu), RELU_AFTER=bool(geometry.relu_after),
        HAS_BIAS=has_bias, HAS_SKIP=skip is not None, CLOSED=CLOSED, SHUT=SHUT,
        PRECISION="tf32" if tf32 else "ieee",
        WIDE=passes_int32(*offsets, reach(weight, strides), size[0] + tile.rows),
        ROWS=tile.rows, COLUMNS=tile.columns, DEPTH=tile.depth,
        num_warps=tile.warps, num_stages=tile.stages, **early(device),
    )  # fmt: skip
    return _Work(shape, launch)


def _fitting(
    size: tuple[int, int, int], ragged: bool, geometry: Geometry, dtype: torch.dtype, tf32: bool
) -> list[Tile]:
    """The tiles that fit a product of rows, columns and depth, in table order."""
    tiles = RAGGED_TILES if ragged else TENSOR_CORE_TILES
    if dtype == torch.float32 and not tf32:
        tiles = FMA_TILES
    if geometry.pool > 1:
        tiles = [tile for tile in tiles if tile.accumulators <= MOST_POOLED]
    return fitting(tiles, *size)
