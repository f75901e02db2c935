"""From log-likelihoods to the posterior over configurations and the loss of the M-step."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from lasem_fast.likelihoods import Likelihood
from lasem_fast.networks.checks import is_plain


class Evidence(NamedTuple):
    """What a mini-batch says about each of C configurations.

    Attributes:
        log_likelihood: L_c ``[C]``; -inf where the configuration overflowed.
        nll: mean over the mini-batch of -log P(y_i | x_i, c), ``[C]``; NaN or infinite where it
            overflowed. Carries the gradient.
        finite: bool ``[C]``, False where it overflowed.
    """

    log_likelihood: Tensor
    nll: Tensor
    finite: Tensor


def evidence(output: Tensor, y: Tensor, likelihood: Likelihood) -> Evidence:
    """Scores the outputs ``[C, N, K]`` of all configurations, in float32 or better."""
    device = output.device.type
    if device != "meta" and torch.is_autocast_enabled(device):
        with torch.autocast(device, enabled=False):  # a user's own may multiply matrices
            return _evidence(_not_half(output), y, likelihood)
    return _evidence(_not_half(output), y, likelihood)


def _evidence(output: Tensor, y: Tensor, likelihood: Likelihood) -> Evidence:
    log_prob = likelihood.log_prob(output, y)
    _check_returned(log_prob, output, 2, f"{type(likelihood).__name__}.log_prob")
    log_prob = _not_half(log_prob)
    nll = -log_prob.mean(dim=1)
    value = likelihood.reduce(log_prob.detach())
    _check_returned(value, output, 1, f"{type(likelihood).__name__}.reduce")
    finite = is_finite(nll)
    # detached again: a user's own may have parameters
    return Evidence(torch.where(finite, _not_half(value).detach(), -torch.inf), nll, finite)


def _not_half(values: Tensor) -> Tensor:
    return values.float() if values.dtype in (torch.float16, torch.bfloat16) else values


def is_finite(nll: Tensor) -> Tensor:
    """``torch.isfinite``, which launches twice as many kernels, without a graph."""
    return nll.detach().abs() < torch.inf


def _check_returned(value: Any, output: Tensor, dimensions: int, method: str) -> None:
    """What a likelihood of the user's own returns: of the output's first dimensions."""
    shape = output.shape[:dimensions]
    if not isinstance(value, Tensor):
        got = type(value).__name__
    elif not is_plain(value):
        got = "one that is sparse, nested or quantised"
    elif value.device != output.device:
        got = f"one on {value.device}"
    elif value.shape != shape or not value.is_floating_point():
        got = f"{value.dtype} of shape {list(value.shape)}"
    else:
        return
    raise TypeError(
        f"likelihood: expected {method} to return a floating-point tensor of shape {list(shape)} "
        f"on {output.device}, got {got}"
    )


def posterior_of(log_prior: Tensor, log_likelihood: Tensor) -> Tensor:
    """P(c | X, y) = softmax_c(log prior_c + L_c), exactly 0 where L_c is -inf (Algorithm 1)."""
    # detached: a user's prior may have parameters; not rounded to the likelihood's precision before
    # the sum: it need not be normalised
    joint = log_prior.detach() + log_likelihood
    return joint.softmax(dim=0).to(log_likelihood.dtype)


def expected_nll(posterior: Tensor, nll: Tensor) -> Tensor:
    """sum_c P(c | X, y) nll_c: its gradient is minus that of Eq. 3 and 4 over the mini-batch size.

    NaN if any configuration overflowed (0 * inf): one that is not left out shows.
    """
    return (posterior.detach().to(nll.dtype) * nll).sum()
