"""Contracts of the level kernels that read boxes (TMA): schemas and fakes.

As :mod:`lasem_fast.backends.triton_level_op`, whose checks and autograd they share. One operator
for each direction, because all products of the backward read what its first launch makes.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from lasem_fast.kernels.level_geometry import (
    Geometry,
    gradient_buffers,
    output_shape,
    skip_buffer,
)
from lasem_fast.kernels.level_rows import Tables
from lasem_fast.kernels.level_tiles import Tile

_library = torch.library.Library("lasem_fast", "FRAGMENT")
_library.define(
    "level_boxes(Tensor x, Tensor[] weights, Tensor[] biases, Tensor? skip, Tensor[] tables, "
    "int[] counts, int[] geometry, int[] tile) -> (Tensor, Tensor, Tensor)"
)
_library.define(
    "level_boxes_backward(Tensor dy, Tensor code, Tensor copies, Tensor x, Tensor[] weights, "
    "Tensor[] biases, Tensor[] tables, int[] counts, Tensor? live, Tensor? carried, "
    "int[] geometry, bool to_input, ScalarType? skip_dtype, bool to_parameters, int[] dgrad, "
    "int[] wgrad) -> (Tensor, Tensor, Tensor[], Tensor[])"
)

forward = torch.ops.lasem_fast.level_boxes.default
backward = torch.ops.lasem_fast.level_boxes_backward.default


@torch.library.register_fake("lasem_fast::level_boxes", lib=_library)
def _(x, weights, biases, skip, tables, counts, geometry, tile):
    geometry = Geometry(*geometry)
    shape = output_shape(tables[0].shape[0], x, weights, geometry)
    code = shape if geometry.has_code else (0,)
    channels_out, channels, kh, kw = weights[0].shape
    copies = (len(weights) * channels_out, kh * kw, channels)
    return x.new_empty(shape), x.new_empty(code, dtype=torch.uint8), x.new_empty(copies)


@torch.library.register_fake("lasem_fast::level_boxes_backward", lib=_library)
def _(
    dy, code, copies, x, weights, biases, tables, counts, live, carried, geometry, to_input,
    skip_dtype, to_parameters, dgrad, wgrad,
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
def _(x, weights, biases, skip, tables, counts, geometry, tile):
    from lasem_fast.kernels.box_forward import box_forward
    from lasem_fast.kernels.weight_copies import weight_copies

    geometry, rows = Geometry(*geometry), Tables(*tables, tuple(counts))
    copies = weight_copies(weights, x.dtype)
    y, code = box_forward(x, weights, copies, biases, skip, rows, geometry, _tile(tile))
    return y, code, copies


@torch.library.impl(_library, "level_boxes_backward", "CUDA")
@torch.library.impl(_library, "level_boxes_backward", "CPU")
def _(
    dy, code, copies, x, weights, biases, tables, counts, live, carried, geometry, to_input,
    skip_dtype, to_parameters, dgrad, wgrad,
):  # fmt: skip
    from lasem_fast.kernels import box_wgrad
    from lasem_fast.kernels.box_dgrad import box_dgrad
    from lasem_fast.kernels.box_gradient import MOST_COLUMNS, box_gradient
    from lasem_fast.kernels.boxes import box_for

    geometry, rows, dy = Geometry(*geometry), Tables(*tables, tuple(counts)), dy.contiguous()
    samples = x.shape[1]
    tile = _tile(wgrad) or box_wgrad.chosen(weights, rows, samples, geometry)
    box = box_for(tile.depth, samples, geometry.conv_h, geometry.conv_w)
    columns = min(tile.columns, MOST_COLUMNS)
    gradient = box_gradient(dy, code, len(weights), rows, geometry, box, columns, live=live)
    dx, dskip = x.new_empty(0), skip_buffer(dy, rows, geometry, None)
    if to_input or skip_dtype is not None:
        dx, dskip = box_dgrad(
            gradient.dz, copies, weights, rows, tuple(x.shape), geometry, x.dtype, dy, code,
            live=live, carried=None if carried is None else carried.contiguous(),
            skip_dtype=skip_dtype, tile=_tile(dgrad),
        )  # fmt: skip
    if not to_parameters:
        return dx, dskip, [], []
    dweights, dbiases = box_wgrad.box_wgrad(
        gradient, x, weights, biases, rows, geometry, tile, live=live
    )
    return dx, dskip, dweights, dbiases


def _tile(tile: Sequence[int]) -> Tile | None:
    return Tile(*tile) if tile else None
