"""How the rows of a level are held: folded into the batch, one batch per branch, or rows first.

The common form is a folded batch with samples outermost: entry ``n * P + r`` of ``[N * P, ...]``
is sample n under prefix r. A convolution of both branches' weights gives the next level in that
form by a view. The other forms are put into it only where something needs it.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache, lru_cache
from typing import NamedTuple

import torch
from torch import Tensor

from lasem_fast.levels.plan import Level


class Stacks(NamedTuple):
    """The rows of a level before they are put together: one folded batch per used branch."""

    parts: list[Tensor]
    level: Level

    def folded(self) -> Tensor:
        """All rows in nested-loop order, ``[N * P, ...]``."""
        parts, level = self
        if len(parts) == 1:
            return parts[0]
        if level.takes_turns:
            return torch.stack(parts, dim=1).flatten(0, 1)
        samples = parts[0].shape[0] // len(level.rows_of(level.used_branches[0]))
        rows = torch.cat([part.unflatten(0, (samples, -1)) for part in parts], dim=1)
        order = level.merge_order()
        if order != tuple(range(len(level))):
            rows = rows.index_select(1, index_tensor(order, rows.device))
        return rows.flatten(0, 1)


class RowsFirst(NamedTuple):
    """Rows outermost and channels last, as kernels like them.

    Images ``[P, N, H, W, C]`` or vectors ``[P, N, F]``, with any strides.
    """

    data: Tensor

    @classmethod
    def of(cls, h: Tensor | RowsFirst, rows: int) -> RowsFirst:
        """A view of a folded batch ``[N * P, C, H, W]`` or ``[N * P, F]`` of P ``rows``."""
        if isinstance(h, RowsFirst):
            return h
        # a reshape may give a single image odd strides, with which PyTorch 2.13 computes wrong
        # gradients of batch norm
        data = h[None] if rows == 1 else h.unflatten(0, (-1, rows)).transpose(0, 1)
        return cls(data if data.dim() == 3 else data.permute(0, 1, 3, 4, 2))

    def folded(self) -> Tensor:
        """All rows in nested-loop order, ``[N * P, C, H, W]`` or ``[N * P, F]``."""
        if len(self.data) == 1:
            data = self.data[0]
            return data if data.dim() == 2 else data.permute(0, 3, 1, 2)
        data = self.data.transpose(0, 1)
        return (data if data.dim() == 3 else data.permute(0, 1, 4, 2, 3)).flatten(0, 1)


class Carried(NamedTuple):
    """A level's rows with a skip on its way, which lies where it began.

    Attributes:
        main: the rows' own activations, images.
        skip: images of the same size.
        rows: for each row, the row of ``skip`` that it carries.
    """

    main: RowsFirst
    skip: RowsFirst
    rows: tuple[int, ...]

    def folded(self) -> Tensor:
        """All rows, the skip's channels behind their own, ``[N * P, C + C_skip, H, W]``."""
        main, skip = self.main.data, self.skip.data
        if self.rows != tuple(range(skip.shape[0])):
            skip = skip.index_select(0, index_tensor(self.rows, skip.device))
        return RowsFirst(torch.cat([main, skip], dim=-1)).folded()


Fold = Tensor | Stacks | RowsFirst | Carried


def folded(h: Fold) -> Tensor:
    """Any form as a folded batch with samples outermost."""
    return h if isinstance(h, Tensor) else h.folded()


def split_rows(h: Fold, width: int, sizes: Sequence[int]) -> list[Fold]:
    """The ``width`` rows of a level in runs of these sizes, in nested-loop order."""
    if isinstance(h, Carried):
        parts, at = [], 0
        for main in h.main.data.split(sizes):
            rows = h.rows[at : at + len(main)]
            parts.append(Carried(RowsFirst(main), h.skip, rows))
            at += len(main)
        return parts
    if isinstance(h, RowsFirst):
        return [RowsFirst(part) for part in h.data.split(sizes)]
    parts = folded(h).unflatten(0, (-1, width)).split(sizes, dim=1)
    return [part.flatten(0, 1) for part in parts]


def rows_of(h: Tensor, width: int, rows: tuple[int, ...]) -> Tensor:
    """Some of the ``width`` rows of a folded batch."""
    if len(rows) == width and rows == tuple(range(width)):
        return h
    split = h.unflatten(0, (-1, width))
    if len(rows) == 1:
        return split[:, rows[0]]
    step = rows[1] - rows[0] if len(rows) > 1 else 1
    if step > 0 and rows == tuple(range(rows[0], rows[-1] + 1, step)):
        return split[:, rows[0] : rows[-1] + 1 : step].flatten(0, 1)
    return split.index_select(1, index_tensor(rows, h.device)).flatten(0, 1)


def index_tensor(rows: tuple[int, ...], device: torch.device) -> Tensor:
    """Row numbers as an index.

    On a device it is made once and kept for good: making one waits for the device, which a CUDA
    graph does not allow, and a graph goes on reading it.
    """
    if torch.compiler.is_compiling():
        return torch.tensor(rows, device=device)
    return _recent_index(rows) if device.type == "cpu" else _kept_index(rows, device)


@lru_cache(maxsize=1024)
def _recent_index(rows: tuple[int, ...]) -> Tensor:
    with torch.inference_mode(False):
        return torch.tensor(rows, device="cpu")  # whatever device is the default now


@cache
def _kept_index(rows: tuple[int, ...], device: torch.device) -> Tensor:
    with torch.inference_mode(False):
        return torch.tensor(rows, device=device)


def in_order(y: Tensor, rows: int, order: Sequence[int] | None) -> Tensor:
    """``[rows * N, ...]``, rows outermost, with row ``order[i]`` at place i; None: as they are."""
    if order is None or tuple(order) == tuple(range(rows)):
        return y
    y = y.unflatten(0, (rows, y.shape[0] // rows))
    return y.index_select(0, index_tensor(tuple(order), y.device)).flatten(0, 1)
