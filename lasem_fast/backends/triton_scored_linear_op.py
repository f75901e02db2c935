"""Contract of the Triton posterior head with its linear layer: schema, fake and autograd.

The kernels, and triton with them, are imported when the operator first runs.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from lasem_fast.backends import head_gradient, second_order
from lasem_fast.backends.looked_at import is_looked_at
from lasem_fast.backends.triton_head_op import LIKELIHOODS, check_scored

DTYPES = (torch.float32, torch.bfloat16)
"""Gradients are made before the loss's scale is known, which float16 has no room for."""

_library = torch.library.Library("lasem_fast", "FRAGMENT")
_library.define(
    "scored_linear_triton(Tensor x, Tensor weight, Tensor? bias, Tensor leaves, Tensor target, "
    "Tensor? log_prior, Tensor(a!)? wins, float? initial, int likelihood, float sigma, "
    "bool paired) -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)"
)
_scored_linear = torch.ops.lasem_fast.scored_linear_triton.default


@torch.library.register_fake("lasem_fast::scored_linear_triton", lib=_library)
def _(x, weight, bias, leaves, target, *others):
    log_likelihood, posterior, nll = (
        x.new_empty(leaves.shape, dtype=torch.float32) for _ in range(3)
    )
    gradients = (torch.empty_like(t) for t in (x, weight, x[:0] if bias is None else bias))
    return log_likelihood, posterior, nll, x.new_empty((), dtype=torch.float32), *gradients


@torch.library.impl(_library, "scored_linear_triton", "CUDA")
@torch.library.impl(_library, "scored_linear_triton", "CPU")  # for Triton's interpreter
def _run(x, weight, bias, leaves, target, log_prior, wins, initial, likelihood, sigma, paired):
    from lasem_fast.kernels.scored_linear import scored_linear

    logits = x.new_empty(1).expand(len(leaves), x.shape[1], len(weight))
    check_scored(logits, target, log_prior, wins, initial, likelihood, sigma)
    tf32 = x.dtype == torch.float32 and torch.backends.cuda.matmul.fp32_precision == "tf32"
    return scored_linear(
        x, weight, bias, leaves, target, log_prior, wins, initial, likelihood, sigma, paired, tf32
    )


class _ScoredLinear(torch.autograd.Function):
    """The posterior is constant in the gradient of ``loss``."""

    @staticmethod
    def forward(ctx, x, weight, bias, leaves, target, *others):
        run = _scored_linear if is_looked_at(x) else _run
        *scores, loss, dx, dweight, dbias = run(x, weight, bias, leaves, target, *others)
        ctx.save_for_backward(x, weight, bias, leaves, target, scores[1])
        # held by nobody else, so that parameters can keep them as they are
        ctx.gradients = [dx, dweight, None if bias is None else dbias]
        *_, likelihood, sigma, ctx.paired = others
        ctx.sigma = sigma if LIKELIHOODS[likelihood] == "gaussian" else None
        ctx.mark_non_differentiable(*scores)
        ctx.set_materialize_grads(False)
        return *scores, loss

    @staticmethod
    def backward(ctx, _likelihood, _posterior, _nll, dloss):
        if dloss is None:
            return (None,) * 11
        saved, gradients = ctx.saved_tensors, ctx.gradients
        ctx.gradients = None
        if gradients is None or second_order.wanted():
            gradients = _plain_gradients(ctx, dloss, *saved)
        elif not head_gradient.is_one(dloss):
            scaled = torch._foreach_mul([g for g in gradients if g is not None], dloss)
            gradients = [*scaled, None][: len(gradients)]
        needed = ctx.needs_input_grad[:3]
        found = (g if needs else None for g, needs in zip(gradients, needed, strict=True))
        return *found, *(None,) * 8


def _plain_gradients(
    ctx: Any, dloss: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None, leaves: Tensor,
    target: Tensor, posterior: Tensor,
) -> list[Tensor | None]:  # fmt: skip
    """In PyTorch: for gradients of gradients, and for a second backward over the same graph."""
    inputs = [x, weight] if bias is None else [x, weight, bias]
    rows = leaves + len(leaves) if ctx.paired else leaves
    needed = ctx.needs_input_grad[: len(inputs)]
    carried = second_order.wanted()
    if not carried:
        inputs = [t.detach().requires_grad_(needs) for t, needs in zip(inputs, needed, strict=True)]

    def logits(x: Tensor, weight: Tensor, *biases: Tensor) -> Tensor:
        samples = x[rows].permute(0, 1, 4, 2, 3).flatten(2)
        return F.linear(*(t.to(dloss.dtype) for t in (samples, weight, *biases)))

    with torch.enable_grad(), torch.autocast(x.device.type, enabled=False):
        weights = head_gradient.weights_of(posterior, None, dloss)
        dlogits = head_gradient.of_logits(logits(*inputs), target, weights, ctx.sigma)
        found = second_order.gradients(logits, inputs, needed, dlogits)
    found = [*found, None][:3]
    return found if carried else [None if g is None else g.detach() for g in found]


def scored_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    leaves: Tensor,
    target: Tensor,
    *,
    log_prior: Tensor | None = None,
    wins: Tensor | None = None,
    initial: float | None = None,
    likelihood: str = "joint",
    sigma: float = 1.0,
    paired: bool = False,
) -> Sequence[Tensor]:
    """A linear layer on every configuration's leaf, and what :func:`posterior_head` makes of it.

    Args:
        x: leaves ``[P, N, H, W, C]``, float32 or bfloat16, contiguous; with ``paired`` ``2 * P``
            rows, the E-step's, which have no gradient, before the M-step's.
        weight: ``[K, C * H * W]``, channels outermost, contiguous, of any dtype of the kernels.
        bias: ``[K]``, contiguous, or None.
        leaves: int64 ``[C]``: each of the P leaves once, one per configuration.
        target, log_prior, wins, initial, likelihood, sigma: as in
            :func:`~lasem_fast.backends.triton_head_op.posterior_head`.
        paired: whether both steps have inputs of their own.

    Returns:
        ``log_likelihood``, ``posterior``, ``nll`` (``[C]`` each) and ``loss``, float32.

    Raises:
        ValueError: an argument is not as described.
    """
    kind = LIKELIHOODS.index(likelihood)
    return _ScoredLinear.apply(
        x, weight, bias, leaves, target, log_prior, wins, initial, kind, sigma, paired
    )
