"""Contracts of the level kernels that read boxes (TMA): schemas and fakes.

As :mod:`lasem_fast.backends.triton_level_op`, whose checks and autograd they share. One operator
for each direction, because all products of the backward read what its first launch makes. Where
neighbouring rows can be taken for one (see :meth:`~lasem_fast.kernels.level_rows.Rows.joined`)
boxes reach over them. In the sum over samples a configuration that overflowed has to stay alone: it
sends no gradient, and 0 * inf is NaN. A sum in which that happened is made anew, value by value.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import prod
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from lasem_fast.backends.side_stream import SideStream, early_copy
from lasem_fast.kernels.box_form import BoxForm, box_form
from lasem_fast.kernels.kept import kept
from lasem_fast.kernels.level_geometry import (
    Geometry,
    gradient_buffers,
    output_shape,
    skip_buffer,
)
from lasem_fast.kernels.level_rows import Tables
from lasem_fast.kernels.level_tiles import Tile

if TYPE_CHECKING:
    from lasem_fast.kernels.boxes import Box

_library = torch.library.Library("lasem_fast", "FRAGMENT")
_library.define(
    "level_boxes(Tensor x, Tensor[] weights, Tensor[] biases, Tensor? skip, Tensor[] tables, "
    "int[] counts, int[] geometry, ScalarType dtype, int[] tile) -> "
    "(Tensor, Tensor, Tensor, Tensor)"
)
_library.define(
    "level_boxes_backward(Tensor dy, Tensor code, Tensor filters, Tensor columns, Tensor x, "
    "Tensor[] weights, Tensor[] biases, Tensor[] tables, int[] counts, Tensor[] joined, "
    "int[] joined_counts, Tensor? live, Tensor? carried, int[] geometry, bool to_input, "
    "ScalarType? skip_dtype, bool to_parameters, int[] dgrad, int[] wgrad) -> "
    "(Tensor, Tensor, Tensor[], Tensor[])"
)

# What it costs to ask whether a sum has to be made anew, in nanoseconds.
_MENDING = 2000.0

# y, code, the filters as they were read, and the input where it had to be unfolded
forward = torch.ops.lasem_fast.level_boxes.default
backward = torch.ops.lasem_fast.level_boxes_backward.default


@torch.library.register_fake("lasem_fast::level_boxes", lib=_library)
def _(x, weights, biases, skip, tables, counts, geometry, dtype, tile):
    geometry = Geometry(*geometry)
    form = _form(x, weights, geometry)
    shape = output_shape(tables[0].shape[0], x, weights, geometry)
    code = shape if geometry.has_code else (0,)
    filters = (len(weights) * weights[0].shape[0], prod(form.kernel), form.channels)
    columns = form.x_shape if form.unfolds else (0,)
    y, filters, columns = (x.new_empty(size, dtype=dtype) for size in (shape, filters, columns))
    return y, x.new_empty(code, dtype=torch.uint8), filters, columns


@torch.library.register_fake("lasem_fast::level_boxes_backward", lib=_library)
def _(
    dy, code, filters, columns, x, weights, biases, tables, counts, joined, joined_counts, live,
    carried, geometry, to_input, skip_dtype, to_parameters, dgrad, wgrad,
):  # fmt: skip
    rows, geometry = Tables(*tables, tuple(counts)), Geometry(*geometry)
    reaches = to_input or skip_dtype is not None
    dx = torch.empty_like(x, memory_format=torch.contiguous_format) if reaches else x.new_empty(0)
    dskip = skip_buffer(dy, rows, geometry, skip_dtype)
    if not to_parameters:
        return dx, dskip, [], []
    return dx, dskip, gradient_buffers(weights), [torch.empty_like(bias) for bias in biases]


@torch.library.impl(_library, "level_boxes", "CUDA")
@torch.library.impl(_library, "level_boxes", "CPU")  # for Triton's interpreter
def _(x, weights, biases, skip, tables, counts, geometry, dtype, tile):
    from lasem_fast.kernels.box_form import Filters
    from lasem_fast.kernels.box_forward import box_forward
    from lasem_fast.kernels.unfolded import unfolded
    from lasem_fast.kernels.weight_copies import weight_copies

    geometry, rows = Geometry(*geometry), Tables(*tables, tuple(counts))
    form = _form(x, weights, geometry)
    copy = early_copy(x, weights, lambda: weight_copies(weights, dtype, form).data)
    filters = Filters(copy, len(weights), form.kernel)
    columns = x.new_empty(0, dtype=dtype)
    if form.unfolds:
        columns = unfolded(x, weights[0].shape[2:], geometry, form, dtype)
    read = columns if form.unfolds else x.view(form.x_shape)
    y, code = box_forward(read, filters, biases, skip, rows, form.geometry, _tile(tile))
    return y, code, filters.data, columns


@torch.library.impl(_library, "level_boxes_backward", "CUDA")
@torch.library.impl(_library, "level_boxes_backward", "CPU")
def _(
    dy, code, filters, columns, x, weights, biases, tables, counts, joined, joined_counts, live,
    carried, geometry, to_input, skip_dtype, to_parameters, dgrad, wgrad,
):  # fmt: skip
    from lasem_fast.kernels import box_wgrad
    from lasem_fast.kernels.box_dgrad import box_dgrad
    from lasem_fast.kernels.box_form import Filters
    from lasem_fast.kernels.box_gradient import MOST_COLUMNS, box_gradient
    from lasem_fast.kernels.level_wgrad import mend_wgrad

    rows, few = Tables(*tables, tuple(counts)), Tables(*joined, tuple(joined_counts))
    dy = dy.contiguous()
    level = Geometry(*geometry)
    sizes = _backward_sizes(
        tuple(x.shape), tuple(weights[0].shape), level, rows.counts, few.counts,
        len(few.by_parent), tuple(wgrad),
    )  # fmt: skip
    form, shape, tile, together, box = sizes
    geometry, filters = form.geometry, Filters(filters, len(weights), form.kernel)
    summed, read = (few, shape) if together else (rows, form.x_shape)
    read = columns.view(read) if form.unfolds else x.view(read)
    gradient = box_gradient(
        in_rows(dy, sum(summed.counts)), code, len(weights), summed, geometry, box,
        min(tile.columns, MOST_COLUMNS), live=live,
    )  # fmt: skip
    beside, dweights, dbiases = SideStream(x), [], []
    if to_parameters:
        with beside.aside():
            dweights, dbiases = box_wgrad.box_wgrad(
                gradient, read, filters, weights, biases, summed, geometry, tile, live=live,
                spoilt=gradient.spoilt if together else None,
            )  # fmt: skip
            if together:
                mend_wgrad(gradient.spoilt, dweights, dbiases, dy, code, x, rows, level)
    dx, dskip = x.new_empty(0), skip_buffer(dy, rows, geometry, None)
    if to_input or skip_dtype is not None:
        dz, dy, code = (
            in_rows(t, sum(few.counts)) if t.dim() > 1 else t for t in (gradient.dz, dy, code)
        )
        dx, dskip = box_dgrad(
            dz, filters, few, shape, geometry, x.dtype, dy, code, live=live,
            carried=None if carried is None else carried.contiguous(), skip_dtype=skip_dtype,
            tile=_tile(dgrad),
        )  # fmt: skip
        dx = dx.view(x.shape)
        if skip_dtype is not None:
            dskip = in_rows(dskip, len(rows.by_skip))
    beside.join()
    return dx, dskip, dweights, dbiases


class _Sizes(NamedTuple):
    """What a backward reads.

    Attributes:
        form: of the level.
        shape: of what is read, with parents put together.
        tile: of the sum over samples.
        together: whether boxes of that sum reach over rows put together.
        box: of that sum.
    """

    form: BoxForm
    shape: tuple[int, ...]
    tile: Tile
    together: bool
    box: Box


@kept
def _backward_sizes(
    x: tuple[int, ...], weight: tuple[int, ...], geometry: Geometry, counts: tuple[int, ...],
    few_counts: tuple[int, ...], parents: int, tile: tuple[int, ...],
) -> _Sizes:  # fmt: skip
    """For rows of each branch, and as many, with their parents, when rows are put together."""
    from lasem_fast.kernels.box_wgrad import box_of, chosen

    form = box_form(x, weight, geometry)
    shape = parents, form.x_shape[0] * form.x_shape[1] // parents, *form.x_shape[2:]
    sides, wanted = (weight[0], form.channels, form.kernel), _tile(tile)
    best, time = chosen(*sides, counts, form.x_shape, form.geometry, wanted)
    together = sum(few_counts) < sum(counts)
    if together:
        few, few_time = chosen(*sides, few_counts, shape, form.geometry, wanted)
        together = few_time + _MENDING < time
        best = few if together else best
    read = shape if together else form.x_shape
    return _Sizes(form, shape, best, together, box_of(best, read, form.geometry, form.kernel))


def in_rows(tensor: Tensor, rows: int) -> Tensor:
    """``[R, N, ...]`` with rows put together to fewer of more samples, or taken apart again."""
    if tensor.shape[0] == rows:
        return tensor
    samples = tensor.shape[0] * tensor.shape[1] // rows
    return tensor.view(rows, samples, *tensor.shape[2:])


def _form(x: Tensor, weights: Sequence[Tensor], geometry: Geometry) -> BoxForm:
    return box_form(x.shape, weights[0].shape, geometry)


def _tile(tile: Sequence[int]) -> Tile | None:
    return Tile(*tile) if tile else None
