"""Level backward to the input, and to a skip, operands read in boxes (TMA, sm_90): one launch.

As :mod:`lasem_fast.kernels.level_dgrad`, from the gradient of the convolution at full size.
"""

from __future__ import annotations

from math import prod

import torch
import triton
import triton.language as tl
from torch import Tensor

from lasem_fast.kernels.box_form import Filters
from lasem_fast.kernels.boxes import TILES as TILES
from lasem_fast.kernels.boxes import Convolution, Taps, met_taps, tiled
from lasem_fast.kernels.early_launch import early, wait_for_others
from lasem_fast.kernels.kept import kept
from lasem_fast.kernels.launches import Launch
from lasem_fast.kernels.level_dgrad import live_row, skip_gradient
from lasem_fast.kernels.level_geometry import SHUT, Geometry, passes_int32, skip_buffer
from lasem_fast.kernels.level_rows import Tables
from lasem_fast.kernels.level_tiles import Tile, cdiv


@triton.jit
def _input_gradient(
    box, dz, weights, by_parent, live, carried, dx, samples,
    BRANCHES: tl.constexpr, C_IN: tl.constexpr, C_OUT: tl.constexpr,
    HEIGHT: tl.constexpr, WIDTH: tl.constexpr, CONV_H: tl.constexpr, CONV_W: tl.constexpr,
    KH: tl.constexpr, KW: tl.constexpr, PAD_H: tl.constexpr, PAD_W: tl.constexpr,
    HAS_LIVE: tl.constexpr, HAS_CARRIED: tl.constexpr, ALL_TAPS: tl.constexpr, WIDE: tl.constexpr,
    IMAGES: tl.constexpr, BOX_H: tl.constexpr, BOX_W: tl.constexpr,
    COLUMNS: tl.constexpr, DEPTH: tl.constexpr,
):  # fmt: skip
    index: tl.constexpr = tl.int64 if WIDE else tl.int32
    ROWS: tl.constexpr = IMAGES * BOX_H * BOX_W
    BLOCKS: tl.constexpr = (C_OUT + DEPTH - 1) // DEPTH
    BOXES_X: tl.constexpr = (WIDTH + BOX_W - 1) // BOX_W
    BOXES_Y: tl.constexpr = (HEIGHT + BOX_H - 1) // BOX_H
    iw0 = box % BOXES_X * BOX_W
    ih0 = box // BOXES_X % BOXES_Y * BOX_H
    block = box // (BOXES_X * BOXES_Y)
    n0 = block % tl.cdiv(samples, IMAGES) * IMAGES
    entry = by_parent + block // tl.cdiv(samples, IMAGES) * (1 + BRANCHES)
    parent = tl.load(entry)
    row0 = live_row(entry + 1, True, live, HAS_LIVE)
    row1 = row0
    # taps turned around: the first one reads the furthest
    kh0, down, kw0, across = 0, KH, 0, KW
    if not ALL_TAPS:
        kh0, down = met_taps(ih0, BOX_H, KH, PAD_H - KH + 1, CONV_H)
        kw0, across = met_taps(iw0, BOX_W, KW, PAD_W - KW + 1, CONV_W)
    steps = down * across * BLOCKS
    begin = 0
    end = tl.where(row0 >= 0, steps, 0)
    if BRANCHES == 2:
        row1 = live_row(entry + 2, True, live, HAS_LIVE)
        begin = tl.where(row0 >= 0, 0, steps)
        end = tl.where(row1 >= 0, 2 * steps, steps)
    column0 = tl.program_id(1) * COLUMNS

    total = tl.zeros((ROWS, COLUMNS), tl.float32)
    for step in range(begin, end):
        row = row0
        filter0 = step % BLOCKS * DEPTH
        channel = filter0
        if BRANCHES == 2:
            row = tl.where(step >= steps, row1, row0)
            filter0 += tl.where(step >= steps, C_OUT, 0)
        number = step // BLOCKS % (down * across)
        kh = KH - 1 - kh0 - number // across
        kw = KW - 1 - kw0 - number % across
        tap = kh * KW + kw
        # the convolution's output pixels that read these input pixels through this tap
        oh = ih0 + PAD_H - kh
        ow = iw0 + PAD_W - kw
        gradient = tl.reshape(dz.load([row, n0, oh, ow, channel]), (ROWS, DEPTH))
        # beyond a branch's filters come those of the next one, which meet zeros
        filters = tl.reshape(weights.load([filter0, tap, column0]), (DEPTH, COLUMNS))
        total = tl.dot(gradient, filters, total)

    pixel = tl.arange(0, ROWS)
    n = n0 + pixel // (BOX_H * BOX_W)
    ih = ih0 + pixel // BOX_W % BOX_H
    iw = iw0 + pixel % BOX_W
    column = column0 + tl.arange(0, COLUMNS)
    image = parent.to(index) * samples + n
    at = (((image * HEIGHT + ih) * WIDTH + iw) * C_IN)[:, None] + column[None, :]
    keep = ((n < samples) & (ih < HEIGHT) & (iw < WIDTH))[:, None] & (column < C_IN)[None, :]
    if HAS_CARRIED:
        total += tl.load(carried + at, mask=keep, other=0.0).to(tl.float32)
    tl.store(dx + at, total.to(dx.dtype.element_ty), mask=keep)


@triton.jit(do_not_specialize=["boxes", "skips", "sharing"])
def box_dgrad_kernel(
    dz, weights, by_parent, live, carried, dx, dy, code, by_skip, dskip,
    boxes, skips, sharing, samples,
    BRANCHES: tl.constexpr, C_IN: tl.constexpr, C_OUT: tl.constexpr,
    HEIGHT: tl.constexpr, WIDTH: tl.constexpr, CONV_H: tl.constexpr, CONV_W: tl.constexpr,
    OUT_H: tl.constexpr, OUT_W: tl.constexpr, KH: tl.constexpr, KW: tl.constexpr,
    PAD_H: tl.constexpr, PAD_W: tl.constexpr, POOL: tl.constexpr, POOL_PAD: tl.constexpr,
    HAS_LIVE: tl.constexpr, HAS_CARRIED: tl.constexpr,
    HAS_SKIP: tl.constexpr, SKIP_HAS_CODE: tl.constexpr, SHUT: tl.constexpr,
    ALL_TAPS: tl.constexpr, WIDE: tl.constexpr,
    IMAGES: tl.constexpr, BOX_H: tl.constexpr, BOX_W: tl.constexpr,
    COLUMNS: tl.constexpr, DEPTH: tl.constexpr,
    EARLY: tl.constexpr,
):  # fmt: skip
    """dx [P, N, H, W, C] and dskip [S, N, conv_h, conv_w, Co]; see box_dgrad."""
    wait_for_others(EARLY)
    ROWS: tl.constexpr = IMAGES * BOX_H * BOX_W
    box = tl.program_id(0)
    if HAS_SKIP:
        if box < boxes:
            _input_gradient(
                box, dz, weights, by_parent, live, carried, dx, samples,
                BRANCHES, C_IN, C_OUT, HEIGHT, WIDTH, CONV_H, CONV_W, KH, KW, PAD_H, PAD_W,
                HAS_LIVE, HAS_CARRIED, ALL_TAPS, WIDE, IMAGES, BOX_H, BOX_W, COLUMNS, DEPTH,
            )  # fmt: skip
        else:
            skip_gradient(
                box - boxes, dy, code, by_skip, live, dskip, skips, sharing, samples,
                C_OUT, CONV_H, CONV_W, OUT_H, OUT_W, POOL, POOL_PAD,
                SKIP_HAS_CODE, HAS_LIVE, SHUT, WIDE, ROWS, COLUMNS,
            )  # fmt: skip
    else:
        _input_gradient(
            box, dz, weights, by_parent, live, carried, dx, samples,
            BRANCHES, C_IN, C_OUT, HEIGHT, WIDTH, CONV_H, CONV_W, KH, KW, PAD_H, PAD_W,
            HAS_LIVE, HAS_CARRIED, ALL_TAPS, WIDE, IMAGES, BOX_H, BOX_W, COLUMNS, DEPTH,
        )  # fmt: skip


def box_dgrad(
    dz: Tensor,
    filters: Filters,
    rows: Tables,
    x_shape: tuple[int, ...],
    geometry: Geometry,
    dtype: torch.dtype,
    dy: Tensor,
    code: Tensor,
    *,
    live: Tensor | None = None,
    carried: Tensor | None = None,
    skip_dtype: torch.dtype | None = None,
    tile: Tile | None = None,
) -> tuple[Tensor, Tensor]:
    """The gradients of a level's input and of its skip: one launch.

    Args:
        dz: ``[R, N, conv_h, conv_w, Co]``, contiguous: the gradient of the convolution.
        filters: by :func:`~lasem_fast.kernels.weight_copies.weight_copies`.
        rows, x_shape, geometry, dtype: as in :func:`~lasem_fast.kernels.level_dgrad.level_dgrad`,
            in the form that boxes are read of, and so are the others.
        dy: ``[R, N, out_h, out_w, Co]``, contiguous, from which the skip's gradient is made.
        code: of the forward.
        live, carried, skip_dtype: likewise.
        tile: block sizes; None: chosen by shape.

    Returns:
        As :func:`~lasem_fast.kernels.level_dgrad.level_dgrad`.
    """
    dx = dz.new_empty(x_shape, dtype=dtype)
    dskip = skip_buffer(dy, rows, geometry, skip_dtype)
    live = code if live is None else live.view(torch.uint8)  # never read where there is none
    launch = _launch(
        tuple(x_shape), filters.branches, filters.channels_out, filters.kernel, geometry,
        tuple(dy.shape), live is not code, carried is not None, skip_dtype is not None,
        tuple(rows.by_skip.shape), tile, dz.device,
    )  # fmt: skip
    launch(
        dz, filters.data, rows.by_parent, live, dx if carried is None else carried, dx, dy, code,
        rows.by_skip, dskip,
    )  # fmt: skip
    return dx, dskip


@kept
def _launch(
    x: tuple[int, ...], branches: int, channels_out: int, kernel: tuple[int, int],
    geometry: Geometry, dy: tuple[int, ...], has_live: bool, has_carried: bool, has_skip: bool,
    by_skip: tuple[int, int], tile: Tile | None, device: torch.device,
) -> Launch:  # fmt: skip
    parents, samples, height, width, channels = x
    kh, kw = kernel
    size = samples, height, width
    taps = Convolution(
        Taps(kh, geometry.pad_h - kh + 1, geometry.conv_h),
        Taps(kw, geometry.pad_w - kw + 1, geometry.conv_w),
    )

    tile, box, all_taps = tiled(
        parents, size, channels, channels_out, taps, sums=branches, tile=tile
    )
    lines = parents * prod(size)
    boxes, column_tiles = parents * prod(box.counts(*size)), cdiv(channels, tile.columns)
    skip_pixels = by_skip[0] * samples * geometry.conv_h * geometry.conv_w if has_skip else 0
    if has_skip:
        column_tiles = max(column_tiles, cdiv(channels_out, tile.columns))
    return Launch(
        box_dgrad_kernel, (boxes + cdiv(skip_pixels, tile.rows), column_tiles),
        (boxes, *by_skip, samples),
        blocks=((1, *box, tile.depth), (tile.depth, 1, tile.columns)),
        BRANCHES=branches, C_IN=channels, C_OUT=channels_out,
        HEIGHT=height, WIDTH=width, CONV_H=geometry.conv_h, CONV_W=geometry.conv_w,
        OUT_H=geometry.out_h, OUT_W=geometry.out_w, KH=kh, KW=kw,
        PAD_H=geometry.pad_h, PAD_W=geometry.pad_w,
        POOL=geometry.pool, POOL_PAD=geometry.pool_pad,
        HAS_LIVE=has_live, HAS_CARRIED=has_carried, HAS_SKIP=has_skip,
        SKIP_HAS_CODE=geometry.skip_has_code, SHUT=SHUT,
        ALL_TAPS=all_taps,
        WIDE=passes_int32(prod(x), prod(dy), skip_pixels * channels_out, lines),
        IMAGES=box.images, BOX_H=box.height, BOX_W=box.width, COLUMNS=tile.columns,
        DEPTH=tile.depth, num_warps=tile.warps, num_stages=tile.stages, **early(device),
    )  # fmt: skip
