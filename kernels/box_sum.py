"""The outputs of a product on boxes that was cut into parts: sum, bias and ReLU; one launch."""

from __future__ import annotations

from functools import cache
from math import prod

import torch
import triton
import triton.language as tl
from torch import Tensor

from lasem_fast.kernels.boxes import ADDING, Work
from lasem_fast.kernels.early_launch import early, wait_for_others
from lasem_fast.kernels.kept import kept
from lasem_fast.kernels.launches import Launch
from lasem_fast.kernels.level_geometry import CLOSED, passes_int32
from lasem_fast.kernels.level_rows import Tables
from lasem_fast.kernels.level_tiles import cdiv

_LINES, _MOST_COLUMNS = 16, 64
_MOST_PARTS = 16
# A part of the sum that is worth a program of its own, in steps of a tile's depth.
_STEPS = 2
# Nanoseconds of one launch more in a graph: what a small one takes, and what lies before it.
_LAUNCH = 3500.0


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
        adding = _LAUNCH + ADDING * 4 * parts * values if parts > 1 else 0.0
        return work._replace(
            programs=work.programs * parts, steps=work.steps / parts, besides=adding
        ).time

    most = min(_MOST_PARTS, int(work.steps) // _STEPS)
    return min(range(1, max(1, most) + 1), key=time)


@triton.jit(do_not_specialize=["count0", "lines", "size"])
def box_sum_kernel(
    parts, bias0, bias1, by_branch, y, code, count0, lines, size,
    BRANCHES: tl.constexpr, C_OUT: tl.constexpr, PARTS: tl.constexpr,
    HAS_BIAS: tl.constexpr, RELU: tl.constexpr, CLOSED: tl.constexpr, WIDE: tl.constexpr,
    LINES: tl.constexpr, COLUMNS: tl.constexpr,
    EARLY: tl.constexpr,
):  # fmt: skip
    """y [R, lines, Co] and its code from parts [S, R, lines, Co]."""
    wait_for_others(EARLY)
    index: tl.constexpr = tl.int64 if WIDE else tl.int32
    blocks = tl.cdiv(lines, LINES)
    entry = tl.program_id(0) // blocks
    line = tl.program_id(0) % blocks * LINES + tl.arange(0, LINES)
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    used = column < C_OUT
    row = tl.load(by_branch + entry * 3).to(index)
    at = ((row * lines + line) * C_OUT)[:, None] + column[None, :]
    keep = (line < lines)[:, None] & used[None, :]
    total = tl.zeros((LINES, COLUMNS), tl.float32)
    for part in tl.static_range(PARTS):
        total += tl.load(parts + part * size.to(index) + at, mask=keep, other=0.0)
    if HAS_BIAS:
        bias_at = bias0
        if BRANCHES == 2:
            bias_at = tl.where(entry >= count0, bias1, bias0)
        total += tl.load(bias_at + column, mask=used, other=0.0).to(tl.float32)[None, :]
    if RELU:
        # NaN wins, as in PyTorch: a configuration that overflows has to show
        take = (total > 0) | (total != total)
        total = tl.where(take, total, 0.0)
        tl.store(code + at, tl.where(take, 0, CLOSED).to(tl.uint8), mask=keep)
    tl.store(y + at, total.to(y.dtype.element_ty), mask=keep)


def box_sum(
    parts: Tensor, biases: list[Tensor], rows: Tables, branches: int, relu: bool, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """Adds up the parts of every row, in their order: one launch.

    Args:
        parts: ``[S, R, N, H, W, Co]``, float32, contiguous.
        biases: one contiguous ``[Co]`` per branch, or none.
        rows: the R rows.
        branches: how many.
        relu: whether a ReLU follows.
        dtype: of the output.

    Returns:
        ``[R, N, H, W, Co]`` and its code, as
        :func:`~lasem_fast.kernels.level_forward.level_forward` gives them.
    """
    shape = parts.shape[1:]
    y = parts.new_empty(shape, dtype=dtype)
    code = parts.new_empty(shape if relu else (0,), dtype=torch.uint8)
    biased = biases or [parts]  # never read
    launch = _launch(tuple(parts.shape), branches, rows.counts[0], bool(biases), relu, parts.device)
    launch(parts, biased[0], biased[-1], rows.by_branch, y, code)
    return y, code


@kept
def _launch(
    parts: tuple[int, ...], branches: int, count0: int, has_bias: bool, relu: bool,
    device: torch.device,
) -> Launch:  # fmt: skip
    cut, rows, *image, channels = parts
    lines, size = prod(image), rows * prod(image) * channels
    columns = min(_MOST_COLUMNS, triton.next_power_of_2(channels))
    return Launch(
        box_sum_kernel, (rows * cdiv(lines, _LINES), cdiv(channels, columns)),
        (count0, lines, size),
        BRANCHES=branches, C_OUT=channels, PARTS=cut, HAS_BIAS=has_bias, RELU=relu,
        CLOSED=CLOSED, WIDE=passes_int32(cut * size), LINES=_LINES, COLUMNS=columns,
        num_warps=4, **early(device),
    )  # fmt: skip
