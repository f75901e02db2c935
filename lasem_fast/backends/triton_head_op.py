"""Contract of the Triton posterior head: schema, fake and autograd.

The kernels, and triton with them, are imported when the operator first runs.
"""

from __future__ import annotations

import torch
from torch import Tensor

from lasem_fast.backends import head_gradient, second_order

LIKELIHOODS = ("joint", "mean", "gaussian")

_library = torch.library.Library("lasem_fast", "FRAGMENT")
_library.define(
    "posterior_head_triton(Tensor logits, Tensor target, Tensor? log_prior, Tensor(a!)? wins, "
    "float? initial, int likelihood, float sigma) -> "
    "(Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)"
)
_posterior_head = torch.ops.lasem_fast.posterior_head_triton.default


@torch.library.register_fake("lasem_fast::posterior_head_triton", lib=_library)
def _(logits, target, log_prior, wins, initial, likelihood, sigma):
    log_likelihood, posterior, nll = (
        logits.new_empty(logits.shape[-3:-2], dtype=torch.float32) for _ in range(3)
    )
    loss = logits.new_empty((), dtype=torch.float32)
    dlogits = torch.empty_like(logits, dtype=torch.float32)
    rounds = logits.dtype != torch.float32
    rounded = torch.empty_like(logits) if rounds else logits.new_empty(0)
    return log_likelihood, posterior, nll, loss, dlogits, rounded


@torch.library.impl(_library, "posterior_head_triton", "CUDA")
@torch.library.impl(_library, "posterior_head_triton", "CPU")  # for Triton's interpreter
def _(logits, target, log_prior, wins, initial, likelihood, sigma):
    from lasem_fast.kernels import posterior_head as kernels

    check_scored(logits, target, log_prior, wins, initial, likelihood, sigma)
    return kernels.posterior_head(logits, target, log_prior, wins, initial, likelihood, sigma)


def check_scored(
    logits: Tensor,
    target: Tensor,
    log_prior: Tensor | None,
    wins: Tensor | None,
    initial: float | None,
    likelihood: int,
    sigma: float,
) -> None:
    """Raises ValueError for arguments of :func:`posterior_head` that do not fit each other."""

    def check(fits: bool, name: str, expected: str, got: object) -> None:
        if not fits:
            raise ValueError(f"{name}: expected {expected}, got {got}")

    fits = logits.dim() == 3 or (logits.dim() == 4 and logits.shape[0] == 2)
    check(fits and logits.numel() > 0, "logits", "shape [C, N, K] or [2, C, N, K], not empty",
          list(logits.shape))  # fmt: skip
    check(logits.dtype in (torch.float32, torch.float16, torch.bfloat16), "logits",
          "float32, float16 or bfloat16", logits.dtype)  # fmt: skip
    configs, samples, outputs = logits.shape[-3:]
    check(likelihood in range(len(LIKELIHOODS)), "likelihood", "0, 1 or 2", likelihood)
    if LIKELIHOODS[likelihood] == "gaussian":
        shape, kind = [samples, outputs], target.is_floating_point()
        check(kind, "target", "floating-point values", target.dtype)
        check(0 < sigma < float("inf"), "sigma", "a finite number above 0", sigma)
    else:
        shape = [samples]
        check(target.dtype == torch.int64, "target", "labels of torch.int64", target.dtype)
    check(list(target.shape) == shape, "target", f"shape {shape}", list(target.shape))
    for name, tensor in (("log_prior", log_prior), ("wins", wins)):
        if tensor is not None:
            check(tensor.shape == (configs,), name, f"shape [{configs}]", list(tensor.shape))
            check(tensor.is_contiguous(), name, "a contiguous tensor", tensor.stride())
    if wins is not None:
        check(wins.dtype == torch.int64, "wins", "torch.int64", wins.dtype)
    if initial is not None:
        check(wins is not None and log_prior is None, "initial", "wins and no log_prior", initial)
    for name, tensor in (("target", target), ("log_prior", log_prior), ("wins", wins)):
        if tensor is not None:
            check(tensor.device == logits.device, name, f"a tensor on {logits.device}",
                  tensor.device)  # fmt: skip


class _PosteriorHead(torch.autograd.Function):
    """The posterior is constant in the gradient of ``loss``."""

    @staticmethod
    def forward(ctx, logits, target, nll_grad, *others):
        log_likelihood, posterior, nll, loss, *dlogits = _posterior_head(logits, target, *others)
        ctx.save_for_backward(*dlogits, logits, target, posterior)
        ctx.dtype = logits.dtype
        likelihood, sigma = others[-2:]
        ctx.sigma = sigma if LIKELIHOODS[likelihood] == "gaussian" else None
        ctx.mark_non_differentiable(log_likelihood, posterior, *([] if nll_grad else [nll]))
        ctx.nll_grad = nll_grad
        ctx.set_materialize_grads(False)
        return log_likelihood, posterior, nll, loss

    @staticmethod
    def backward(ctx, _likelihood, _posterior, dnll, dloss):
        dnll = dnll if ctx.nll_grad else None  # a compiled backward may bring zeros
        if dnll is None and dloss is None:
            return (None,) * 8
        dlogits, rounded, logits, target, posterior = ctx.saved_tensors
        if dnll is not None or second_order.wanted():
            m_step = logits[1] if logits.dim() == 4 else logits
            weights = head_gradient.weights_of(posterior, dnll, dloss)
            dlogits = head_gradient.of_logits(m_step, target, weights, ctx.sigma).to(ctx.dtype)
            if logits.dim() == 4:
                dlogits = torch.stack([torch.zeros_like(dlogits), dlogits])
            return dlogits, *(None,) * 7
        if head_gradient.is_one(dloss):
            return dlogits if ctx.dtype == torch.float32 else rounded, *(None,) * 7
        # in float32 until the loss's scale is in: half precision would lose small posteriors
        out = torch.empty_like(dlogits, dtype=ctx.dtype)
        return torch.mul(dlogits, dloss, out=out), *(None,) * 7


def posterior_head(
    logits: Tensor,
    target: Tensor,
    *,
    log_prior: Tensor | None = None,
    wins: Tensor | None = None,
    initial: float | None = None,
    likelihood: str = "joint",
    sigma: float = 1.0,
    nll_grad: bool = False,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Posterior of every configuration, the loss whose gradient it weights, and the new count.

    Args:
        logits: ``[C, N, K]``, float32, float16 or bfloat16, with any strides; or ``[2, C, N, K]``:
            the E-step's, of which all is but the loss, and the M-step's, of which the loss is. The
            first have no gradient: theirs is 0.
        target: labels ``[N]``, int64; for the Gaussian likelihood values ``[N, K]``. A label out
            of ``[0, K)`` makes the loss NaN.
        log_prior: ``[C]``, need not be normalised; -inf excludes a configuration. None: uniform.
        wins: ``[C]``, int64: the most probable configuration (lowest row on ties) is counted here,
            unless none is usable.
        initial: with ``wins`` and no ``log_prior``: the prior of Eq. 1, P(c) in proportion to
            ``wins[c] + initial`` as it was before this mini-batch.
        likelihood: ``"joint"``, ``"mean"`` or ``"gaussian"``.
        sigma: of the Gaussian likelihood.
        nll_grad: whether ``nll`` has a gradient too, for a loss with other weights; of logits
            ``[C, N, K]`` only.

    Returns:
        ``log_likelihood``, ``posterior``, ``nll`` (``[C]`` each) and ``loss``, float32, as
        :class:`lasem_fast.backends.operations.Scores` has them.

    Raises:
        TypeError, ValueError: an argument is not as described.
    """
    if nll_grad and logits.dim() != 3:
        raise ValueError(f"nll_grad: expected logits [C, N, K], got shape {list(logits.shape)}")
    kind = LIKELIHOODS.index(likelihood)
    return _PosteriorHead.apply(logits, target, nll_grad, log_prior, wins, initial, kind, sigma)
