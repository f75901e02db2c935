"""Contracts of the Triton level kernels: schemas, fakes and autograd.

The operators are opaque to ``torch.compile``: there is nothing around a launch that a compiler
could fuse into it, and in eager mode this boundary is cheaper than ``torch.library.triton_op``. The
kernels, and triton with them, are imported when an operator first runs.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from lasem_fast import _second_order
from lasem_fast.kernels.level_geometry import Geometry, gradient_buffers, output_shape
from lasem_fast.kernels.level_tiles import Tile

DTYPES = (torch.float32, torch.float16, torch.bfloat16)

_library = torch.library.Library("lasem_fast", "FRAGMENT")
_library.define(
    "level_triton(Tensor x, Tensor[] weights, Tensor[] biases, int[] geometry, ScalarType dtype, "
    "int[] tile) -> (Tensor, Tensor)"
)
_library.define(
    "level_dgrad_triton(Tensor dy, Tensor code, Tensor[] weights, int[] x_shape, int[] geometry, "
    "ScalarType dtype, int[] tile) -> Tensor"
)
_library.define(
    "level_wgrad_triton(Tensor dy, Tensor code, Tensor x, Tensor[] weights, Tensor[] biases, "
    "int[] geometry, int[] tile) -> (Tensor[], Tensor[])"
)

_forward = torch.ops.lasem_fast.level_triton.default
_dgrad = torch.ops.lasem_fast.level_dgrad_triton.default
_wgrad = torch.ops.lasem_fast.level_wgrad_triton.default


class Tiles(NamedTuple):
    """Block sizes of a level's kernels; an empty one is chosen by shape."""

    forward: Sequence[int] = ()
    dgrad: Sequence[int] = ()
    wgrad: Sequence[int] = ()


@torch.library.register_fake("lasem_fast::level_triton", lib=_library)
def _(x, weights, biases, geometry, dtype, tile):
    geometry = Geometry(*geometry)
    shape = output_shape(x, weights, geometry)
    code = shape if geometry.has_code else (0,)
    return x.new_empty(shape, dtype=dtype), x.new_empty(code, dtype=torch.uint8)


@torch.library.register_fake("lasem_fast::level_dgrad_triton", lib=_library)
def _(dy, code, weights, x_shape, geometry, dtype, tile):
    return dy.new_empty(x_shape, dtype=dtype)


@torch.library.register_fake("lasem_fast::level_wgrad_triton", lib=_library)
def _(dy, code, x, weights, biases, geometry, tile):
    return gradient_buffers(weights), [torch.empty_like(bias) for bias in biases]


@torch.library.impl(_library, "level_triton", "CUDA")
@torch.library.impl(_library, "level_triton", "CPU")  # for Triton's interpreter
def _(x, weights, biases, geometry, dtype, tile):
    from lasem_fast.kernels.level_forward import level_forward

    geometry = Geometry(*geometry)
    _check(x, weights, biases, geometry, dtype)
    tf32 = _tf32(x.shape, weights, geometry, dtype)
    return level_forward(x, weights, biases, geometry, dtype, tf32, _tile(tile))


@torch.library.impl(_library, "level_dgrad_triton", "CUDA")
@torch.library.impl(_library, "level_dgrad_triton", "CPU")
def _(dy, code, weights, x_shape, geometry, dtype, tile):
    from lasem_fast.kernels.level_dgrad import level_dgrad

    geometry = Geometry(*geometry)
    tf32 = _tf32(x_shape, weights, geometry, dy.dtype)
    return level_dgrad(
        dy.contiguous(), code, weights, tuple(x_shape), geometry, dtype, tf32, _tile(tile)
    )


@torch.library.impl(_library, "level_wgrad_triton", "CUDA")
@torch.library.impl(_library, "level_wgrad_triton", "CPU")
def _(dy, code, x, weights, biases, geometry, tile):
    from lasem_fast.kernels.level_wgrad import level_wgrad

    geometry = Geometry(*geometry)
    tf32 = _tf32(x.shape, weights, geometry, dy.dtype)
    return level_wgrad(dy.contiguous(), code, x, weights, biases, geometry, tf32, _tile(tile))


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


def _check(
    x: Tensor, weights: list[Tensor], biases: list[Tensor], geometry: Geometry, dtype: torch.dtype
) -> None:
    def check(fits: bool, name: str, expected: str, got: object) -> None:
        if not fits:
            raise ValueError(f"{name}: expected {expected}, got {got}")

    check(x.dim() == 5, "x", "shape [P, N, H, W, C]", list(x.shape))
    check(len(weights) in (1, 2), "weights", "one or two branches", len(weights))
    check(len(biases) in (0, len(weights)), "biases", "one per branch or none", len(biases))
    shape = [weights[0].shape[0], x.shape[-1], *weights[0].shape[2:]]
    for weight in weights:
        check(list(weight.shape) == shape and len(shape) == 4, "weights", "shape [Co, C, KH, KW]",
              f"{list(weight.shape)} with C={x.shape[-1]}")  # fmt: skip
    for bias in biases:
        check(list(bias.shape) == shape[:1], "biases", f"shape {shape[:1]}", list(bias.shape))
        check(bias.is_contiguous(), "biases", "contiguous tensors", bias.stride())
    for name, tensor in [("x", x), *(("weights", w) for w in weights)]:
        check(tensor.dtype in DTYPES, name, "float32, float16 or bfloat16", tensor.dtype)
    for name, tensors in (("weights", weights), ("biases", biases)):
        for tensor in tensors:
            check(tensor.device == x.device, name, f"tensors on {x.device}", tensor.device)
            check(tensor.dtype == tensors[0].dtype, name, "one dtype", tensor.dtype)
    check(dtype in DTYPES, "dtype", "float32, float16 or bfloat16", dtype)
    check(geometry.pool in (1, 2, 3), "pool", "1, 2 or 3", geometry.pool)


class _Level(torch.autograd.Function):
    """One tree level with its backward."""

    @staticmethod
    def forward(ctx, x, geometry, dtype, tiles, branches, *parameters):
        weights, biases = list(parameters[:branches]), list(parameters[branches:])
        y, code = _forward(x, weights, biases, geometry, dtype, tiles.forward)
        ctx.save_for_backward(x, code, *parameters)
        ctx.geometry, ctx.tiles, ctx.branches = geometry, tiles, branches
        ctx.set_materialize_grads(False)
        return y

    @staticmethod
    def backward(ctx, dy):
        if dy is None:
            return (None,) * len(ctx.needs_input_grad)
        x, code, *parameters = ctx.saved_tensors
        if _second_order.wanted():
            return _plain_backward(ctx, dy, x, code, parameters)
        weights, biases = parameters[: ctx.branches], parameters[ctx.branches :]
        dx, dparameters = None, [None] * len(parameters)
        if ctx.needs_input_grad[0]:
            dx = _dgrad(dy, code, weights, x.shape, ctx.geometry, x.dtype, ctx.tiles.dgrad)
        if any(ctx.needs_input_grad[5:]):
            dweights, dbiases = _wgrad(dy, code, x, weights, biases, ctx.geometry, ctx.tiles.wgrad)
            dparameters = [*dweights, *dbiases]
        return dx, None, None, None, None, *dparameters


def _plain_backward(ctx, dy, x, code, parameters):
    """The backward for gradients of gradients, the choices of ReLU and pool held fixed."""
    sizes, branches = ctx.geometry, ctx.branches

    def level(x, *parameters):
        parameters = [parameter.to(dy.dtype) for parameter in parameters]
        weight, biases = torch.cat(parameters[:branches]), parameters[branches:]
        images = x.to(dy.dtype).flatten(0, 1).permute(0, 3, 1, 2)
        behind = [
            (out - 1) * stride + kernel - n - pad
            for out, stride, kernel, n, pad in zip(
                (sizes.conv_h, sizes.conv_w), sizes[:2], weight.shape[2:], images.shape[2:],
                (sizes.pad_h, sizes.pad_w), strict=True,
            )
        ]  # fmt: skip
        images = F.pad(images, (sizes.pad_w, behind[1], sizes.pad_h, behind[0]))
        z = F.conv2d(images, weight, torch.cat(biases) if biases else None, sizes[:2])
        z = _second_order.rows_in_branches(z, x.shape[0], branches)
        return _second_order.won(z, code, sizes.pool, sizes.pool_pad) if sizes.has_code else z

    needed = [ctx.needs_input_grad[0], *ctx.needs_input_grad[5:]]
    dx, *dparameters = _second_order.gradients(level, (x, *parameters), needed, dy)
    return dx, None, None, None, None, *dparameters


def level(
    x: Tensor,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor],
    geometry: Geometry,
    *,
    dtype: torch.dtype,
    tiles: Tiles = Tiles(),  # noqa: B008
) -> Tensor:
    """One level: ``max_pool2d(relu(conv2d(x, weight, bias)))`` of every prefix in every branch.

    Args:
        x: ``[P, N, H, W, C]``, any strides; float32, float16 or bfloat16.
        weights: one ``[Co, C, KH, KW]`` per branch, one or two of them, any strides.
        biases: one contiguous ``[Co]`` per branch, or none.
        geometry: the level's sizes; a linear layer is a kernel as large as its image.
        dtype: of the output and of the products' operands; sums are float32. A float32 product
            rounds to TF32 where PyTorch's settings let a convolution or a linear layer do so.
        tiles: block sizes, of which every one gives the same sums in another order.

    Returns:
        ``[P, B, N, out_h, out_w, Co]``; ``y.flatten(0, 1)`` is the next level's ``x``.

    Raises:
        ValueError: a shape, dtype or device that does not fit, naming the argument.
    """
    return _Level.apply(x, geometry, dtype, tiles, len(weights), *weights, *biases)
