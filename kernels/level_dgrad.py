"""Level backward to the input, and to a skip: one launch, dy read through the code.

Rows are pixels of the parents, columns input channels, the sum runs over the branches that a parent
goes through, taps and output channels. An output's gradient belongs to the one pixel of its pooling
window that the code names. Further programs of the same launch add up the gradients of the rows
that share a row of the skip.
"""

from __future__ import annotations

from math import prod

import torch
import triton
import triton.language as tl
from torch import Tensor

from lasem_fast.kernels.early_launch import early, wait_for_others
from lasem_fast.kernels.kept import kept
from lasem_fast.kernels.launches import Launch
from lasem_fast.kernels.level_geometry import (
    SHUT,
    Geometry,
    passes_int32,
    reach,
    same_strides,
    skip_buffer,
)
from lasem_fast.kernels.level_rows import Tables
from lasem_fast.kernels.level_tiles import FMA_TILES, Tile, cdiv, default, fitting

TENSOR_CORE_TILES = (
    Tile(64, 64, 64, 4, 3),
    Tile(64, 64, 32, 4, 3),
    Tile(64, 32, 64, 4, 3),
    Tile(64, 32, 32, 4, 3),
    Tile(32, 32, 64, 4, 3),
    Tile(16, 32, 64, 2, 3),
    Tile(16, 16, 64, 2, 3),
    Tile(16, 16, 32, 2, 3),
)


@triton.jit
def _input_gradient(
    dy, code, weight0, weight1, by_parent, live, carried, dx,
    parents, samples, w_o, w_c, w_h, w_w,
    BRANCHES: tl.constexpr, C_IN: tl.constexpr, C_OUT: tl.constexpr,
    HEIGHT: tl.constexpr, WIDTH: tl.constexpr, CONV_H: tl.constexpr, CONV_W: tl.constexpr,
    OUT_H: tl.constexpr, OUT_W: tl.constexpr,
    KH: tl.constexpr, KW: tl.constexpr, STRIDE_H: tl.constexpr, STRIDE_W: tl.constexpr,
    PAD_H: tl.constexpr, PAD_W: tl.constexpr, POOL: tl.constexpr, POOL_PAD: tl.constexpr,
    HAS_CODE: tl.constexpr, HAS_LIVE: tl.constexpr, HAS_CARRIED: tl.constexpr,
    COVERS: tl.constexpr, PRECISION: tl.constexpr, WIDE: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, DEPTH: tl.constexpr,
):  # fmt: skip
    index: tl.constexpr = tl.int64 if WIDE else tl.int32
    operand: tl.constexpr = dy.dtype.element_ty
    TAPS: tl.constexpr = 1 if COVERS else KH * KW
    STEPS: tl.constexpr = (C_OUT + DEPTH - 1) // DEPTH
    WIDE_AS: tl.constexpr = KH * KW * C_IN if COVERS else C_IN
    PIXELS: tl.constexpr = 1 if COVERS else HEIGHT * WIDTH
    pixel = tl.program_id(0).to(index) * ROWS + tl.arange(0, ROWS)
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    inside = pixel < parents.to(index) * samples * PIXELS
    used = column < WIDE_AS
    if COVERS:
        ih = tl.zeros((ROWS,), index)
        iw = ih
        own_tap = column // C_IN
        weight = column % C_IN * w_c + own_tap // KW * w_h + own_tap % KW * w_w
    else:
        ih = pixel // WIDTH % HEIGHT
        iw = pixel % WIDTH
        weight = column * w_c
    slot = pixel // PIXELS // samples
    n = pixel // PIXELS - slot * samples
    entry = by_parent + slot * (1 + BRANCHES)
    parent = tl.load(entry, mask=inside, other=0).to(index)
    # of dx, computed here because what it is made of would be held in more registers
    dx_offset = (pixel + (parent - slot) * samples * PIXELS) * WIDE_AS
    row0 = live_row(entry + 1, inside, live, HAS_LIVE).to(index)
    any0 = tl.max(row0, axis=0) >= 0
    image0 = row0 * samples + n  # negative where there is no row
    image1 = image0
    begin = 0
    end = tl.where(any0, TAPS * STEPS, 0)
    if BRANCHES == 2:
        row1 = live_row(entry + 2, inside, live, HAS_LIVE).to(index)
        any1 = tl.max(row1, axis=0) >= 0
        image1 = row1 * samples + n
        begin = tl.where(any0, 0, TAPS * STEPS)
        end = tl.where(any1, 2 * TAPS * STEPS, TAPS * STEPS)

    total = tl.zeros((ROWS, COLUMNS), tl.float32)
    for step in range(begin, end):
        image = image0
        filters_at = weight0
        if BRANCHES == 2:
            image = tl.where(step >= TAPS * STEPS, image1, image0)
            filters_at = tl.where(step >= TAPS * STEPS, weight1, weight0)
        tap = step // STEPS % TAPS
        channel = step % STEPS * DEPTH + tl.arange(0, DEPTH)
        # the convolution's output pixel that reads this input pixel through this tap
        oh = ih + PAD_H - tap // KW
        ow = iw + PAD_W - tap % KW
        there = (image >= 0) & (oh >= 0) & (ow >= 0)
        if STRIDE_H > 1:
            there = there & (oh % STRIDE_H == 0)
            oh = oh // STRIDE_H
        if STRIDE_W > 1:
            there = there & (ow % STRIDE_W == 0)
            ow = ow // STRIDE_W
        there = there & (oh < CONV_H) & (ow < CONV_W)
        oh += POOL_PAD
        ow += POOL_PAD
        ho = oh // POOL
        wo = ow // POOL
        there = there & (ho < OUT_H) & (wo < OUT_W)
        at = ((image * OUT_H + ho) * OUT_W + wo) * C_OUT
        read = there[:, None]
        read_w = used[None, :]
        if C_OUT % DEPTH != 0:
            read = read & (channel < C_OUT)[None, :]
            read_w = read_w & (channel < C_OUT)[:, None]
        offset = at[:, None] + channel[None, :]
        gradient = tl.load(dy + offset, mask=read, other=0.0)
        if HAS_CODE:
            won = tl.load(code + offset, mask=read, other=0)  # where dy is 0 anyway
            position = oh % POOL * POOL + ow % POOL
            gradient = tl.where(won == position[:, None], gradient, 0.0)
        w_at = filters_at + channel.to(index) * w_o + tap // KW * w_h + tap % KW * w_w
        filters = tl.load(w_at[:, None] + weight[None, :], mask=read_w, other=0.0).to(operand)
        total = tl.dot(gradient, filters, total, input_precision=PRECISION)

    at = dx_offset[:, None] + column[None, :]
    keep = inside[:, None] & used[None, :]
    if HAS_CARRIED:
        total += tl.load(carried + at, mask=keep, other=0.0).to(tl.float32)
    tl.store(dx + at, total.to(dx.dtype.element_ty), mask=keep)


@triton.jit
def live_row(entry, inside, live, HAS_LIVE: tl.constexpr):
    """The rows at ``entry``, negative where there is none or it is not live."""
    row = tl.load(entry, mask=inside, other=-1)
    if HAS_LIVE:
        alive = tl.load(live + row, mask=row >= 0, other=0)
        row = tl.where(alive != 0, row, -1)
    return row


@triton.jit
def skip_gradient(
    tile, dy, code, by_skip, live, dskip, skips, sharing, samples,
    C_OUT: tl.constexpr, CONV_H: tl.constexpr, CONV_W: tl.constexpr,
    OUT_H: tl.constexpr, OUT_W: tl.constexpr, POOL: tl.constexpr, POOL_PAD: tl.constexpr,
    HAS_CODE: tl.constexpr, HAS_LIVE: tl.constexpr, SHUT: tl.constexpr, WIDE: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    index: tl.constexpr = tl.int64 if WIDE else tl.int32
    pixel = tile.to(index) * ROWS + tl.arange(0, ROWS)
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    inside = pixel < skips.to(index) * samples * (CONV_H * CONV_W)
    used = column < C_OUT
    oh = pixel // CONV_W % CONV_H + POOL_PAD
    ow = pixel % CONV_W + POOL_PAD
    ho = oh // POOL
    wo = ow // POOL
    position = oh % POOL * POOL + ow % POOL
    n = pixel // (CONV_H * CONV_W) % samples
    entry = by_skip + pixel // (CONV_H * CONV_W) // samples * sharing
    there = inside & (ho < OUT_H) & (wo < OUT_W)
    total = tl.zeros((ROWS, COLUMNS), tl.float32)
    for shared in range(sharing):
        row = live_row(entry + shared, there, live, HAS_LIVE).to(index)
        at = (((row * samples + n) * OUT_H + ho) * OUT_W + wo) * C_OUT
        read = (row >= 0)[:, None] & used[None, :]
        gradient = tl.load(dy + at[:, None] + column[None, :], mask=read, other=0.0)
        if HAS_CODE:
            won = tl.load(code + at[:, None] + column[None, :], mask=read, other=0)
            gradient = tl.where(won % SHUT == position[:, None], gradient, 0.0)
        total += gradient.to(tl.float32)
    at = (pixel * C_OUT)[:, None] + column[None, :]
    tl.store(dskip + at, total.to(dskip.dtype.element_ty), mask=inside[:, None] & used[None, :])


@triton.jit(do_not_specialize=["parents", "input_tiles", "skips", "sharing"])
def level_dgrad_kernel(
    dy, code, weight0, weight1, by_parent, by_skip, live, carried, dx, dskip,
    parents, input_tiles, skips, sharing, samples, w_o, w_c, w_h, w_w,
    BRANCHES: tl.constexpr, C_IN: tl.constexpr, C_OUT: tl.constexpr,
    HEIGHT: tl.constexpr, WIDTH: tl.constexpr, CONV_H: tl.constexpr, CONV_W: tl.constexpr,
    OUT_H: tl.constexpr, OUT_W: tl.constexpr,
    KH: tl.constexpr, KW: tl.constexpr, STRIDE_H: tl.constexpr, STRIDE_W: tl.constexpr,
    PAD_H: tl.constexpr, PAD_W: tl.constexpr, POOL: tl.constexpr, POOL_PAD: tl.constexpr,
    HAS_CODE: tl.constexpr, HAS_LIVE: tl.constexpr, HAS_CARRIED: tl.constexpr,
    HAS_SKIP: tl.constexpr, SKIP_HAS_CODE: tl.constexpr, SHUT: tl.constexpr,
    COVERS: tl.constexpr, PRECISION: tl.constexpr, WIDE: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, DEPTH: tl.constexpr,
    EARLY: tl.constexpr,
):  # fmt: skip
    """dx [P, N, H, W, C] and dskip [S, N, conv_h, conv_w, Co] from dy and code; see level_dgrad.

    COVERS: the kernel lies on all of the image at once, so that every pixel has one tap, its own:
    rows are samples then, and columns are all of a sample's values.
    """
    wait_for_others(EARLY)
    if HAS_SKIP:
        if tl.program_id(0) < input_tiles:
            _input_gradient(
                dy, code, weight0, weight1, by_parent, live, carried, dx,
                parents, samples, w_o, w_c, w_h, w_w,
                BRANCHES, C_IN, C_OUT, HEIGHT, WIDTH, CONV_H, CONV_W, OUT_H, OUT_W,
                KH, KW, STRIDE_H, STRIDE_W, PAD_H, PAD_W, POOL, POOL_PAD,
                HAS_CODE, HAS_LIVE, HAS_CARRIED, COVERS, PRECISION, WIDE, ROWS, COLUMNS, DEPTH,
            )  # fmt: skip
        else:
            skip_gradient(
                tl.program_id(0) - input_tiles, dy, code, by_skip, live, dskip,
                skips, sharing, samples, C_OUT, CONV_H, CONV_W, OUT_H, OUT_W, POOL, POOL_PAD,
                SKIP_HAS_CODE, HAS_LIVE, SHUT, WIDE, ROWS, COLUMNS,
            )  # fmt: skip
    else:
        _input_gradient(
            dy, code, weight0, weight1, by_parent, live, carried, dx,
            parents, samples, w_o, w_c, w_h, w_w,
            BRANCHES, C_IN, C_OUT, HEIGHT, WIDTH, CONV_H, CONV_W, OUT_H, OUT_W,
            KH, KW, STRIDE_H, STRIDE_W, PAD_H, PAD_W, POOL, POOL_PAD,
            HAS_CODE, HAS_LIVE, HAS_CARRIED, COVERS, PRECISION, WIDE, ROWS, COLUMNS, DEPTH,
        )  # fmt: skip


def level_dgrad(
    dy: Tensor,
    code: Tensor,
    weights: list[Tensor],
    rows: Tables,
    x_shape: tuple[int, ...],
    geometry: Geometry,
    dtype: torch.dtype,
    *,
    live: Tensor | None = None,
    carried: Tensor | None = None,
    skip_dtype: torch.dtype | None = None,
    tf32: bool = False,
    tile: Tile | None = None,
) -> tuple[Tensor, Tensor]:
    """The gradients of a level's input and of its skip: one launch.

    Args:
        dy: ``[R, N, out_h, out_w, Co]``, contiguous; its dtype is that of the product.
        code: of the forward.
        weights: one ``[Co, C, KH, KW]`` per branch, any strides.
        rows: the R rows.
        x_shape: ``(P, N, H, W, C)``.
        geometry: the level's sizes.
        dtype: of the input's gradient.
        live: bool ``[R]``: other rows count as ``dy`` = 0 and are not read; None: all are.
        carried: ``x_shape``, contiguous, added to the input's gradient; or None.
        skip_dtype: of the skip's gradient; None: it is not asked for.
        tf32: whether a float32 product may round its operands to TF32.
        tile: block sizes; None: chosen by shape.

    Returns:
        ``[P, N, H, W, C]``, contiguous, and ``[S, N, conv_h, conv_w, Co]``, contiguous, or empty
        without ``skip_dtype``.
    """
    weights = same_strides(weights)
    dx = dy.new_empty(x_shape, dtype=dtype)
    dskip = skip_buffer(dy, rows, geometry, skip_dtype)
    if dx.numel() == 0 and dskip.numel() == 0:
        return dx, dskip
    live = code if live is None else live.view(torch.uint8)  # never read where there is none
    launch = _launch(
        tuple(dy.shape), tuple(x_shape), len(weights), tuple(weights[0].shape),
        weights[0].stride(), geometry, live is not code, carried is not None,
        skip_dtype is not None, tuple(rows.by_skip.shape), dy.dtype, tf32, tile, dy.device,
    )  # fmt: skip
    launch(
        dy, code, weights[0], weights[-1], rows.by_parent, rows.by_skip, live,
        dx if carried is None else carried, dx, dskip,
    )  # fmt: skip
    return dx, dskip


@kept
def _launch(
    dy: tuple[int, ...], x: tuple[int, ...], branches: int, weight: tuple[int, ...],
    strides: tuple[int, ...], geometry: Geometry, has_live: bool, has_carried: bool,
    has_skip: bool, by_skip: tuple[int, int], dtype: torch.dtype, tf32: bool, tile: Tile | None,
    device: torch.device,
) -> Launch:  # fmt: skip
    parents, samples, height, width, _ = x
    channels_out, channels, kh, kw = weight
    covers = geometry.covers(x, weight)
    lines, columns = parents * samples * height * width, channels
    if covers:
        lines, columns = parents * samples, height * width * channels
    if tile is None:
        tiles = FMA_TILES if dtype == torch.float32 and not tf32 else TENSOR_CORE_TILES
        tile = default(fitting(tiles, lines, columns, channels_out), lines, columns)
    input_tiles, column_tiles = cdiv(lines, tile.rows), cdiv(columns, tile.columns)
    skip_pixels = by_skip[0] * samples * geometry.conv_h * geometry.conv_w if has_skip else 0
    if has_skip:
        column_tiles = max(column_tiles, cdiv(channels_out, tile.columns))
    offsets = prod(dy), prod(x), skip_pixels * channels_out, reach(weight, strides)
    return Launch(
        level_dgrad_kernel, (input_tiles + cdiv(skip_pixels, tile.rows), column_tiles),
        (parents, input_tiles, *by_skip, samples, *strides),
        BRANCHES=branches, C_IN=channels, C_OUT=channels_out,
        HEIGHT=height, WIDTH=width, CONV_H=geometry.conv_h, CONV_W=geometry.conv_w,
        OUT_H=geometry.out_h, OUT_W=geometry.out_w, KH=kh, KW=kw,
        STRIDE_H=geometry.stride_h, STRIDE_W=geometry.stride_w,
        PAD_H=geometry.pad_h, PAD_W=geometry.pad_w,
        POOL=geometry.pool, POOL_PAD=geometry.pool_pad,
        HAS_CODE=geometry.has_code, HAS_LIVE=has_live, HAS_CARRIED=has_carried,
        HAS_SKIP=has_skip, SKIP_HAS_CODE=geometry.skip_has_code, SHUT=SHUT, COVERS=covers,
        PRECISION="tf32" if tf32 else "ieee",
        WIDE=passes_int32(*offsets, max(lines, skip_pixels) + tile.rows),
        ROWS=tile.rows, COLUMNS=tile.columns, DEPTH=tile.depth,
        num_warps=tile.warps, num_stages=tile.stages, **early(device),
    )  # fmt: skip
