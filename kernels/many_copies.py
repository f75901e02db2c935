"""Filters of several levels, channels last and in the dtype of the products; one launch.

As :mod:`lasem_fast.kernels.weight_copies`, with the levels' sizes and addresses in a table.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import prod

import torch
import triton
import triton.language as tl
from torch import Tensor

from lasem_fast.kernels.box_form import BoxForm, Filters
from lasem_fast.kernels.early_launch import early, wait_for_others
from lasem_fast.kernels.launches import Launch
from lasem_fast.kernels.level_geometry import arrivals_buffer
from lasem_fast.kernels.level_tiles import cdiv
from lasem_fast.kernels.parts import nobody_yet

_BLOCK = 1024
# Numbers of a level in the table.
_COLUMNS = tl.constexpr(16)


@triton.jit
def many_copies_kernel(
    levels, blocks, of_weights, of_copies, of_arrivals, BLOCK: tl.constexpr, EARLY: tl.constexpr
):
    """A block of the copies of one level, whose row of ``levels`` says what and where.

    ``of_weights``, ``of_copies`` and ``of_arrivals`` say what dtypes lie behind the addresses.
    """
    wait_for_others(EARLY)
    level = levels + tl.load(blocks + tl.program_id(0) * 2) * _COLUMNS
    block = tl.load(blocks + tl.program_id(0) * 2 + 1)
    copy = tl.load(level + 2).to(of_copies.dtype)
    if block == 0:
        nobody_yet(tl.load(level + 3).to(of_arrivals.dtype))
    values = tl.load(level + 8).to(tl.int32)
    of_branch = tl.load(level + 9).to(tl.int32)
    line = tl.load(level + 10).to(tl.int32)
    of_filter = tl.load(level + 11).to(tl.int32)
    channels = tl.load(level + 12).to(tl.int32)
    across = tl.load(level + 13).to(tl.int32)
    at = block * BLOCK + tl.arange(0, BLOCK)
    inside = at < values
    place = at % line
    weight = tl.where(at >= of_branch, tl.load(level + 1), tl.load(level)).to(of_weights.dtype)
    weight += at % of_branch // line * tl.load(level + 4)
    weight += place % channels * tl.load(level + 5)
    weight += place // (channels * across) * tl.load(level + 6)
    weight += place // channels % across * tl.load(level + 7)
    value = tl.load(weight, mask=inside & (place < of_filter), other=0.0)
    tl.store(copy + at, value.to(copy.dtype.element_ty), inside)


class ManyCopies:
    """The launch, and the memory that it fills."""

    def __init__(
        self, levels: Sequence[tuple[Sequence[Tensor], BoxForm]], dtype: torch.dtype
    ) -> None:
        """Asks the device for the table, which a graph does not allow.

        Args:
            levels: of each its weights, as :func:`~lasem_fast.kernels.weight_copies.weight_copies`
                takes them but of one layout, and its form; all on one device and of one dtype.
            dtype: of the copies.
        """
        first = levels[0][0][0]
        self.filters = [_memory(weights, form, dtype) for weights, form in levels]
        rows = [
            _row(weights, form, made)
            for (weights, form), made in zip(levels, self.filters, strict=True)
        ]
        blocks = [
            [level, block]
            for level, made in enumerate(self.filters)
            for block in range(cdiv(made.data.numel(), _BLOCK))
        ]
        self._tables = (
            torch.tensor(rows, dtype=torch.int64, device=first.device),
            torch.tensor(blocks, dtype=torch.int32, device=first.device),
        )
        self._like = first, self.filters[0].data, self.filters[0].arrivals
        self._launch = Launch(
            many_copies_kernel, (len(blocks),), (), BLOCK=_BLOCK, num_warps=4,
            **early(first.device),
        )  # fmt: skip

    def __call__(self) -> None:
        """Fills :attr:`filters`, of one level each."""
        self._launch(*self._tables, *self._like)


def _memory(weights: Sequence[Tensor], form: BoxForm, dtype: torch.dtype) -> Filters:
    shape = len(weights) * weights[0].shape[0], prod(form.kernel), form.channels
    data = weights[0].new_empty(shape, dtype=dtype)
    return Filters(data, arrivals_buffer(data), len(weights), form.kernel)


def _row(weights: Sequence[Tensor], form: BoxForm, made: Filters) -> list[int]:
    _, channels, _, across = weights[0].shape
    row = [
        weights[0].data_ptr(), weights[-1].data_ptr(), made.data.data_ptr(),
        made.arrivals.data_ptr(), *weights[0].stride(), made.data.numel(),
        made.data.numel() // made.branches, prod(form.kernel) * form.channels,
        prod(weights[0].shape[1:]), channels, across,
    ]  # fmt: skip
    return row + [0] * (_COLUMNS.value - len(row))
