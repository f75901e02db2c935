"""The gradient of a level's convolution at full size, for products that read it in boxes.

One launch undoes pool and ReLU, adds up the biases' gradients and notes what is read for a box,
which is nothing where there is no gradient at all. Where a level has neither, its output's gradient
is read as it is.
"""

from __future__ import annotations

from math import prod
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from lasem_fast.kernels.boxes import Box
from lasem_fast.kernels.early_launch import early, wait_for_others
from lasem_fast.kernels.kept import kept
from lasem_fast.kernels.launches import Launch
from lasem_fast.kernels.level_geometry import Geometry, passes_int32
from lasem_fast.kernels.level_rows import Tables
from lasem_fast.kernels.level_tiles import MULTIPROCESSORS, cdiv

# Of a block; more columns would take more registers than there are.
MOST_COLUMNS = 64
# Programs that keep a multiprocessor's memory busy.
_PROGRAMS = 8 * MULTIPROCESSORS


class Gradient(NamedTuple):
    """What the backward's products read.

    Attributes:
        dz: ``[R, N, conv_h, conv_w, Co]``; what belongs to rows that are not live is undefined.
        bias_parts: ``[S, B, Co]``, float32.
        sources: ``[boxes, column blocks, 2]``, int32: the row of dz and the parent that a box is
            read of, or where dz is all zeros what lies behind the last ones and reads as zeros;
            boxes of the rows in the order of ``by_branch``.
        spoilt: int32 ``[1]``, 0: for what is found out about the sums over them.
        box: of the boxes.
        columns: of the column blocks.
    """

    dz: Tensor
    bias_parts: Tensor
    sources: Tensor
    spoilt: Tensor
    box: Box
    columns: int


@triton.jit(do_not_specialize=["count0", "count1", "rows", "parents", "each"])
def box_gradient_kernel(
    dy, code, by_branch, live, dz, bias_parts, sources, spoilt,
    count0, count1, rows, parents, each, samples,
    BRANCHES: tl.constexpr, C_OUT: tl.constexpr, CONV_H: tl.constexpr, CONV_W: tl.constexpr,
    OUT_H: tl.constexpr, OUT_W: tl.constexpr, POOL: tl.constexpr, POOL_PAD: tl.constexpr,
    HAS_CODE: tl.constexpr, HAS_LIVE: tl.constexpr, WIDE: tl.constexpr,
    IMAGES: tl.constexpr, BOX_H: tl.constexpr, BOX_W: tl.constexpr, COLUMNS: tl.constexpr,
    EARLY: tl.constexpr,
):  # fmt: skip
    """dz [R, N, conv_h, conv_w, Co], sources and a part of dbias; see box_gradient."""
    wait_for_others(EARLY)
    index: tl.constexpr = tl.int64 if WIDE else tl.int32
    ROWS: tl.constexpr = IMAGES * BOX_H * BOX_W
    BOXES_X: tl.constexpr = (CONV_W + BOX_W - 1) // BOX_W
    BOXES_Y: tl.constexpr = (CONV_H + BOX_H - 1) // BOX_H
    if tl.program_id(0) + tl.program_id(1) == 0:
        tl.store(spoilt, 0)
    first, count = 0, count0
    branch = tl.program_id(0) % BRANCHES
    if BRANCHES == 2:
        first = tl.where(branch == 1, count0, 0)
        count = tl.where(branch == 1, count1, count0)
    part = tl.program_id(0) // BRANCHES
    per_image = BOXES_X * BOXES_Y
    per_row = tl.cdiv(samples, IMAGES) * per_image
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    used = column < C_OUT
    pixel = tl.arange(0, ROWS)
    ph = pixel // BOX_W % BOX_H
    pw = pixel % BOX_W
    bias = tl.zeros((ROWS, COLUMNS), tl.float32)
    for number in range(part * each, tl.minimum((part + 1) * each, count * per_row)):
        entry = by_branch + (first + number // per_row) * 3
        row = tl.load(entry)
        n = number % per_row // per_image * IMAGES + pixel // (BOX_H * BOX_W)
        oh = number // BOXES_X % BOXES_Y * BOX_H + ph
        ow = number % BOXES_X * BOX_W + pw
        inside = (n < samples) & (oh < CONV_H) & (ow < CONV_W)
        if HAS_LIVE:
            inside = inside & (tl.load(live + row) != 0)
        ho = (oh + POOL_PAD) // POOL
        wo = (ow + POOL_PAD) // POOL
        image = row.to(index) * samples + n
        at = (((image * OUT_H + ho) * OUT_W + wo) * C_OUT)[:, None] + column[None, :]
        read = (inside & (ho < OUT_H) & (wo < OUT_W))[:, None] & used[None, :]
        gradient = tl.load(dy + at, mask=read, other=0.0)
        if HAS_CODE:
            won = tl.load(code + at, mask=read, other=0)  # where dy is 0 anyway
            position = (oh + POOL_PAD) % POOL * POOL + (ow + POOL_PAD) % POOL
            gradient = tl.where(won == position[:, None], gradient, 0.0)
            to = (((image * CONV_H + oh) * CONV_W + ow) * C_OUT)[:, None] + column[None, :]
            tl.store(dz + to, gradient, mask=inside[:, None] & used[None, :])
        gradient = gradient.to(tl.float32)
        bias += gradient
        any_here = tl.max(tl.max((gradient != 0).to(tl.int32), axis=1), axis=0)
        box = first * per_row + number
        # without any gradient a box is not multiplied: a configuration that overflowed sends none,
        # and 0 * inf must not make it NaN
        source = sources + (box * tl.num_programs(1) + tl.program_id(1)) * 2
        tl.store(source, tl.where(any_here > 0, row, rows))
        tl.store(source + 1, tl.where(any_here > 0, tl.load(entry + 1), parents))
    at = tl.program_id(0) * C_OUT + column
    tl.store(bias_parts + at, tl.sum(bias, axis=0), mask=used)


def box_gradient(
    dy: Tensor,
    code: Tensor,
    branches: int,
    rows: Tables,
    geometry: Geometry,
    box: Box,
    columns: int,
    *,
    live: Tensor | None = None,
) -> Gradient:
    """Makes what the products of a level's backward read: one launch.

    Args:
        dy: ``[R, N, out_h, out_w, Co]``, contiguous.
        code: of the forward.
        branches: how many.
        rows: the R rows.
        geometry: the level's sizes.
        box, columns: sides of the blocks; at most ``MOST_COLUMNS``.
        live: bool ``[R]``: other rows count as ``dy`` = 0 and are not read; None: all are.
    """
    has_live = live is not None
    work = _work(
        tuple(dy.shape), branches, rows.counts, len(rows.by_parent), geometry, box, columns,
        has_live, dy.device,
    )  # fmt: skip
    dz = dy.new_empty(work.dz) if geometry.has_code else dy
    bias_parts = dy.new_empty(work.bias_parts, dtype=torch.float32)
    sources = dy.new_empty(work.sources, dtype=torch.int32)
    spoilt = dy.new_empty(1, dtype=torch.int32)
    work.launch(
        dy, code, rows.by_branch, live.view(torch.uint8) if has_live else code, dz, bias_parts,
        sources, spoilt,
    )  # fmt: skip
    return Gradient(dz, bias_parts, sources, spoilt, box, columns)


class _Work(NamedTuple):
    """The launch, and the shapes of what it writes."""

    launch: Launch
    dz: tuple[int, ...]
    bias_parts: tuple[int, ...]
    sources: tuple[int, ...]


@kept
def _work(
    dy: tuple[int, ...], branches: int, counts: tuple[int, ...], parents: int, geometry: Geometry,
    box: Box, columns: int, has_live: bool, device: torch.device,
) -> _Work:  # fmt: skip
    rows, samples, *_, channels = dy
    images, down, across = box.counts(samples, geometry.conv_h, geometry.conv_w)
    per_row, blocks = images * down * across, cdiv(channels, columns)
    most = max(counts) * per_row
    each = max(1, most * branches * blocks // _PROGRAMS)
    parts = cdiv(most, each)
    dz = rows, samples, geometry.conv_h, geometry.conv_w, channels
    sources = rows * per_row, blocks, 2
    launch = Launch(
        box_gradient_kernel, (parts * branches, blocks),
        (counts[0], counts[-1], rows, parents, each, samples),
        BRANCHES=branches, C_OUT=channels, CONV_H=geometry.conv_h, CONV_W=geometry.conv_w,
        OUT_H=geometry.out_h, OUT_W=geometry.out_w, POOL=geometry.pool,
        POOL_PAD=geometry.pool_pad, HAS_CODE=geometry.has_code, HAS_LIVE=has_live,
        WIDE=passes_int32(prod(dz), prod(dy), prod(sources) + parts), IMAGES=box.images,
        BOX_H=box.height, BOX_W=box.width, COLUMNS=columns, num_warps=8, **early(device),
    )  # fmt: skip
    return _Work(launch, dz, (parts, branches, channels), sources)
