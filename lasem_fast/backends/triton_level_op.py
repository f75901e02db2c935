"""Contracts of the Triton level kernels: schemas, fakes and autograd.

The operators are opaque to ``torch.compile``: there is nothing around a launch that a compiler
could fuse into it, and in eager mode this boundary is cheaper than ``torch.library.triton_op``. The
kernels, and triton with them, are imported when an operator first runs.
"""

from __future__ import annotations

from collections.abc import Sequence
from operator import attrgetter
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from lasem_fast.backends import box_level_op, second_order
from lasem_fast.backends.looked_at import is_looked_at
from lasem_fast.kernels.level_geometry import (
    Geometry,
    arrivals_buffer,
    gradient_buffers,
    output_shape,
    skip_buffer,
)
from lasem_fast.kernels.level_rows import Rows, Tables, in_rows, tables_of
from lasem_fast.kernels.level_tiles import Tile
from lasem_fast.levels.row_liveness import Liveness

DTYPES = (torch.float32, torch.float16, torch.bfloat16)

_shape, _dtype, _device = map(attrgetter, ("shape", "dtype", "device"))

_library = torch.library.Library("lasem_fast", "FRAGMENT")
_library.define(
    "level_triton(Tensor x, Tensor[] weights, Tensor[] biases, Tensor? skip, Tensor[] tables, "
    "int[] counts, int[] geometry, ScalarType dtype, int[] tile) -> (Tensor, Tensor, Tensor)"
)
_library.define(
    "level_dgrad_triton(Tensor dy, Tensor code, Tensor[] weights, Tensor[] tables, int[] counts, "
    "Tensor? live, Tensor? carried, int[] x_shape, int[] geometry, ScalarType dtype, "
    "ScalarType? skip_dtype, int[] tile) -> (Tensor, Tensor)"
)
_library.define(
    "level_wgrad_triton(Tensor dy, Tensor code, Tensor x, Tensor[] weights, Tensor[] biases, "
    "Tensor[] tables, int[] counts, Tensor arrivals, Tensor? live, int[] geometry, int[] tile) "
    "-> (Tensor[], Tensor[])"
)

_forward_op = torch.ops.lasem_fast.level_triton.default
_dgrad_op = torch.ops.lasem_fast.level_dgrad_triton.default
_wgrad_op = torch.ops.lasem_fast.level_wgrad_triton.default


class Tiles(NamedTuple):
    """Block sizes of a level's kernels; an empty one is chosen by shape."""

    forward: Sequence[int] = ()
    dgrad: Sequence[int] = ()
    wgrad: Sequence[int] = ()


@torch.library.register_fake("lasem_fast::level_triton", lib=_library)
def _(x, weights, biases, skip, tables, counts, geometry, dtype, tile):
    geometry = Geometry(*geometry)
    shape = output_shape(tables[0].shape[0], x, weights, geometry)
    code = shape if geometry.has_code else (0,)
    y, code = x.new_empty(shape, dtype=dtype), x.new_empty(code, dtype=torch.uint8)
    return y, code, arrivals_buffer(x)


@torch.library.register_fake("lasem_fast::level_dgrad_triton", lib=_library)
def _(dy, code, weights, tables, counts, live, carried, x_shape, geometry, dtype, skip_dtype, tile):
    dx = dy.new_empty(x_shape, dtype=dtype)
    return dx, skip_buffer(dy, Tables(*tables, tuple(counts)), Geometry(*geometry), skip_dtype)


@torch.library.register_fake("lasem_fast::level_wgrad_triton", lib=_library)
def _(dy, code, x, weights, biases, tables, counts, arrivals, live, geometry, tile):
    return gradient_buffers(weights), [torch.empty_like(bias) for bias in biases]


@torch.library.impl(_library, "level_triton", "CUDA")
@torch.library.impl(_library, "level_triton", "CPU")  # for Triton's interpreter
def _run_forward(x, weights, biases, skip, tables, counts, geometry, dtype, tile):
    from lasem_fast.kernels.level_forward import level_forward

    geometry, rows = Geometry(*geometry), Tables(*tables, tuple(counts))
    _check(x, weights, biases, skip, rows, geometry, dtype)
    tf32 = _tf32(x.shape, weights, geometry, dtype)
    return level_forward(x, weights, biases, skip, rows, geometry, dtype, tf32, _tile(tile))


@torch.library.impl(_library, "level_dgrad_triton", "CUDA")
@torch.library.impl(_library, "level_dgrad_triton", "CPU")
def _run_dgrad(
    dy, code, weights, tables, counts, live, carried, x_shape, geometry, dtype, skip_dtype, tile
):
    from lasem_fast.kernels.level_dgrad import level_dgrad

    geometry, rows = Geometry(*geometry), Tables(*tables, tuple(counts))
    _check_live(live, dy)
    carried = None if carried is None else carried.contiguous()
    return level_dgrad(
        dy.contiguous(), code, weights, rows, tuple(x_shape), geometry, dtype,
        live=live, carried=carried, skip_dtype=skip_dtype,
        tf32=_tf32(x_shape, weights, geometry, dy.dtype), tile=_tile(tile),
    )  # fmt: skip


@torch.library.impl(_library, "level_wgrad_triton", "CUDA")
@torch.library.impl(_library, "level_wgrad_triton", "CPU")
def _run_wgrad(dy, code, x, weights, biases, tables, counts, arrivals, live, geometry, tile):
    from lasem_fast.kernels.level_wgrad import level_wgrad

    geometry, rows = Geometry(*geometry), Tables(*tables, tuple(counts))
    _check_live(live, dy)
    tf32 = _tf32(x.shape, weights, geometry, dy.dtype)
    return level_wgrad(
        dy.contiguous(), code, x, weights, biases, rows, geometry, arrivals,
        live=live, tf32=tf32, tile=_tile(tile),
    )  # fmt: skip


def _forward(x: Tensor, *others: Any) -> tuple[Tensor, Tensor, Tensor]:
    return (_forward_op if is_looked_at(x) else _run_forward)(x, *others)


def _dgrad(dy: Tensor, *others: Any) -> tuple[Tensor, Tensor]:
    return (_dgrad_op if is_looked_at(dy) else _run_dgrad)(dy, *others)


def _wgrad(dy: Tensor, *others: Any) -> tuple[list[Tensor], list[Tensor]]:
    return (_wgrad_op if is_looked_at(dy) else _run_wgrad)(dy, *others)


def _tile(tile: Sequence[int]) -> Tile | None:
    return Tile(*tile) if tile else None


def _tf32(
    x_shape: Sequence[int], weights: list[Tensor], geometry: Geometry, dtype: torch.dtype
) -> bool:
    """Whether PyTorch's own settings let a float32 product of this kind run in TF32."""
    if dtype != torch.float32:
        return False
    linear = geometry.covers(x_shape, weights[0].shape)
    settings = torch.backends.cuda.matmul if linear else torch.backends.cudnn.conv
    return settings.fp32_precision == "tf32"


def _expect(fits: bool, name: str, expected: str, got: object) -> None:
    if not fits:
        raise ValueError(f"{name}: expected {expected}, got {got}")


# Forms of arguments that were found to fit.
_fit: set[tuple[Any, ...]] = set()
_MOST_FORMS = 2**12


def _check(
    x: Tensor,
    weights: list[Tensor],
    biases: list[Tensor],
    skip: Tensor | None,
    rows: Tables,
    geometry: Geometry,
    dtype: torch.dtype,
) -> None:
    tensors = (x, *weights, *biases, *([] if skip is None else [skip]))
    form = (
        *map(_shape, tensors), *map(_dtype, tensors), *map(_device, tensors),
        *map(Tensor.is_contiguous, biases), len(weights), len(biases), skip is None,
        rows.by_parent.shape, rows.by_skip.shape, geometry, dtype,
    )  # fmt: skip
    if form in _fit:
        return
    _expect(x.dim() == 5, "x", "shape [P, N, H, W, C]", list(x.shape))
    _expect(len(weights) in (1, 2), "weights", "one or two branches", len(weights))
    _expect(len(biases) in (0, len(weights)), "biases", "one per branch or none", len(biases))
    parents = len(rows.by_parent)
    _expect(x.shape[0] == parents, "x", f"{parents} parents, as rows.width", x.shape[0])
    shape = [weights[0].shape[0], x.shape[-1], *weights[0].shape[2:]]
    for weight in weights:
        _expect(list(weight.shape) == shape and len(shape) == 4, "weights",
                "shape [Co, C, KH, KW]", f"{list(weight.shape)} with C={x.shape[-1]}")  # fmt: skip
    for bias in biases:
        _expect(list(bias.shape) == shape[:1], "biases", f"shape {shape[:1]}", list(bias.shape))
        _expect(bias.is_contiguous(), "biases", "contiguous tensors", bias.stride())
    skips = [] if skip is None else [skip]
    for tensor in skips:
        size = [len(rows.by_skip), x.shape[1], geometry.conv_h, geometry.conv_w, shape[0]]
        _expect(list(tensor.shape) == size, "skip", f"shape {size}", list(tensor.shape))
    _expect(bool(skips) or not geometry.relu_after, "geometry", "relu_after = 0 without a skip", 1)
    floats = "float32, float16 or bfloat16"
    for name, tensors in (("x", [x]), ("weights", weights), ("skip", skips)):
        for tensor in tensors:
            _expect(tensor.dtype in DTYPES, name, floats, tensor.dtype)
    for name, tensors in (("weights", weights), ("biases", biases), ("skip", skips)):
        for tensor in tensors:
            _expect(tensor.device == x.device, name, f"tensors on {x.device}", tensor.device)
            _expect(tensor.dtype == tensors[0].dtype, name, "one dtype", tensor.dtype)
    _expect(dtype in DTYPES, "dtype", floats, dtype)
    _expect(geometry.pool in (1, 2, 3), "pool", "1, 2 or 3", geometry.pool)
    if len(_fit) >= _MOST_FORMS:
        _fit.clear()
    _fit.add(form)


def _check_live(live: Tensor | None, dy: Tensor) -> None:
    if live is None:
        return
    rows = [dy.shape[0]]
    _expect(live.dtype == torch.bool, "live", "a bool tensor", live.dtype)
    _expect(list(live.shape) == rows, "live", f"shape {rows}", list(live.shape))
    _expect(live.device == dy.device, "live", f"a tensor on {dy.device}", live.device)
    _expect(live.is_contiguous(), "live", "a contiguous tensor", live.stride())


class _Call(NamedTuple):
    """What a level's backward needs besides tensors."""

    rows: Rows
    geometry: Geometry
    liveness: Liveness | None
    dtype: torch.dtype
    tiles: Tiles
    branches: int
    carry: bool
    boxes: bool
    gathers_back: bool


class _Level(torch.autograd.Function):
    """One tree level with its backward."""

    @staticmethod
    def forward(ctx, call, x, skip, *parameters):
        weights, biases = list(parameters[: call.branches]), list(parameters[call.branches :])
        *tables, counts = tables_of(call.rows, call.branches, x.device)
        filters = columns = None
        if call.boxes:
            _check(x, weights, biases, skip, Tables(*tables, counts), call.geometry, call.dtype)
            y, code, filters, columns, arrivals = _forward_in_boxes(call, x, weights, biases, skip)
        else:
            y, code, arrivals = _forward(
                x, weights, biases, skip, tables, counts, call.geometry, call.dtype,
                call.tiles.forward,
            )  # fmt: skip
        # the skip itself is not read again, but gradients of gradients lead to it
        ctx.save_for_backward(x, skip, code, arrivals, filters, columns, *parameters)
        ctx.call, ctx.tables, ctx.counts = call, tables, counts
        ctx.skip_dtype = None if skip is None else skip.dtype
        ctx.set_materialize_grads(False)
        return (y, x) if call.carry else y

    @staticmethod
    def backward(ctx, dy, carried=None):
        call = ctx.call
        x, skip, code, arrivals, filters, columns, *parameters = ctx.saved_tensors
        grads = [None] * len(parameters)
        if dy is None:
            return None, carried, None, *grads
        live = None if call.liveness is None else call.liveness.live
        if second_order.wanted():
            return None, *_plain_backward(ctx, dy, live, carried, x, skip, code, parameters)
        dx, dskip, skip_dtype = None, None, None
        if ctx.needs_input_grad[2]:
            # the gradient itself where every row has a skip row of its own and all of it passes
            passes = not call.geometry.skip_has_code and call.rows.skips_in_order
            if passes and live is None and dy.dtype == ctx.skip_dtype:
                dskip = dy
            else:
                skip_dtype = ctx.skip_dtype
        if call.boxes and not call.gathers_back:
            dx, summed, gradients = _box_backward(
                ctx, dy, code, arrivals, filters, columns, x, parameters, live, carried, skip_dtype
            )
        else:
            dx, summed, gradients = _gather_backward(
                ctx, dy, code, arrivals, filters, x, parameters, live, carried, skip_dtype
            )
        dskip = dskip if skip_dtype is None else summed
        return None, dx, dskip, *(gradients or grads)


def _forward_in_boxes(call, x, weights, biases, skip):
    skips = [] if skip is None else [skip]
    joined, rows = _joined(call, x, skips), len(call.rows)
    *tables, counts = tables_of(joined, call.branches, x.device)
    together = in_rows(x, joined.width)
    skips = [in_rows(skip, joined.skip_width) for skip in skips]
    y, code, filters, columns, arrivals = box_level_op.forward(
        together, weights, biases, *(skips or [None]), tables, counts, call.geometry, call.dtype,
        call.tiles.forward,
    )  # fmt: skip
    y = in_rows(y, rows)
    code = in_rows(code, rows) if code.dim() > 1 else code
    columns = in_rows(columns, len(x)) if columns.dim() > 1 else columns
    return y, code, filters, columns, arrivals


def _joined(call: _Call, x: Tensor, others: Sequence[Tensor]) -> Rows:
    """The rows put together, if the tensors' samples lie one behind the other."""
    for tensor in (x, *others):
        if tensor.stride(0) != tensor.shape[1] * tensor.stride(1) and len(tensor) > 1:
            return call.rows
    return call.rows.joined()


def _gather_backward(ctx, dy, code, arrivals, filters, x, parameters, live, carried, skip_dtype):
    call, tables, counts = ctx.call, ctx.tables, ctx.counts
    weights, biases = parameters[: call.branches], parameters[call.branches :]
    dx, dskip, gradients = None, None, []
    if ctx.needs_input_grad[1] or skip_dtype is not None:
        read = weights if filters is None else _as_weights(filters, weights[0].shape)
        dx, dskip = _dgrad(
            dy, code, read, tables, counts, live, carried, x.shape, call.geometry, x.dtype,
            skip_dtype, call.tiles.dgrad,
        )  # fmt: skip
    if any(ctx.needs_input_grad[3:]):
        dweights, dbiases = _wgrad(
            dy, code, x, weights, biases, tables, counts, arrivals, live, call.geometry,
            call.tiles.wgrad,
        )  # fmt: skip
        gradients = [*dweights, *dbiases]
    return dx, dskip, gradients


def _as_weights(filters: Tensor, shape: Sequence[int]) -> list[Tensor]:
    """Every branch's ``[Co, C, KH, KW]`` of the copies that boxes were read of."""
    channels_out, channels, kh, kw = shape
    filters = filters.view(-1, kh, kw, channels).permute(0, 3, 1, 2)
    return [*filters.split(channels_out)]


def _box_backward(
    ctx, dy, code, arrivals, filters, columns, x, parameters, live, carried, skip_dtype
):
    call = ctx.call
    weights, biases = parameters[: call.branches], parameters[call.branches :]
    _check_live(live, dy)
    needs_dx, needs_dweights = ctx.needs_input_grad[1], any(ctx.needs_input_grad[3:])
    joined = call.rows if live is not None else _joined(call, x, [])
    *few, few_counts = tables_of(joined, call.branches, x.device)
    dx, dskip, dweights, dbiases = box_level_op.backward(
        dy, code, filters, columns, arrivals, x, weights, biases, ctx.tables, ctx.counts, few,
        few_counts, live, carried, call.geometry, needs_dx, skip_dtype, needs_dweights,
        call.tiles.dgrad, call.tiles.wgrad,
    )  # fmt: skip
    reached = needs_dx or skip_dtype is not None
    return dx if reached else None, dskip, [*dweights, *dbiases]


def _plain_backward(ctx, dy, live, carried, x, skip, code, parameters):
    """The backward for gradients of gradients, the choices of ReLU and pool held fixed."""
    call, sizes = ctx.call, ctx.call.geometry

    def convolve(x, *parameters):
        parameters = [parameter.to(dy.dtype) for parameter in parameters]
        weight, biases = torch.cat(parameters[: call.branches]), parameters[call.branches :]
        images = x.to(dy.dtype).flatten(0, 1).permute(0, 3, 1, 2)
        behind = [
            (out - 1) * stride + kernel - n - pad
            for out, stride, kernel, n, pad in zip(
                (sizes.conv_h, sizes.conv_w), sizes[:2], weight.shape[2:], images.shape[2:],
                (sizes.pad_h, sizes.pad_w), strict=True,
            )
        ]  # fmt: skip
        images = F.pad(images, (sizes.pad_w, behind[1], sizes.pad_h, behind[0]))
        return F.conv2d(images, weight, torch.cat(biases) if biases else None, sizes[:2])

    lists = call.rows.parents, call.rows.branches, call.rows.skips
    parents, branches, skips = (torch.tensor(r, device=x.device, dtype=torch.int64) for r in lists)
    level = second_order.Level(
        parents, branches, skips if call.rows.skips else None, live,
        code if sizes.has_code else None, sizes.pool, sizes.pool_pad,
    )  # fmt: skip
    needed = [ctx.needs_input_grad[1], *ctx.needs_input_grad[3:], ctx.needs_input_grad[2]]
    dx, *grads, dskip = level.gradients(convolve, (x, *parameters), skip, needed, dy)
    return dx if carried is None or dx is None else dx + carried, dskip, *grads


def level(
    x: Tensor,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor],
    geometry: Geometry,
    rows: Rows,
    *,
    dtype: torch.dtype,
    skip: Tensor | None = None,
    liveness: Liveness | None = None,
    carry: bool = False,
    tiles: Tiles = Tiles(),  # noqa: B008
    boxes: bool = False,
    gathers_back: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """One level: ``max_pool2d(relu_after(relu(conv2d(x, weight, bias)) + skip))`` of every row.

    Args:
        x: ``[P, N, H, W, C]``, any strides; float32, float16 or bfloat16.
        weights: one ``[Co, C, KH, KW]`` per branch, one or two of them, any strides.
        biases: one contiguous ``[Co]`` per branch, or none.
        geometry: the level's sizes; a linear layer is a kernel as large as its image.
        rows: the R rows, each a parent and a branch; the launches do not depend on them.
        dtype: of the output and of the products' operands; sums are float32. A float32 product
            rounds to TF32 where PyTorch's settings let a convolution or a linear layer do so.
        skip: ``[S, N, conv_h, conv_w, Co]``, any strides; row r gets skip row ``rows.skips[r]``.
        liveness: says before the backward which rows it runs on; None: on all of them.
        carry: return ``x`` as well, to be used as a skip further on: its gradient is then added in
            the launch that makes the gradient of ``x``.
        tiles: block sizes, of which every one gives the same sums in another order.
        boxes: read the operands in boxes: for levels, and an ``x``, that
            :class:`~lasem_fast.backends.triton_level.BoxLevel` takes.
        gathers_back: with ``boxes``, for a linear layer: the backward reads its operands element by
            element, as without them.

    Returns:
        ``[R, N, out_h, out_w, Co]``, which is a next level's ``x``; with ``carry`` and ``x``.

    Raises:
        ValueError: a shape, dtype, device or row that does not fit, naming the argument.
    """
    if (skip is None) == bool(rows.skips):
        got = "a list without" if skip is not None else "none"
        raise ValueError(f"skip: expected a skip just where rows.skips names its rows, got {got}")
    boxes = boxes and len(rows) > 0
    call = _Call(rows, geometry, liveness, dtype, tiles, len(weights), carry, boxes, gathers_back)
    return _Level.apply(call, x, skip, *weights, *biases)
