"""Level backward to weights and biases, operands read in boxes (TMA, sm_90): one launch.

A program sums the products of one tap, or of three side by side that share a box of the gradient,
over the boxes of one branch's rows. Programs share a sum, see :mod:`lasem_fast.kernels.parts`.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import prod
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from lasem_fast.kernels.box_form import Filters
from lasem_fast.kernels.box_gradient import Gradient
from lasem_fast.kernels.boxes import (
    ADDING,
    Box,
    Convolution,
    Taps,
    Work,
    box_for,
    cheapest,
    reads,
)
from lasem_fast.kernels.early_launch import early, wait_for_others
from lasem_fast.kernels.kept import kept
from lasem_fast.kernels.launches import Launch
from lasem_fast.kernels.level_geometry import Geometry, gradient_buffers
from lasem_fast.kernels.level_rows import Tables
from lasem_fast.kernels.level_tiles import Tile, cdiv, fitting
from lasem_fast.kernels.parts import (
    added_up,
    few_added_up,
    group_of,
    groups_of,
    is_last,
    parts_at_once,
    place_in,
    splits_of,
)

# Rows are input channels, the depth is a box's pixels. What to read is looked up before it is read,
# so that a pipeline of 5 stages is 3 steps ahead.
TILES = (
    Tile(128, 128, 64, 8, 5),
    Tile(64, 128, 64, 4, 5),
    Tile(128, 64, 64, 4, 5),
    Tile(64, 64, 64, 4, 5),
    Tile(64, 32, 64, 4, 5),
    Tile(32, 64, 64, 4, 5),
    Tile(32, 32, 64, 4, 5),
    Tile(16, 16, 64, 4, 5),
)
# Output values of a thread that leave registers for the rest, where there are three sums.
_MOST_OF_THREE = 32
# Biases that a program adds up, and parts of them that it reads at once.
_BIASES, _BIASES_AT_ONCE = 16, 128
# Rows of a product of a warp group: with fewer, the two sides change places.
_GROUP = 64


@triton.jit
def _product(total, values, gradient, TURNED: tl.constexpr):
    if TURNED:
        total = tl.dot(gradient.T, values, total)
    else:
        total = tl.dot(values.T, gradient, total)
    return total


@triton.jit
def _meeting(tap, TAPS: tl.constexpr, SIDE: tl.constexpr, PAD: tl.constexpr, SIZE: tl.constexpr,
             CONV: tl.constexpr):  # fmt: skip
    """The first and the number of the boxes that read anything but zeros through these taps."""
    first = tl.maximum(0, PAD - tap - TAPS + 1) // SIDE
    behind = tl.cdiv(tl.maximum(0, tl.minimum(SIZE + PAD - tap, CONV)), SIDE)
    return first, tl.maximum(0, behind - first)


@triton.jit
def _middle_first(i, KERNEL: tl.constexpr):
    """A kernel's taps along one side, the one that meets the most boxes first."""
    return KERNEL // 2 + tl.where(i % 2 == 1, -(i + 1) // 2, i // 2)


@triton.jit
def _add_boxes(
    total, total1, total2, begin, end, first, x, dz, sources, samples,
    kh, kw, channel, tile, box_y, down, box_x, across,
    C_OUT: tl.constexpr, CONV_H: tl.constexpr, CONV_W: tl.constexpr,
    PAD_H: tl.constexpr, PAD_W: tl.constexpr,
    IMAGES: tl.constexpr, BOX_H: tl.constexpr, BOX_W: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, BLOCK: tl.constexpr, TURNED: tl.constexpr,
    TAPS: tl.constexpr,
):  # fmt: skip
    """total += x' dz, or dz' x where TURNED, over a branch's boxes from ``begin`` to ``end``.

    Only boxes ``down`` by ``across`` from ``box_y`` and ``box_x`` on count.
    """
    PIXELS: tl.constexpr = IMAGES * BOX_H * BOX_W
    BOXES_X: tl.constexpr = (CONV_W + BOX_W - 1) // BOX_W
    BOXES_Y: tl.constexpr = (CONV_H + BOX_H - 1) // BOX_H
    BLOCKS: tl.constexpr = (C_OUT + BLOCK - 1) // BLOCK
    image_blocks = tl.cdiv(samples, IMAGES)
    # without any box too no division is by 0, see box_forward
    down = tl.maximum(1, down)
    across = tl.maximum(1, across)
    for number in range(begin, end):
        block = number // (down * across) % image_blocks
        y = box_y + number // across % down
        w = box_x + number % across
        box = first * image_blocks + number // (down * across)
        box = box * (BOXES_X * BOXES_Y) + y * BOXES_X + w
        source = sources + (box * BLOCKS + tile * (COLUMNS // BLOCK)) * 2
        row = tl.load(source)
        parent = tl.load(source + 1)
        if COLUMNS > BLOCK:
            source = sources + (box * BLOCKS + tl.minimum(tile * 2 + 1, BLOCKS - 1)) * 2
            row = tl.minimum(row, tl.load(source))
            parent = tl.minimum(parent, tl.load(source + 1))
        n = block * IMAGES
        oh = y * BOX_H
        ow = w * BOX_W
        gradient = tl.reshape(dz.load([row, n, oh, ow, tile * COLUMNS]), (PIXELS, COLUMNS))
        ih = oh - PAD_H + kh
        iw = ow - PAD_W + kw
        values = tl.reshape(x.load([parent, n, ih, iw, channel]), (PIXELS, ROWS))
        total = _product(total, values, gradient, TURNED)
        if TAPS == 3:
            values = tl.reshape(x.load([parent, n, ih, iw + 1, channel]), (PIXELS, ROWS))
            total1 = _product(total1, values, gradient, TURNED)
            values = tl.reshape(x.load([parent, n, ih, iw + 2, channel]), (PIXELS, ROWS))
            total2 = _product(total2, values, gradient, TURNED)
    return total, total1, total2


@triton.jit
def _in_part(
    filter_at, tap, row, column, C_IN: tl.constexpr, C_OUT: tl.constexpr, TURNED: tl.constexpr
):
    """Where a tap of a part lies, and what of it there is."""
    if TURNED:
        at = (filter_at + tap * C_IN)[:, None] + row[None, :]
        keep = (column < C_OUT)[:, None] & (row < C_IN)[None, :]
    else:
        at = (filter_at + tap * C_IN)[None, :] + row[:, None]
        keep = (column < C_OUT)[None, :] & (row < C_IN)[:, None]
    return at, keep


@triton.jit
def _store(at, keep, total, total1, total2, C_IN: tl.constexpr, TAPS: tl.constexpr):
    """A part: one tap, or three side by side."""
    tl.store(at, total, mask=keep)
    if TAPS == 3:
        tl.store(at + C_IN, total1, mask=keep)
        tl.store(at + 2 * C_IN, total2, mask=keep)


@triton.jit
def _sums(at, keep, parts, size, C_IN: tl.constexpr, TAPS: tl.constexpr, AT_ONCE: tl.constexpr):
    """What so many parts add up to, tap by tap."""
    total = added_up(at, keep, parts, size, AT_ONCE)
    total1 = total
    total2 = total
    if TAPS == 3:
        total1 = added_up(at + C_IN, keep, parts, size, AT_ONCE)
        total2 = added_up(at + 2 * C_IN, keep, parts, size, AT_ONCE)
    return total, total1, total2


@triton.jit
def _store_gradient(
    dweight, spoilt, total, tap, row, column, d_o, d_c, d_h, d_w,
    C_IN: tl.constexpr, C_OUT: tl.constexpr,
    CHANNELS: tl.constexpr, TAPS_DOWN: tl.constexpr, TAPS_ACROSS: tl.constexpr,
    SAYS_SPOILT: tl.constexpr, TURNED: tl.constexpr,
):  # fmt: skip
    """A tap of a gradient; of a line, what the filter itself has."""
    line = tap * C_IN + row
    read = (row < C_IN) & (line < TAPS_DOWN * TAPS_ACROSS * CHANNELS)
    used = column < C_OUT
    from_filter = line % CHANNELS * d_c + line // CHANNELS % TAPS_ACROSS * d_w
    from_filter += line // (CHANNELS * TAPS_ACROSS) * d_h
    if TURNED:
        at = (column * d_o)[:, None] + from_filter[None, :]
        keep = used[:, None] & read[None, :]
    else:
        at = (column * d_o)[None, :] + from_filter[:, None]
        keep = used[None, :] & read[:, None]
    tl.store(dweight + at, total.to(dweight.dtype.element_ty), mask=keep)
    if SAYS_SPOILT:
        nans = (keep & (total != total)).to(tl.int32)
        nans = tl.max(tl.max(nans, axis=1), axis=0)
        tl.atomic_max(spoilt, nans, mask=nans > 0)


@triton.jit(do_not_specialize=["count0", "count1", "bias_splits"])
def box_wgrad_kernel(
    x, dz, by_branch, live, sources, parts, bias_parts,
    dweight0, dweight1, dbias0, dbias1, spoilt, arrivals,
    count0, count1, samples, bias_splits, d_o, d_c, d_h, d_w,
    BRANCHES: tl.constexpr, C_IN: tl.constexpr, C_OUT: tl.constexpr,
    HEIGHT: tl.constexpr, WIDTH: tl.constexpr, CONV_H: tl.constexpr, CONV_W: tl.constexpr,
    KH: tl.constexpr, KW: tl.constexpr, PAD_H: tl.constexpr, PAD_W: tl.constexpr,
    CHANNELS: tl.constexpr, TAPS_DOWN: tl.constexpr, TAPS_ACROSS: tl.constexpr,
    HAS_LIVE: tl.constexpr, HAS_BIAS: tl.constexpr, ALL_BOXES: tl.constexpr,
    IN_PARTS: tl.constexpr, SAYS_SPOILT: tl.constexpr, WIDE: tl.constexpr,
    IMAGES: tl.constexpr, BOX_H: tl.constexpr, BOX_W: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, BLOCK: tl.constexpr, TURNED: tl.constexpr,
    TAPS: tl.constexpr, GROUP: tl.constexpr, AT_ONCE: tl.constexpr, BIASES: tl.constexpr,
    BIASES_AT_ONCE: tl.constexpr,
    EARLY: tl.constexpr,
):  # fmt: skip
    """dweight [Co, C, KH, KW] and dbias [Co] of one branch; see box_wgrad.

    IN_PARTS: by way of parts [S + G, B, Co, KH * KW * C], sums of groups behind them.
    """
    wait_for_others(EARLY)
    index: tl.constexpr = tl.int64 if WIDE else tl.int32
    TILES: tl.constexpr = (C_OUT + COLUMNS - 1) // COLUMNS
    GROUPS: tl.constexpr = KW // TAPS
    channel = tl.program_id(0) * ROWS
    tile = tl.program_id(1) % TILES
    branch = tl.program_id(1) // TILES
    # programs with the most to do start first
    group = tl.program_id(2) % (KH * GROUPS)
    split = tl.program_id(2) // (KH * GROUPS)
    splits = tl.num_programs(2) // (KH * GROUPS)
    kh = _middle_first(group // GROUPS, KH)
    kw = _middle_first(group % GROUPS, GROUPS) * TAPS
    box_y, down = 0, (CONV_H + BOX_H - 1) // BOX_H
    box_x, across = 0, (CONV_W + BOX_W - 1) // BOX_W
    if not ALL_BOXES:
        box_y, down = _meeting(kh, 1, BOX_H, PAD_H, HEIGHT, CONV_H)
        box_x, across = _meeting(kw, TAPS, BOX_W, PAD_W, WIDTH, CONV_W)
    first, count = 0, count0
    if BRANCHES == 2:
        first = tl.where(branch == 1, count0, 0)
        count = tl.where(branch == 1, count1, count0)
    per_row = tl.cdiv(samples, IMAGES) * down * across
    share = tl.cdiv(count * per_row, splits)
    begin = split * share
    end = tl.minimum(begin + share, count * per_row)
    total = tl.zeros((COLUMNS, ROWS) if TURNED else (ROWS, COLUMNS), tl.float32)
    total1 = total
    total2 = total
    if HAS_LIVE:
        # row by row, so that those that are not live are passed over
        of_row = tl.maximum(1, per_row)
        for of_branch in range(begin // of_row, tl.cdiv(end, of_row)):
            alive = tl.load(live + tl.load(by_branch + (first + of_branch) * 3)) != 0
            low = tl.maximum(begin, of_branch * per_row)
            high = tl.minimum(end, (of_branch + 1) * per_row)
            total, total1, total2 = _add_boxes(
                total, total1, total2, low, tl.where(alive, high, low), first, x, dz, sources,
                samples, kh, kw, channel, tile, box_y, down, box_x, across,
                C_OUT, CONV_H, CONV_W, PAD_H, PAD_W,
                IMAGES, BOX_H, BOX_W, ROWS, COLUMNS, BLOCK, TURNED, TAPS,
            )  # fmt: skip
    else:
        total, total1, total2 = _add_boxes(
            total, total1, total2, begin, end, first, x, dz, sources, samples,
            kh, kw, channel, tile, box_y, down, box_x, across,
            C_OUT, CONV_H, CONV_W, PAD_H, PAD_W, IMAGES, BOX_H, BOX_W,
            ROWS, COLUMNS, BLOCK, TURNED, TAPS,
        )  # fmt: skip
    if HAS_BIAS:
        # programs of the last taps have the least to do
        if (tl.program_id(0) == 0) & (group == KH * GROUPS - 1):
            dbias = tl.where(branch == 1, dbias1, dbias0)
            for some in range(split, COLUMNS // BIASES, splits):
                one = tile * COLUMNS + some * BIASES + tl.arange(0, BIASES)
                bias_at = bias_parts + branch * C_OUT + one
                bias = few_added_up(
                    bias_at, one < C_OUT, bias_splits, BRANCHES * C_OUT, BIASES_AT_ONCE
                )
                tl.store(dbias + one, bias.to(dbias0.dtype.element_ty), mask=one < C_OUT)
    row = channel + tl.arange(0, ROWS)
    column = tile * COLUMNS + tl.arange(0, COLUMNS)
    tap = kh * KW + kw
    if IN_PARTS:
        SIZE: tl.constexpr = BRANCHES * C_OUT * KH * KW * C_IN
        filter_at = (branch * C_OUT + column) * (KH * KW * C_IN)
        at, keep = _in_part(filter_at, tap, row, column, C_IN, C_OUT, TURNED)
        parts += at
        _store(parts + split * SIZE, keep, total, total1, total2, C_IN, TAPS)
        # taps, too, come in groups: these are of parts
        together, in_group, groups = place_in(split, splits, GROUP)
        number = tl.program_id(0) * tl.num_programs(1) + tl.program_id(1)
        arrivals += (number * (KH * GROUPS) + group) * (1 + groups)
        if not is_last(arrivals + together, in_group):
            return
        total, total1, total2 = _sums(
            parts + together * (GROUP * SIZE), keep, in_group, SIZE, C_IN, TAPS, AT_ONCE
        )
        if GROUP > 0:
            parts += splits * SIZE
            _store(parts + together * SIZE, keep, total, total1, total2, C_IN, TAPS)
            if not is_last(arrivals + groups, groups):
                return
            total, total1, total2 = _sums(parts, keep, groups, SIZE, C_IN, TAPS, AT_ONCE)
    dweight = tl.where(branch == 1, dweight1, dweight0)
    filters = column.to(index)
    _store_gradient(
        dweight, spoilt, total, tap, row, filters, d_o, d_c, d_h, d_w,
        C_IN, C_OUT, CHANNELS, TAPS_DOWN, TAPS_ACROSS, SAYS_SPOILT, TURNED,
    )  # fmt: skip
    if TAPS == 3:
        _store_gradient(
            dweight, spoilt, total1, tap + 1, row, filters, d_o, d_c, d_h, d_w,
            C_IN, C_OUT, CHANNELS, TAPS_DOWN, TAPS_ACROSS, SAYS_SPOILT, TURNED,
        )  # fmt: skip
        _store_gradient(
            dweight, spoilt, total2, tap + 2, row, filters, d_o, d_c, d_h, d_w,
            C_IN, C_OUT, CHANNELS, TAPS_DOWN, TAPS_ACROSS, SAYS_SPOILT, TURNED,
        )  # fmt: skip


@kept
def chosen(
    channels_out: int, channels: int, kernel: tuple[int, int], counts: tuple[int, ...],
    x_shape: tuple[int, ...], geometry: Geometry, tile: Tile | None = None,
) -> tuple[Tile, float]:  # fmt: skip
    """The tile that should take the least time, and how long, in nanoseconds.

    Args:
        channels_out, channels, kernel: of the filters.
        counts: rows of each branch.
        x_shape, geometry: as in the forward.
        tile: the one to take; None: the cheapest.
    """
    size = x_shape[1], geometry.conv_h, geometry.conv_w
    weights = len(counts) * channels_out * channels * prod(kernel)

    def work(tile: Tile) -> Work:
        box, taps = box_of(tile, x_shape, geometry, kernel), _taps(tile, kernel[1])
        programs, splits = _programs(tile, channels_out, channels, kernel, counts, box, size)
        boxes = reads(box, *size, convolution=_convolution(x_shape, geometry, kernel))
        return Work(
            programs=programs * splits,
            steps=max(counts) * boxes / prod(kernel) / splits,
            bytes=2 * tile.depth * (tile.rows * taps + tile.columns),
            besides=ADDING * 4 * splits * weights if splits > 1 else 0.0,
        )

    tiles = fitting(TILES, channels, channels_out, max(counts) * prod(size))
    tile = tile or cheapest(tiles, work)
    return tile, work(tile).time


def _programs(
    tile: Tile, channels_out: int, channels: int, kernel: tuple[int, int], counts: Sequence[int],
    box: Box, size: tuple[int, int, int],
) -> tuple[int, int]:  # fmt: skip
    """Programs for one part of the sum, and how many parts there are: they fill the GPU."""
    tiles = cdiv(channels, tile.rows) * len(counts) * cdiv(channels_out, tile.columns)
    programs = tiles * prod(kernel) // _taps(tile, kernel[1])
    return programs, splits_of(programs, max(counts) * prod(box.counts(*size)))


def box_of(tile: Tile, x_shape: Sequence[int], geometry: Geometry, kernel: tuple[int, int]) -> Box:
    """The box of pixels that is a tile's depth."""
    return box_for(
        tile.depth, x_shape[1], geometry.conv_h, geometry.conv_w,
        convolution=_convolution(x_shape, geometry, kernel),
    )  # fmt: skip


def _convolution(
    x_shape: Sequence[int], geometry: Geometry, kernel: tuple[int, int]
) -> Convolution:
    down, across = (
        Taps(taps, -pad, side)
        for taps, pad, side in zip(kernel, geometry[2:4], x_shape[2:4], strict=True)
    )
    return Convolution(down, across)


def _taps(tile: Tile, kw: int) -> int:
    """How many taps, side by side, a program sums."""
    return 3 if kw % 3 == 0 and tile.accumulators <= _MOST_OF_THREE else 1


def box_wgrad(
    gradient: Gradient,
    x: Tensor,
    filters: Filters,
    weights: list[Tensor],
    biases: list[Tensor],
    rows: Tables,
    geometry: Geometry,
    tile: Tile,
    *,
    live: Tensor | None = None,
    spoilt: Tensor | None = None,
) -> tuple[list[Tensor], list[Tensor]]:
    """The gradients of a level's weights and biases: one launch.

    Args:
        gradient: of the convolution, in boxes of ``tile.depth`` pixels and blocks of
            ``tile.columns`` or half as many.
        x, filters, biases, rows, geometry: as in the forward.
        weights: of the level itself, one ``[Co, C, KH, KW]`` per branch.
        tile: block sizes.
        live: bool ``[R]``: other rows are passed over; None: none is.
        spoilt: int32 ``[1]``, 0: becomes 1 where a gradient is NaN; None: nobody asks.

    Returns:
        For every branch the gradient of its weight and of its bias (none without biases), in the
        layout and dtype of the parameters.
    """
    dweights = gradient_buffers(weights)
    dbiases = [torch.empty_like(bias) for bias in biases]
    has_live = live is not None
    work = _work(
        tuple(x.shape), filters.branches, filters.channels_out, filters.kernel,
        tuple(weights[0].shape), dweights[0].stride(), rows.counts, geometry, gradient.box,
        gradient.columns, len(gradient.bias_parts), bool(biases), has_live, spoilt is not None,
        tile, x.device,
    )  # fmt: skip
    parts = x.new_empty(work.parts, dtype=torch.float32)
    dbias = dbiases or [parts]  # parts stand where nothing is read or written
    work.launch(
        x, gradient.dz, rows.by_branch, live.view(torch.uint8) if has_live else parts,
        gradient.sources, parts, gradient.bias_parts, dweights[0], dweights[-1], dbias[0],
        dbias[-1], parts if spoilt is None else spoilt, filters.arrivals,
    )  # fmt: skip
    return dweights, dbiases


class _Work(NamedTuple):
    """The launch, and the shape of its parts."""

    launch: Launch
    parts: tuple[int, ...]


@kept
def _work(
    x: tuple[int, ...], branches: int, channels_out: int, kernel: tuple[int, int],
    weight: tuple[int, ...], strides: tuple[int, ...], counts: tuple[int, ...],
    geometry: Geometry, box: Box, block: int, bias_parts: int, has_bias: bool, has_live: bool,
    asks_spoilt: bool, tile: Tile, device: torch.device,
) -> _Work:  # fmt: skip
    _, samples, height, width, channels = x
    kh, kw = kernel
    sides = samples, geometry.conv_h, geometry.conv_w
    boxes, convolution = prod(box.counts(*sides)), _convolution(x, geometry, kernel)
    taps = _taps(tile, kw)
    grid = cdiv(channels, tile.rows), branches * cdiv(channels_out, tile.columns)
    _, splits = _programs(tile, channels_out, channels, kernel, counts, box, sides)
    stored = 0 if splits == 1 else splits + groups_of(splits)
    parts = stored, branches, channels_out, kh * kw * channels
    launch = Launch(
        box_wgrad_kernel, (*grid, splits * kh * kw // taps),
        (counts[0], counts[-1], samples, bias_parts, *strides),
        blocks=((1, *box, tile.rows), (1, *box, tile.columns)),
        BRANCHES=branches, C_IN=channels, C_OUT=channels_out, HEIGHT=height, WIDTH=width,
        CONV_H=geometry.conv_h, CONV_W=geometry.conv_w, KH=kh, KW=kw,
        PAD_H=geometry.pad_h, PAD_W=geometry.pad_w, CHANNELS=weight[1],
        TAPS_DOWN=weight[2], TAPS_ACROSS=weight[3],
        HAS_LIVE=has_live, HAS_BIAS=has_bias,
        ALL_BOXES=reads(box, *sides, convolution=convolution) == boxes * kh * kw,
        IN_PARTS=splits > 1, SAYS_SPOILT=asks_spoilt, WIDE=prod(weight) >= 2**31 - 2**16,
        IMAGES=box.images, BOX_H=box.height, BOX_W=box.width,
        ROWS=tile.rows, COLUMNS=tile.columns, BLOCK=block,
        TURNED=tile.rows < _GROUP <= tile.columns, TAPS=taps, GROUP=group_of(splits),
        AT_ONCE=parts_at_once(tile.rows * tile.columns), BIASES=_BIASES,
        BIASES_AT_ONCE=_BIASES_AT_ONCE,
        num_warps=tile.warps, num_stages=tile.stages, **early(device),
    )  # fmt: skip
    return _Work(launch, parts)
