"""The gradient of a posterior head in plain PyTorch, differentiable itself."""

from __future__ import annotations

import torch
from torch import Tensor


def one(loss: Tensor) -> Tensor:
    """What ``loss.backward()`` begins with, as a tensor that :func:`is_one` knows.

    A step that hands it over starts neither the kernel that makes a 1 nor the one that multiplies
    by it.
    """
    key = loss.device, loss.dtype
    if key not in _ones:
        with torch.inference_mode(False):
            made = torch.ones((), device=loss.device, dtype=loss.dtype)
        if loss.is_cuda and torch.cuda.is_current_stream_capturing():
            return made  # a 1 when the graph is replayed, and not before
        _ones[key] = made
    return _ones[key]


def is_one(gradient: Tensor) -> bool:
    """Whether this is a tensor that :func:`one` has kept; no value is looked at."""
    return gradient is _ones.get((gradient.device, gradient.dtype))


_ones: dict[tuple[torch.device, torch.dtype], Tensor] = {}


def weights_of(posterior: Tensor, dnll: Tensor | None, dloss: Tensor | None) -> Tensor:
    """What each configuration's nll weighs, ``[C]``; the posterior is constant in the loss.

    Args:
        posterior: ``[C]``.
        dnll: gradient of the nll ``[C]``, or None.
        dloss: gradient of the loss, a scalar, or None; at least one of the two is there.
    """
    if dloss is None:
        return dnll
    weights = posterior * dloss
    return weights if dnll is None else weights + dnll


def of_logits(
    logits: Tensor, target: Tensor, weights: Tensor, sigma: float | None = None
) -> Tensor:
    """The gradient of ``sum_c weights_c nll_c`` to the logits.

    Args:
        logits: ``[C, N, K]``.
        target: labels ``[N]``; with ``sigma``, the Gaussian likelihood's values ``[N, K]``.
        weights: ``[C]``; where one is 0 there is no gradient.
        sigma: of the Gaussian likelihood; None for classification.
    """
    scale = (weights / logits.shape[1])[:, None, None]
    weighs = scale != 0
    # chosen before it is used: 0 * NaN is NaN, in gradients too
    logits = torch.where(weighs, logits.to(weights.dtype), 0)
    if sigma is None:
        # compared: one_hot stops a device at a label out of range
        classes = torch.arange(logits.shape[2], device=logits.device)
        residual = logits.softmax(dim=2) - (target[:, None] == classes).to(logits.dtype)
    else:
        residual = (logits - target) / sigma**2
    return torch.where(weighs, scale * residual, 0)
