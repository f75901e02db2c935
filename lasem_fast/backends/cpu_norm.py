"""Batch norm of a level's rows, each by itself, as one C++ kernel with what follows up to the pool.

Schemas, fakes and autograd of the operators, and the `cpp` backend's
:class:`~lasem_fast.backends.operations.NormOperation`.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from lasem_fast.backends import cpu_ops, second_order
from lasem_fast.backends.operations import Layer, Normed, Skip
from lasem_fast.levels.fold import index_tensor
from lasem_fast.levels.plan import Level
from lasem_fast.levels.row_liveness import Liveness

_library = torch.library.Library("lasem_fast", "FRAGMENT")
_library.define(
    "norm_level(Tensor y, Tensor[] weights, Tensor[] biases, Tensor branches, Tensor? skip, "
    "Tensor? skip_rows, float eps, int pool, int pool_pad, int out_h, int out_w, bool relu, "
    "bool relu_after) -> (Tensor, Tensor, Tensor, Tensor)"
)
_library.define(
    "norm_level_backward(Tensor dout, Tensor y, Tensor code, Tensor mean, Tensor var, "
    "Tensor[] weights, Tensor branches, Tensor? live, float eps, int pool, int pool_pad) "
    "-> (Tensor, Tensor[], Tensor[])"
)
_level = torch.ops.lasem_fast.norm_level.default
_backward = torch.ops.lasem_fast.norm_level_backward.default


@torch.library.register_fake("lasem_fast::norm_level", lib=_library)
def _(
    y, weights, biases, branches, skip, skip_rows, eps, pool, pool_pad, out_h, out_w, relu,
    relu_after,
):  # fmt: skip
    size = (*y.shape[:2], out_h, out_w, y.shape[4])
    of_rows = y.new_empty((y.shape[0], y.shape[4]))
    return y.new_empty(size), y.new_empty(size, dtype=torch.uint8), of_rows, of_rows.clone()


@torch.library.register_fake("lasem_fast::norm_level_backward", lib=_library)
def _(dout, y, code, mean, var, weights, branches, live, eps, pool, pool_pad):
    made = [torch.empty_like(weight) for weight in weights]
    return torch.empty_like(y), made, [torch.empty_like(weight) for weight in weights]


class NormLevel(torch.autograd.Function):
    """The operator with its backward; mean and variance are constants of a step.

    A backward for gradients of gradients holds the choices of ReLU and pool fixed.
    """

    @staticmethod
    def forward(
        ctx, y, skip, branches, skip_rows, liveness, eps, pool, pool_pad, out_h, out_w, relu,
        relu_after, branch_count, *parameters,
    ):  # fmt: skip
        weights, biases = list(parameters[:branch_count]), list(parameters[branch_count:])
        out, code, mean, var = _level(
            y, weights, biases, branches, skip, skip_rows, eps, pool, pool_pad, out_h, out_w, relu,
            relu_after,
        )  # fmt: skip
        ctx.save_for_backward(y, skip, code, mean, var, branches, skip_rows, *parameters)
        ctx.liveness, ctx.branch_count = liveness, branch_count
        ctx.eps, ctx.pool, ctx.pool_pad = eps, pool, pool_pad
        ctx.mark_non_differentiable(mean, var)
        ctx.set_materialize_grads(False)
        return out, mean, var

    @staticmethod
    def backward(ctx, dout, _mean, _var):
        y, skip, code, mean, var, branches, skip_rows, *parameters = ctx.saved_tensors
        if dout is None:
            return (None,) * (13 + len(parameters))
        live = None if ctx.liveness is None else ctx.liveness.live
        if second_order.wanted():
            inputs = y, *parameters
            dy, *grads, dskip = NormLevel._plain_backward(
                ctx, dout, inputs, skip, code, branches, skip_rows, live
            )
            return dy, dskip, *(None,) * 11, *grads
        dout, weights = dout.contiguous(), parameters[: ctx.branch_count]
        dy, dweights, dbiases = _backward(
            dout, y, code, mean, var, weights, branches, live, ctx.eps, ctx.pool, ctx.pool_pad
        )
        dskip = None
        if ctx.needs_input_grad[1]:
            skips, _, height, width, _ = skip.shape
            dskip = cpu_ops._skip_backward(
                dout, code, skip_rows, live, skips, height, width, ctx.pool, ctx.pool_pad
            )
        return dy, dskip, *(None,) * 11, *dweights, *dbiases

    @staticmethod
    def _plain_backward(ctx, dout, inputs, skip, code, branches, skip_rows, live):
        def normalise(y, *parameters):
            rows = y.permute(1, 0, 4, 2, 3).flatten(1, 2).contiguous()  # [N, R * C, H, W]
            plain = F.batch_norm(rows, None, None, training=True, eps=ctx.eps)
            plain = plain.flatten().view(len(plain), y.shape[0], 1, -1, *plain.shape[2:])
            if parameters:
                scale, shift = (
                    torch.stack(list(of))[..., None, None]
                    for of in (parameters[: ctx.branch_count], parameters[ctx.branch_count :])
                )
                plain = plain * scale + shift
            else:
                plain = plain.expand(-1, -1, int(branches.max()) + 1, -1, -1, -1)
            return plain.transpose(0, 1).flatten(2, 3).flatten(0, 1)  # [R * N, B * C, H, W]

        rows = torch.arange(len(branches)), branches, skip_rows
        level = second_order.Level(*rows, live, code, ctx.pool, ctx.pool_pad)
        needs_dy, needs_dskip, *needed = ctx.needs_input_grad
        needed = [needs_dy, *needed[11:], needs_dskip]
        return level.gradients(normalise, inputs, skip, needed, dout)


def norm_level(
    y: Tensor,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor],
    *,
    branches: Tensor,
    eps: float,
    pool: int = 1,
    pool_pad: int = 0,
    out_size: tuple[int, int] | None = None,
    relu: bool = True,
    skip: Tensor | None = None,
    skip_rows: Tensor | None = None,
    relu_after: bool = False,
    liveness: Liveness | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """``max_pool2d(relu_after(relu(batch_norm(y)) + skip[skip_rows]))`` of every row by itself.

    Args:
        y: ``[R, N, H, W, C]``, contiguous, float32 (float64: slow, for tests).
        weights: of every branch ``[C]``, of ``y``'s dtype; none at all: ones.
        biases: of every branch, likewise; none at all: zeros.
        branches: int64 ``[R]`` on the CPU, each row's branch.
        eps: added to the variance.
        pool, pool_pad, out_size, relu, skip, skip_rows, relu_after, liveness: see
            :func:`lasem_fast.backends.cpu_ops.winograd_level`.

    Returns:
        ``[R, N, out_h, out_w, C]``, and mean and biased variance ``[R, C]``, without gradients.

    Raises:
        RuntimeError: a shape, dtype or size that does not fit, naming the argument.
    """
    if out_size is None:
        out_size = tuple((n + 2 * pool_pad - pool) // pool + 1 for n in y.shape[2:4])
    return NormLevel.apply(
        y, skip, branches.contiguous(), skip_rows, liveness, eps, pool, pool_pad, *out_size, relu,
        relu_after, len(weights), *weights, *biases,
    )  # fmt: skip


class CpuNorm:
    """The C++ batch norm; see :class:`~lasem_fast.backends.operations.NormOperation`.

    Args:
        dtype: what it takes; float64 is slow, for tests.
    """

    def __init__(self, dtype: torch.dtype = torch.float32) -> None:
        self.dtype = dtype

    def __call__(
        self, layer: Layer, y: Tensor, level: Level, skip: Skip | None, liveness: Liveness | None
    ) -> Normed | None:
        norm, pool = layer.norm, layer.pool
        tensors = [y, *norm.weights, *norm.biases]
        if any(t.device.type != "cpu" or t.dtype != self.dtype for t in tensors):
            return None
        if torch.is_autocast_enabled("cpu") or y.dim() != 5:
            return None
        size = tuple(pool.output(n) for n in y.shape[2:4])
        if min(size) < 1:
            return None
        skip_data = skip_rows = None
        if skip is not None:
            if skip.data.shape[1:] != y.shape[1:] or skip.data.dtype != y.dtype:
                return None
            skip_data = skip.data.contiguous()
            skip_rows = None if skip.rows is None else index_tensor(skip.rows, y.device)
        out, mean, var = norm_level(
            y.contiguous(),
            [weight.contiguous() for weight in norm.weights],
            [bias.contiguous() for bias in norm.biases],
            branches=index_tensor(level.positions, y.device),
            eps=norm.eps, pool=pool.size, pool_pad=pool.padding, out_size=size, relu=layer.relu,
            skip=skip_data, skip_rows=skip_rows, relu_after=layer.relu_after, liveness=liveness,
        )  # fmt: skip
        count = y.shape[1] * y.shape[2] * y.shape[3]
        return Normed(out, torch.cat([mean, var * (count / (count - 1))], dim=1))
