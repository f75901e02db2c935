"""Contracts of the level kernels that read boxes (TMA): schemas and fakes.

As :mod:`lasem_fast.backends.triton_level_op`, whose checks and autograd they share. One operator
for each direction, because all products of the backward read what its first launch makes. Where
neighbouring rows can be taken for one (see :meth:`~lasem_fast.kernels.level_rows.Rows.joined`)
boxes reach over them. In the sum over samples a configuration that overflowed has to stay alone: it
sends no gradient, and 0 * inf is NaN. A sum in which that happened is made anew, value by value.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from math import prod
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from lasem_fast.backends.looked_at import is_looked_at
from lasem_fast.kernels.box_form import BoxForm, box_form
from lasem_fast.kernels.level_geometry import (
    Geometry,
    arrivals_buffer,
    gradient_buffers,
    output_shape,
    skip_buffer,
)
from lasem_fast.kernels.level_rows import Tables

_library = torch.library.Library("lasem_fast", "FRAGMENT")
_library.define(
    "level_boxes(Tensor x, Tensor[] weights, Tensor[] biases, Tensor? skip, Tensor[] tables, "
    "int[] counts, int[] geometry, ScalarType dtype, int[] tile) -> "
    "(Tensor, Tensor, Tensor, Tensor, Tensor)"
)
_library.define(
    "level_boxes_backward(Tensor dy, Tensor code, Tensor filters, Tensor columns, "
    "Tensor arrivals, Tensor x, Tensor[] weights, Tensor[] biases, Tensor[] tables, int[] counts, "
    "Tensor[] joined, int[] joined_counts, Tensor? live, Tensor? carried, int[] geometry, "
    "bool to_input, ScalarType? skip_dtype, bool to_parameters, int[] dgrad, int[] wgrad) -> "
    "(Tensor, Tensor, Tensor[], Tensor[])"
)

_forward = torch.ops.lasem_fast.level_boxes.default
_backward = torch.ops.lasem_fast.level_boxes_backward.default


@torch.library.register_fake("lasem_fast::level_boxes", lib=_library)
def _(x, weights, biases, skip, tables, counts, geometry, dtype, tile):
    geometry = Geometry(*geometry)
    form = _form(x, weights, geometry)
    shape = output_shape(tables[0].shape[0], x, weights, geometry)
    code = shape if geometry.has_code else (0,)
    filters = (len(weights) * weights[0].shape[0], prod(form.kernel), form.channels)
    columns = form.x_shape if form.unfolds else (0,)
    y, filters, columns = (x.new_empty(size, dtype=dtype) for size in (shape, filters, columns))
    return y, x.new_empty(code, dtype=torch.uint8), filters, columns, arrivals_buffer(x)


@torch.library.register_fake("lasem_fast::level_boxes_backward", lib=_library)
def _(
    dy, code, filters, columns, arrivals, x, weights, biases, tables, counts, joined,
    joined_counts, live, carried, geometry, to_input, skip_dtype, to_parameters, dgrad, wgrad,
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
def _(*arguments):
    return _launches().forward(*arguments)


@torch.library.impl(_library, "level_boxes_backward", "CUDA")
@torch.library.impl(_library, "level_boxes_backward", "CPU")
def _(*arguments):
    return _launches().backward(*arguments)


def forward(x: Tensor, *others: Any) -> tuple[Tensor, ...]:
    """``level_boxes``: y, code, the filters as they were read, the input if it was unfolded, and
    zeros for the backward to count in."""
    run = _forward if is_looked_at(x) else _launches().forward
    return run(x, *others)


def backward(dy: Tensor, *others: Any) -> tuple[Tensor, Tensor, list[Tensor], list[Tensor]]:
    """``level_boxes_backward``: gradients of input, skip, weights and biases."""
    run = _backward if is_looked_at(dy) else _launches().backward
    return run(dy, *others)


@cache
def _launches() -> ModuleType:
    from lasem_fast.backends import box_level_run  # and triton with it

    return box_level_run


def _form(x: Tensor, weights: Sequence[Tensor], geometry: Geometry) -> BoxForm:
    return box_form(x.shape, weights[0].shape, geometry)
