"""What the operators of :mod:`lasem_fast.backends.box_level_op` run: the launches of one level."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from lasem_fast.backends.early_copies import copies_of
from lasem_fast.backends.side_stream import SideStream
from lasem_fast.kernels.box_dgrad import box_dgrad
from lasem_fast.kernels.box_form import BoxForm, Filters, box_form
from lasem_fast.kernels.box_forward import box_forward
from lasem_fast.kernels.box_gradient import MOST_COLUMNS, box_gradient
from lasem_fast.kernels.box_wgrad import box_of, box_wgrad, chosen
from lasem_fast.kernels.boxes import Box
from lasem_fast.kernels.kept import kept
from lasem_fast.kernels.level_geometry import Geometry, skip_buffer
from lasem_fast.kernels.level_rows import Tables, in_rows
from lasem_fast.kernels.level_tiles import Tile
from lasem_fast.kernels.level_wgrad import mend_wgrad
from lasem_fast.kernels.unfolded import unfolded

# What it costs to ask whether a sum has to be made anew, in nanoseconds.
_MENDING = 2000.0


def forward(x, weights, biases, skip, tables, counts, geometry, dtype, tile):
    """Copies of the weights, the input unfolded where it has to be, and the level's output."""
    geometry, rows = Geometry(*geometry), Tables(*tables, tuple(counts))
    form = box_form(tuple(x.shape), tuple(weights[0].shape), geometry)
    filters = copies_of(x, weights, dtype, form)
    columns = x.new_empty(0, dtype=dtype)
    if form.unfolds:
        columns = unfolded(x, weights[0].shape[2:], geometry, form, dtype)
    read = columns if form.unfolds else x.view(form.x_shape)
    y, code = box_forward(read, filters, biases, skip, rows, form.geometry, _tile(tile))
    return y, code, filters.data, columns, filters.arrivals


def backward(
    dy, code, filters, columns, arrivals, x, weights, biases, tables, counts, joined,
    joined_counts, live, carried, geometry, to_input, skip_dtype, to_parameters, dgrad, wgrad,
):  # fmt: skip
    """The gradient of the convolution, and the products that read it."""
    rows, few = Tables(*tables, tuple(counts)), Tables(*joined, tuple(joined_counts))
    dy = dy.contiguous()
    level = Geometry(*geometry)
    sizes = _backward_sizes(
        tuple(x.shape), tuple(weights[0].shape), level, rows.counts, few.counts,
        len(few.by_parent), tuple(wgrad),
    )  # fmt: skip
    form, shape, tile, together, box = sizes
    geometry, filters = form.geometry, Filters(filters, arrivals, len(weights), form.kernel)
    summed, read = (few, shape) if together else (rows, form.x_shape)
    read = columns.view(read) if form.unfolds else x.view(read)
    gradient = box_gradient(
        in_rows(dy, sum(summed.counts)), code, len(weights), summed, geometry, box,
        min(tile.columns, MOST_COLUMNS), live=live,
    )  # fmt: skip
    beside, dweights, dbiases = SideStream(x), [], []
    if to_parameters:
        with beside.aside():
            dweights, dbiases = box_wgrad(
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


def _tile(tile: Sequence[int]) -> Tile | None:
    return Tile(*tile) if tile else None
