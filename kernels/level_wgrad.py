"""Level backward to weights and biases: one launch, deterministic.

Rows are a kernel's taps and input channels, columns the filters of one branch, the sum runs over
the convolution's output pixels of that branch's rows. Programs share it, see
:mod:`lasem_fast.kernels.parts`.
"""

from __future__ import annotations

from math import prod
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from lasem_fast.kernels.division import divided, divisor
from lasem_fast.kernels.early_launch import early, wait_for_others
from lasem_fast.kernels.kept import kept
from lasem_fast.kernels.launches import Launch
from lasem_fast.kernels.level_geometry import (
    Geometry,
    gradient_buffers,
    is_ragged,
    passes_int32,
    reach,
)
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

# Rows are looked up before pixels are read, so that a pipeline of 5 stages is 2 steps ahead.
TENSOR_CORE_TILES = (
    Tile(64, 128, 32, 4, 5),
    Tile(64, 64, 32, 4, 5),
    Tile(64, 32, 32, 4, 5),
    Tile(32, 32, 64, 4, 5),
    Tile(16, 16, 64, 2, 5),
)
# With operands of 4 bytes others spill on sm_80.
TF32_TILES = (
    Tile(64, 64, 32, 4, 4),
    Tile(64, 32, 32, 4, 5),
    Tile(32, 32, 64, 4, 4),
    Tile(16, 16, 64, 2, 4),
)
FMA_TILES = (Tile(32, 32, 16, 4, 3), Tile(16, 16, 16, 2, 3))
# Where channels are read one by one, addresses take so many registers that others spill.
RAGGED_TILES = (Tile(64, 32, 32, 4, 3),)
RAGGED_TF32_TILES = (Tile(64, 32, 32, 4, 5),)
# Biases that are read at once, of as many parts as that takes.
_MOST_BIASES = 2**11
# Of a thread, where rows are passed over: left to itself the assembler makes room for a fourth
# program on a multiprocessor, and spills.
_REGISTERS = {"maxnreg": 255}
# Rows that are passed over together where they are not live: as many as make some steps.
_MOST_ROWS, _STEPS = 128, 4


@triton.jit(
    do_not_specialize=["count0", "count1", "rows_at_once", "samples", "by_samples", "shift"]
)
def level_wgrad_kernel(
    x, dy, code, by_branch, live, spoilt, dweight0, dweight1, dbias0, dbias1,
    parts, bias_parts, arrivals,
    count0, count1, rows_at_once, samples, by_samples, shift,
    x_p, x_n, x_h, x_w, x_c, d_o, d_c, d_h, d_w,
    BRANCHES: tl.constexpr, C_IN: tl.constexpr, C_OUT: tl.constexpr,
    HEIGHT: tl.constexpr, WIDTH: tl.constexpr, CONV_H: tl.constexpr, CONV_W: tl.constexpr,
    OUT_H: tl.constexpr, OUT_W: tl.constexpr,
    KH: tl.constexpr, KW: tl.constexpr, STRIDE_H: tl.constexpr, STRIDE_W: tl.constexpr,
    PAD_H: tl.constexpr, PAD_W: tl.constexpr, POOL: tl.constexpr, POOL_PAD: tl.constexpr,
    HAS_CODE: tl.constexpr, HAS_BIAS: tl.constexpr, HAS_LIVE: tl.constexpr,
    IF_SPOILT: tl.constexpr, MOST_ROWS: tl.constexpr, PRECISION: tl.constexpr, WIDE: tl.constexpr,
    IN_PARTS: tl.constexpr, GROUP: tl.constexpr, AT_ONCE: tl.constexpr,
    BIASES_AT_ONCE: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, DEPTH: tl.constexpr,
    EARLY: tl.constexpr,
):  # fmt: skip
    """dweight [Co, C, KH, KW] and dbias [Co] of one branch; see level_wgrad.

    IN_PARTS: by way of parts [S + G, B, Co, KH * KW * C], sums of groups behind them, and
    bias_parts [S, B, Co].
    """
    wait_for_others(EARLY)
    if IF_SPOILT:
        if tl.load(spoilt) == 0:
            return
    index: tl.constexpr = tl.int64 if WIDE else tl.int32
    operand: tl.constexpr = dy.dtype.element_ty
    TILES: tl.constexpr = (C_OUT + COLUMNS - 1) // COLUMNS
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    tile = tl.program_id(1)
    split = tl.program_id(2)
    entries, count, dweight, dbias = by_branch, count0, dweight0, dbias0
    first = 0
    if BRANCHES == 2:
        second = tile >= TILES
        tile = tile % TILES
        first = tl.where(second, C_OUT, 0)
        entries += tl.where(second, count0, 0) * 3
        count = tl.where(second, count1, count0)
        dweight = tl.where(second, dweight1, dweight0)
        dbias = tl.where(second, dbias1, dbias0)
    column = tile * COLUMNS + tl.arange(0, COLUMNS)
    in_kernel = row < KH * KW * C_IN
    used = column < C_OUT
    channel = (row % C_IN).to(index)
    kh = (row // C_IN // KW).to(index)
    kw = (row // C_IN % KW).to(index)
    channel_out = column.to(index)
    tap_at = x + kh * x_h + kw * x_w + channel * x_c
    of_row = samples.to(index) * (CONV_H * CONV_W)
    pixels = count * of_row
    if HAS_LIVE:
        # a few rows at a time, so that those that are not live are passed over
        part = rows_at_once * of_row
    else:
        part = tl.cdiv(tl.cdiv(pixels, tl.num_programs(2)), DEPTH) * DEPTH

    total = tl.zeros((ROWS, COLUMNS), tl.float32)
    bias = tl.zeros((DEPTH, COLUMNS), tl.float32)
    numbers = tl.cdiv(count, rows_at_once) if HAS_LIVE else split + 1
    for number in range(split, numbers, tl.num_programs(2)):
        begin = number * part
        length = tl.minimum(part, pixels - begin).to(tl.int32)
        if HAS_LIVE:
            next_rows = number * rows_at_once + tl.arange(0, MOST_ROWS)
            here = (next_rows < (number + 1) * rows_at_once) & (next_rows < count)
            next_rows = tl.load(entries + next_rows * 3, mask=here, other=0)
            lives = tl.load(live + next_rows, mask=here, other=0)
            length = tl.where(tl.max(lives.to(tl.int32), axis=0) > 0, length, 0)
        for start in range(0, length, DEPTH):
            pixel = begin + start + tl.arange(0, DEPTH)
            inside = start + tl.arange(0, DEPTH) < length
            ow = pixel % CONV_W
            oh = pixel // CONV_W % CONV_H
            image = pixel // (CONV_W * CONV_H)
            row_of_branch = divided(image, samples, by_samples, shift, WIDE)
            n = image - row_of_branch * samples
            entry = entries + row_of_branch * 3
            y_row = tl.load(entry, mask=inside, other=0)
            parent = tl.load(entry + 1, mask=inside, other=0).to(index)
            if HAS_LIVE:
                inside = inside & (tl.load(live + y_row, mask=inside, other=0) != 0)
            ih = oh * STRIDE_H - PAD_H
            iw = ow * STRIDE_W - PAD_W
            h = ih[None, :] + kh[:, None]
            w = iw[None, :] + kw[:, None]
            read_x = (h >= 0) & (h < HEIGHT) & (w >= 0) & (w < WIDTH)
            read_x = read_x & inside[None, :] & in_kernel[:, None]
            corner = parent * x_p + n * x_n + ih * x_h + iw * x_w
            values = tl.load(tap_at[:, None] + corner[None, :], mask=read_x, other=0.0)
            # a configuration that overflowed sends no gradient: 0 * inf must not make it NaN
            finite = tl.abs(values.to(tl.float32)) < float("inf")
            values = tl.where(finite, values, 0.0).to(operand)

            oh += POOL_PAD
            ow += POOL_PAD
            ho = oh // POOL
            wo = ow // POOL
            offset = (((y_row.to(index) * samples + n) * OUT_H + ho) * OUT_W + wo) * C_OUT
            offset = offset[:, None] + channel_out[None, :]
            read = (inside & (ho < OUT_H) & (wo < OUT_W))[:, None] & used[None, :]
            gradient = tl.load(dy + offset, mask=read, other=0.0)
            if HAS_CODE:
                won = tl.load(code + offset, mask=read, other=0)  # where dy is 0 anyway
                position = oh % POOL * POOL + ow % POOL
                gradient = tl.where(won == position[:, None], gradient, 0.0)
            else:
                # What is only loaded Triton 3.6 takes from shared memory, and on sm_90 it fills a
                # buffer anew that a product in flight still reads. Through registers it waits.
                gradient = tl.where(read, gradient, 0.0)
            total = tl.dot(values, gradient, total, input_precision=PRECISION)
            if HAS_BIAS:
                bias += gradient.to(tl.float32)

    keep = in_kernel[:, None] & used[None, :]
    if IN_PARTS:
        SIZE: tl.constexpr = BRANCHES * C_OUT * KH * KW * C_IN
        in_part = ((first + column) * (KH * KW * C_IN))[None, :] + row[:, None]
        tl.store(parts + split * SIZE + in_part, total, mask=keep)
        if HAS_BIAS:
            if tl.program_id(0) == 0:
                bias_at = bias_parts + split * (BRANCHES * C_OUT) + first + column
                tl.store(bias_at, tl.sum(bias, axis=0), mask=used)
        splits = tl.num_programs(2)
        group, in_group, groups = place_in(split, splits, GROUP)
        arrivals += (tl.program_id(0) * tl.num_programs(1) + tl.program_id(1)) * (1 + groups)
        if not is_last(arrivals + group, in_group):
            return
        begin_at = parts + group * (GROUP * SIZE) + in_part
        total = added_up(begin_at, keep, in_group, SIZE, AT_ONCE)
        if GROUP > 0:
            sums = parts + splits * SIZE + in_part
            tl.store(sums + group * SIZE, total, mask=keep)
            if not is_last(arrivals + groups, groups):
                return
            total = added_up(sums, keep, groups, SIZE, AT_ONCE)
    at = (dweight + channel_out * d_o)[None, :] + (kh * d_h + kw * d_w + channel * d_c)[:, None]
    tl.store(at, total.to(dweight0.dtype.element_ty), mask=keep)
    if HAS_BIAS:
        if tl.program_id(0) == 0:
            if IN_PARTS:
                summed = few_added_up(
                    bias_parts + first + column, used, tl.num_programs(2), BRANCHES * C_OUT,
                    BIASES_AT_ONCE,
                )  # fmt: skip
            else:
                summed = tl.sum(bias, axis=0)
            tl.store(dbias + channel_out, summed.to(dbias0.dtype.element_ty), mask=used)


def level_wgrad(
    dy: Tensor,
    code: Tensor,
    x: Tensor,
    weights: list[Tensor],
    biases: list[Tensor],
    rows: Tables,
    geometry: Geometry,
    arrivals: Tensor,
    *,
    live: Tensor | None = None,
    tf32: bool = False,
    tile: Tile | None = None,
) -> tuple[list[Tensor], list[Tensor]]:
    """The gradients of a level's weights and biases: one launch.

    A value of ``x`` that is not finite counts as 0: it belongs to a configuration whose ``dy`` is 0
    or to a step whose loss is NaN.

    Args:
        dy: ``[R, N, out_h, out_w, Co]``, contiguous; its dtype is that of the product.
        code: of the forward.
        x, weights, biases, rows, geometry: as in the forward.
        arrivals: of the forward: zeros, before and after.
        live: bool ``[R]``: other rows count as ``dy`` = 0 and are not read; None: all are.
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
    tile, splits = _parts(
        tuple(x.shape), x.stride(), len(weights), tuple(weights[0].shape), rows.counts, geometry,
        dy.dtype, tf32, tile,
    )  # fmt: skip
    _fill(
        dy, code, x, rows, geometry, dweights, dbiases, tile, tf32, splits=splits,
        arrivals=arrivals, live=live,
    )  # fmt: skip
    return dweights, dbiases


@kept
def _parts(
    x: tuple[int, ...], x_strides: tuple[int, ...], branches: int, weight: tuple[int, ...],
    counts: tuple[int, ...], geometry: Geometry, dtype: torch.dtype, tf32: bool,
    tile: Tile | None,
) -> tuple[Tile, int]:  # fmt: skip
    """The tile, if it is not given, and the number of parts that sums are cut into."""
    # of a branch's product, the deepest of them
    lines, columns = prod(weight[1:]), weight[0]
    pixels = max(counts) * x[1] * geometry.conv_h * geometry.conv_w
    if tile is None:
        tiles = TENSOR_CORE_TILES if dtype != torch.float32 else TF32_TILES if tf32 else FMA_TILES
        if is_ragged(x, x_strides) and tiles is not FMA_TILES:
            tiles = RAGGED_TF32_TILES if tf32 else RAGGED_TILES
        # the largest that fits: the parts fill the GPU
        tile = fitting(tiles, lines, columns, pixels)[0]
    column_tiles = branches * cdiv(columns, tile.columns)
    return tile, splits_of(cdiv(lines, tile.rows) * column_tiles, pixels // tile.depth)


def mend_wgrad(
    spoilt: Tensor,
    dweights: list[Tensor],
    dbiases: list[Tensor],
    dy: Tensor,
    code: Tensor,
    x: Tensor,
    rows: Tables,
    geometry: Geometry,
) -> None:
    """Makes gradients anew, as :func:`level_wgrad`, if the device says so: one launch.

    Args:
        spoilt: int32 ``[1]``; where it is 0 nothing is read or written.
        dweights, dbiases: written, one ``[Co, C, KH, KW]`` and one ``[Co]`` (or none) per branch.
        dy, code, x, rows, geometry: as in :func:`level_wgrad`.
    """
    tile, _ = _parts(
        tuple(x.shape), x.stride(), len(dweights), tuple(dweights[0].shape), rows.counts, geometry,
        dy.dtype, False, None,
    )  # fmt: skip
    _fill(dy, code, x, rows, geometry, dweights, dbiases, tile, False, spoilt=spoilt)


def _fill(
    dy: Tensor,
    code: Tensor,
    x: Tensor,
    rows: Tables,
    geometry: Geometry,
    dweights: list[Tensor],
    dbiases: list[Tensor],
    tile: Tile,
    tf32: bool,
    *,
    splits: int = 1,
    arrivals: Tensor | None = None,
    live: Tensor | None = None,
    spoilt: Tensor | None = None,
) -> None:
    """Fills ``[Co, C, KH, KW]`` and ``[Co]`` (or none) per branch, by way of so many parts."""
    has_live, if_spoilt = live is not None, spoilt is not None
    biased = dbiases or dweights  # never written where there is none
    work = _work(
        tuple(dy.shape), tuple(x.shape), x.stride(), len(dweights), tuple(dweights[0].shape),
        dweights[0].stride(), splits, rows.counts, geometry, bool(dbiases), has_live, if_spoilt,
        tile, tf32, x.device,
    )  # fmt: skip
    # of one part alone there are none, and what stands in their place is never touched
    parts = bias_parts = code
    if splits > 1:
        parts = x.new_empty(work.parts, dtype=torch.float32)
        bias_parts = x.new_empty((splits, *work.parts[1:3]), dtype=torch.float32)
    work.launch(
        # the latter are never read
        x, dy, code, rows.by_branch, live.view(torch.uint8) if has_live else code,
        spoilt if if_spoilt else code, dweights[0], dweights[-1], biased[0], biased[-1],
        parts, bias_parts, arrivals if splits > 1 else code,
    )  # fmt: skip


class _Work(NamedTuple):
    """The launch, and the shape of its parts."""

    launch: Launch
    parts: tuple[int, ...]


@kept
def _work(
    dy: tuple[int, ...], x: tuple[int, ...], x_strides: tuple[int, ...], branches: int,
    weight: tuple[int, ...], strides: tuple[int, ...], splits: int, counts: tuple[int, ...],
    geometry: Geometry, has_bias: bool, has_live: bool, if_spoilt: bool, tile: Tile, tf32: bool,
    device: torch.device,
) -> _Work:  # fmt: skip
    channels_out, channels, kh, kw = weight
    samples = x[1]
    pixels = max(counts) * samples * geometry.conv_h * geometry.conv_w
    grid = cdiv(channels * kh * kw, tile.rows), branches * cdiv(channels_out, tile.columns), splits
    offsets = reach(x, x_strides), prod(dy), reach(weight, strides)
    launch = Launch(
        level_wgrad_kernel, grid,
        (
            counts[0], counts[-1], _rows_at_once(tile, samples, geometry), samples,
            *divisor(samples), *x_strides, *strides,
        ),
        BRANCHES=branches, C_IN=channels, C_OUT=channels_out,
        HEIGHT=x[2], WIDTH=x[3], CONV_H=geometry.conv_h, CONV_W=geometry.conv_w,
        OUT_H=geometry.out_h, OUT_W=geometry.out_w, KH=kh, KW=kw,
        STRIDE_H=geometry.stride_h, STRIDE_W=geometry.stride_w,
        PAD_H=geometry.pad_h, PAD_W=geometry.pad_w,
        POOL=geometry.pool, POOL_PAD=geometry.pool_pad,
        HAS_CODE=geometry.has_code, HAS_BIAS=has_bias, HAS_LIVE=has_live, IF_SPOILT=if_spoilt,
        MOST_ROWS=_MOST_ROWS, PRECISION="tf32" if tf32 else "ieee",
        WIDE=passes_int32(*offsets, pixels + splits * tile.depth),
        IN_PARTS=splits > 1, GROUP=group_of(splits),
        AT_ONCE=parts_at_once(tile.rows * tile.columns),
        BIASES_AT_ONCE=_MOST_BIASES // tile.columns,
        ROWS=tile.rows, COLUMNS=tile.columns, DEPTH=tile.depth,
        num_warps=tile.warps, num_stages=tile.stages, **early(device),
        **(_REGISTERS if has_live else {}),
    )  # fmt: skip
    return _Work(launch, (splits + groups_of(splits), branches, channels_out, kh * kw * channels))


def _rows_at_once(tile: Tile, samples: int, geometry: Geometry) -> int:
    """How many rows are passed over together: as few as make steps that are mostly full."""
    pixels = max(1, samples * geometry.conv_h * geometry.conv_w)
    return min(_MOST_ROWS, cdiv(_STEPS * tile.depth, pixels))
