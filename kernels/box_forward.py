"""Level forward whose operands are read in boxes (TMA, sm_90): one launch or two.

As :mod:`lasem_fast.kernels.level_forward`, for stride 1 and products of 16 bits. A program computes
the convolution on a box of pixels of one row, and a pool of 2 from registers. Windows of 3 do not
fill boxes: their pool is a launch of its own. Where there would be few programs, several share a
sum, see :mod:`lasem_fast.kernels.parts`.
"""

from __future__ import annotations

from functools import cache
from math import prod
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from lasem_fast.kernels.box_form import Filters
from lasem_fast.kernels.box_pool import box_pool
from lasem_fast.kernels.boxes import (
    ADDING,
    Box,
    Convolution,
    Taps,
    Work,
    met_taps,
    tiled,
    work_of,
)
from lasem_fast.kernels.boxes import TILES as TILES
from lasem_fast.kernels.early_launch import early, wait_for_others
from lasem_fast.kernels.kept import kept
from lasem_fast.kernels.launches import Launch
from lasem_fast.kernels.level_geometry import CLOSED, SHUT, Geometry, passes_int32, reach
from lasem_fast.kernels.level_rows import Tables
from lasem_fast.kernels.level_tiles import MOST_SHARED, Tile, cdiv
from lasem_fast.kernels.parts import (
    added_up,
    group_of,
    groups_of,
    is_last,
    parts_at_once,
    place_in,
)

# Programs that share a sum, at most, and steps of it that are worth a program of its own.
_MOST_PARTS, _STEPS = 16, 2
# Nanoseconds until the last of them knows that it is, and has begun to add up.
_ARRIVING = 3500.0


@triton.jit
def _windows(total, IMAGES: tl.constexpr, BOX_H: tl.constexpr, BOX_W: tl.constexpr,
             COLUMNS: tl.constexpr):  # fmt: skip
    """The four positions of every 2 x 2 window of a box, ``[windows, COLUMNS]`` each."""
    WINDOWS: tl.constexpr = IMAGES * BOX_H * BOX_W // 4
    parts = tl.reshape(total, (IMAGES, BOX_H // 2, 2, BOX_W // 2, 2, COLUMNS))
    left, right = tl.split(tl.permute(parts, (0, 1, 3, 5, 2, 4)))
    top_left, low_left = tl.split(left)
    top_right, low_right = tl.split(right)
    return (
        tl.reshape(top_left, (WINDOWS, COLUMNS)),
        tl.reshape(top_right, (WINDOWS, COLUMNS)),
        tl.reshape(low_left, (WINDOWS, COLUMNS)),
        tl.reshape(low_right, (WINDOWS, COLUMNS)),
    )


@triton.jit
def _better(best, winner, total, name, valid, ENDS_CLOSED: tl.constexpr, CLOSED: tl.constexpr):
    """The running maximum and its code with one more position."""
    # NaN wins, as in PyTorch: a configuration that overflows has to show
    take = (total > best) | (total != total)
    if not ENDS_CLOSED:
        take = take | (winner == CLOSED)
    take = take & valid
    return tl.where(take, total, best), tl.where(take, name, winner)


@triton.jit(do_not_specialize=["count0"])
def box_forward_kernel(
    x, weights, bias0, bias1, skip, by_branch, y, code, parts, arrivals, count0, samples,
    s_s, s_n, s_h, s_w, s_c,
    BRANCHES: tl.constexpr, C_IN: tl.constexpr, C_OUT: tl.constexpr,
    HEIGHT: tl.constexpr, WIDTH: tl.constexpr,
    CONV_H: tl.constexpr, CONV_W: tl.constexpr, OUT_H: tl.constexpr, OUT_W: tl.constexpr,
    KH: tl.constexpr, KW: tl.constexpr, PAD_H: tl.constexpr, PAD_W: tl.constexpr,
    POOL: tl.constexpr, POOL_PAD: tl.constexpr, RELU: tl.constexpr, RELU_AFTER: tl.constexpr,
    HAS_BIAS: tl.constexpr, HAS_SKIP: tl.constexpr, CLOSED: tl.constexpr, SHUT: tl.constexpr,
    ALL_TAPS: tl.constexpr, PARTS: tl.constexpr, GROUP: tl.constexpr, AT_ONCE: tl.constexpr,
    WIDE: tl.constexpr,
    IMAGES: tl.constexpr, BOX_H: tl.constexpr, BOX_W: tl.constexpr,
    COLUMNS: tl.constexpr, DEPTH: tl.constexpr,
    EARLY: tl.constexpr,
):  # fmt: skip
    """y [R, N, out_h, out_w, Co] and its code from x [P, N, H, W, C]; see box_forward.

    PARTS > 1: by way of so many parts [S + G, R, N, conv_h, conv_w, Co], sums of groups behind
    them.
    """
    wait_for_others(EARLY)
    index: tl.constexpr = tl.int64 if WIDE else tl.int32
    ROWS: tl.constexpr = IMAGES * BOX_H * BOX_W
    STEPS: tl.constexpr = (C_IN + DEPTH - 1) // DEPTH
    BOXES_X: tl.constexpr = (OUT_W * POOL + BOX_W - 1) // BOX_W
    BOXES_Y: tl.constexpr = (OUT_H * POOL + BOX_H - 1) // BOX_H
    ENDS_CLOSED: tl.constexpr = RELU_AFTER if HAS_SKIP else RELU
    box = tl.program_id(0)
    ow0 = box % BOXES_X * BOX_W - POOL_PAD
    oh0 = box // BOXES_X % BOXES_Y * BOX_H - POOL_PAD
    image_blocks = tl.cdiv(samples, IMAGES)
    block = box // (BOXES_X * BOXES_Y)
    n0 = block % image_blocks * IMAGES
    entry = block // image_blocks
    row = tl.load(by_branch + entry * 3)
    parent = tl.load(by_branch + entry * 3 + 1)
    filter0 = tl.program_id(1) * COLUMNS
    column = filter0 + tl.arange(0, COLUMNS)
    used = column < C_OUT
    bias_at = bias0
    if BRANCHES == 2:
        second = entry >= count0
        bias_at = tl.where(second, bias1, bias0)
        filter0 += tl.where(second, C_OUT, 0)

    kh0, down, kw0, across = 0, KH, 0, KW
    if not ALL_TAPS:
        kh0, down = met_taps(oh0, BOX_H, KH, -PAD_H, HEIGHT)
        kw0, across = met_taps(ow0, BOX_W, KW, -PAD_W, WIDTH)
    total = tl.zeros((ROWS, COLUMNS), tl.float32)
    begin, end = 0, down * across * STEPS
    if PARTS > 1:
        share = tl.cdiv(end, PARTS)
        begin = tl.program_id(2) * share
        end = tl.minimum(begin + share, end)
    for step in range(begin, end):
        number = step // STEPS
        channel = step % STEPS * DEPTH
        # a division by 0, even one whose result is not used, frees the compiler to copy boxes that
        # nobody reads
        kh = kh0 + number // tl.maximum(1, across)
        kw = kw0 + number % tl.maximum(1, across)
        tap = kh * KW + kw
        ih = oh0 - PAD_H + kh
        iw = ow0 - PAD_W + kw
        values = tl.reshape(x.load([parent, n0, ih, iw, channel]), (ROWS, DEPTH))
        filters = tl.reshape(weights.load([filter0, tap, channel]), (COLUMNS, DEPTH))
        total = tl.dot(values, filters.T, total)

    pixel = tl.arange(0, ROWS)
    ph = pixel // BOX_W % BOX_H
    pw = pixel % BOX_W
    n = n0 + pixel // (BOX_H * BOX_W)
    oh = oh0 + ph
    ow = ow0 + pw
    valid = (n < samples) & (oh >= 0) & (oh < CONV_H) & (ow >= 0) & (ow < CONV_W)
    if PARTS > 1:
        image = row.to(index) * samples + n
        at = (((image * CONV_H + oh) * CONV_W + ow) * C_OUT)[:, None] + column[None, :]
        rows = tl.num_programs(0) // (image_blocks * (BOXES_X * BOXES_Y))
        size = rows.to(index) * samples * (CONV_H * CONV_W * C_OUT)
        keep = valid[:, None] & used[None, :]
        parts += at
        tl.store(parts + tl.program_id(2) * size, total, mask=keep)
        group, in_group, groups = place_in(tl.program_id(2), PARTS, GROUP)
        arrivals += (box * tl.num_programs(1) + tl.program_id(1)) * (1 + groups)
        if not is_last(arrivals + group, in_group):
            return
        total = added_up(parts + group * GROUP * size, keep, in_group, size, AT_ONCE)
        if GROUP > 0:
            parts += PARTS * size
            tl.store(parts + group * size, total, mask=keep)
            if not is_last(arrivals + groups, groups):
                return
            total = added_up(parts, keep, groups, size, AT_ONCE)
    if HAS_BIAS:
        total += tl.load(bias_at + column, mask=used, other=0.0).to(tl.float32)[None, :]
    name = (ph % POOL * POOL + pw % POOL).to(tl.uint8)
    names = tl.broadcast_to(name[:, None], (ROWS, COLUMNS))
    if HAS_SKIP:
        if RELU:
            shut = total <= 0
            total = tl.where(shut, 0.0, total)
            names = tl.where(shut, names + SHUT, names)
        added = tl.load(by_branch + entry * 3 + 2).to(index)
        s_at = skip + added * s_s + (n.to(index) * s_n + oh * s_h + ow * s_w)[:, None]
        s_at += (column.to(index) * s_c)[None, :]
        keep = valid[:, None] & used[None, :]
        total += tl.load(s_at, mask=keep, other=0.0).to(tl.float32)

    start: tl.constexpr = 0.0 if ENDS_CLOSED else float("-inf")
    if POOL == 1:
        best = tl.full((ROWS, COLUMNS), start, tl.float32)
        winner = tl.full((ROWS, COLUMNS), CLOSED, tl.uint8)
        best, winner = _better(best, winner, total, names, valid[:, None], ENDS_CLOSED, CLOSED)
        ho = oh
        wo = ow
    else:
        WINDOWS: tl.constexpr = ROWS // 4
        window = tl.arange(0, WINDOWS)
        wh = window // (BOX_W // 2) % (BOX_H // 2)
        ww = window % (BOX_W // 2)
        n = n0 + window // (BOX_H * BOX_W // 4)
        top = oh0 + 2 * wh
        left = ow0 + 2 * ww
        ho = (oh0 + POOL_PAD) // 2 + wh
        wo = (ow0 + POOL_PAD) // 2 + ww
        above = (top >= 0) & (top < CONV_H)
        below = (top >= -1) & (top < CONV_H - 1)
        before = (left >= 0) & (left < CONV_W)
        behind = (left >= -1) & (left < CONV_W - 1)
        best = tl.full((WINDOWS, COLUMNS), start, tl.float32)
        winner = tl.full((WINDOWS, COLUMNS), CLOSED, tl.uint8)
        t0, t1, t2, t3 = _windows(total, IMAGES, BOX_H, BOX_W, COLUMNS)
        if HAS_SKIP and RELU:
            c0, c1, c2, c3 = _windows(names, IMAGES, BOX_H, BOX_W, COLUMNS)
        else:
            c0 = tl.full((WINDOWS, COLUMNS), 0, tl.uint8)
            c1 = tl.full((WINDOWS, COLUMNS), 1, tl.uint8)
            c2 = tl.full((WINDOWS, COLUMNS), 2, tl.uint8)
            c3 = tl.full((WINDOWS, COLUMNS), 3, tl.uint8)
        in0 = (above & before)[:, None]
        in1 = (above & behind)[:, None]
        in2 = (below & before)[:, None]
        in3 = (below & behind)[:, None]
        best, winner = _better(best, winner, t0, c0, in0, ENDS_CLOSED, CLOSED)
        best, winner = _better(best, winner, t1, c1, in1, ENDS_CLOSED, CLOSED)
        best, winner = _better(best, winner, t2, c2, in2, ENDS_CLOSED, CLOSED)
        best, winner = _better(best, winner, t3, c3, in3, ENDS_CLOSED, CLOSED)

    image = row.to(index) * samples + n
    at = (((image * OUT_H + ho) * OUT_W + wo) * C_OUT)[:, None] + column[None, :]
    keep = ((n < samples) & (ho >= 0) & (ho < OUT_H) & (wo >= 0) & (wo < OUT_W))[:, None]
    keep = keep & used[None, :]
    tl.store(y + at, best.to(y.dtype.element_ty), mask=keep)
    if RELU or RELU_AFTER or POOL > 1:
        tl.store(code + at, winner, mask=keep)


def box_forward(
    x: Tensor,
    filters: Filters,
    biases: list[Tensor],
    skip: Tensor | None,
    rows: Tables,
    geometry: Geometry,
    tile: Tile | None = None,
) -> tuple[Tensor, Tensor]:
    """Runs a level that :func:`~lasem_fast.kernels.boxes.why_not` says "" of.

    Args:
        x: ``[P, N, H, W, C]``, in the form that boxes are read of, and so are the others.
        filters: by :func:`~lasem_fast.kernels.weight_copies.weight_copies`.
        biases: one contiguous ``[Co]`` per branch, or none.
        skip: ``[S, N, conv_h, conv_w, Co]``, any strides, or None.
        rows: the R rows.
        geometry: the level's sizes.
        tile: block sizes; None: chosen by shape.

    Returns:
        ``y`` and its code, as :func:`~lasem_fast.kernels.level_forward.level_forward`.
    """
    if geometry.pool > 2:
        whole = geometry._replace(
            pool=1, pool_pad=0, out_h=geometry.conv_h, out_w=geometry.conv_w, relu=0
        )
        z, _ = box_forward(x, filters, biases, skip, rows, whole, tile)
        return box_pool(z, geometry)
    added = x if skip is None else skip  # never read where there is none
    biased = biases or [x]  # likewise
    work = _work(
        tuple(x.shape), filters.branches, filters.channels_out, filters.kernel, rows.counts,
        geometry, bool(biases), None if skip is None else tuple(skip.shape), added.stride(), tile,
        x.device,
    )  # fmt: skip
    y, parts = x.new_empty(work.y), x.new_empty(work.parts, dtype=torch.float32)
    code = x.new_empty(work.code, dtype=torch.uint8)
    work.launch(
        x, filters.data, biased[0], biased[-1], added, rows.by_branch, y, code, parts,
        filters.arrivals,
    )  # fmt: skip
    return y, code


class _Work(NamedTuple):
    """The launch, and the shapes of what it writes."""

    launch: Launch
    y: tuple[int, ...]
    code: tuple[int, ...]
    parts: tuple[int, ...]


@kept
def _work(
    x: tuple[int, ...], branches: int, columns: int, kernel: tuple[int, int],
    counts: tuple[int, ...], geometry: Geometry, has_bias: bool, skip: tuple[int, ...] | None,
    skip_strides: tuple[int, ...], tile: Tile | None, device: torch.device,
) -> _Work:  # fmt: skip
    _, samples, height, width, channels = x
    (kh, kw), pool, rows = kernel, geometry.pool, sum(counts)
    shape = rows, samples, geometry.out_h, geometry.out_w, columns
    size = samples, geometry.out_h * pool, geometry.out_w * pool
    taps = Convolution(
        Taps(kh, -geometry.pad_h, height), Taps(kw, -geometry.pad_w, width), -geometry.pool_pad
    )

    tile, box, all_taps = tiled(rows, size, columns, channels, taps, least=pool, tile=tile)
    boxes, lines = prod(box.counts(*size)), rows * prod(size)
    cut = _parts(rows, size, columns, channels, taps, tile, box, pool > 1 or skip is not None)
    parts = (0,) if cut == 1 else (cut + groups_of(cut), *shape)
    code = shape if geometry.has_code else (0,)
    launch = Launch(
        box_forward_kernel, (rows * boxes, cdiv(columns, tile.columns), cut),
        (counts[0], samples, *skip_strides),
        blocks=((1, *box, tile.depth), (tile.columns, 1, tile.depth)),
        BRANCHES=branches, C_IN=channels, C_OUT=columns, HEIGHT=height, WIDTH=width,
        CONV_H=geometry.conv_h, CONV_W=geometry.conv_w,
        OUT_H=geometry.out_h, OUT_W=geometry.out_w, KH=kh, KW=kw,
        PAD_H=geometry.pad_h, PAD_W=geometry.pad_w, POOL=pool, POOL_PAD=geometry.pool_pad,
        RELU=bool(geometry.relu), RELU_AFTER=bool(geometry.relu_after),
        HAS_BIAS=has_bias, HAS_SKIP=skip is not None, CLOSED=CLOSED, SHUT=SHUT,
        ALL_TAPS=all_taps, PARTS=cut, GROUP=group_of(cut),
        AT_ONCE=parts_at_once(tile.rows * tile.columns),
        WIDE=passes_int32(prod(shape), prod(parts), reach(skip or x, skip_strides), lines),
        IMAGES=box.images, BOX_H=box.height, BOX_W=box.width, COLUMNS=tile.columns,
        DEPTH=tile.depth, num_warps=tile.warps, num_stages=tile.stages, **early(device),
    )  # fmt: skip
    return _Work(launch, shape, code, parts)


def _parts(
    rows: int, size: tuple[int, int, int], columns: int, channels: int, taps: Convolution,
    tile: Tile, box: Box, has_more: bool,
) -> int:  # fmt: skip
    """Into how many parts sums are cut: what has a pool or a skip behind it is not."""
    if has_more:
        return 1
    work = work_of(tile, box, rows, size, columns, channels, taps)
    return parts_of(work, rows * prod(size) * columns)


@cache
def parts_of(work: Work, values: int) -> int:
    """In how many parts the sums of a launch should be cut.

    Few programs with long sums leave most multiprocessors idle: a linear layer behind a flatten,
    of a small mini-batch.

    Args:
        work: of the launch as a whole.
        values: that it computes.
    """

    def time(parts: int) -> float:
        adding = _ARRIVING + ADDING * 4 * parts * values if parts > 1 else 0.0
        return work._replace(
            programs=work.programs * parts, steps=work.steps / parts, besides=adding
        ).time

    counted = MOST_SHARED // max(1, work.programs)  # of every sum
    most = min(_MOST_PARTS, int(work.steps) // _STEPS)
    fitting = [parts for parts in range(2, most + 1) if groups_of(parts) < counted]
    return min([1, *fitting], key=time)
