"""The `triton` backend: the posterior head of one mini-batch, prior included, in two kernels."""

from __future__ import annotations

import os

import torch
from torch import Tensor

from lasem_fast.backends.operations import Scores
from lasem_fast.backends.triton_head_op import posterior_head
from lasem_fast.likelihoods import Gaussian, Joint, Likelihood, Mean
from lasem_fast.priors import Count, Prior, Uniform

# Triton itself reads this once, when it is imported.
_INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
_KINDS = {Joint: "joint", Mean: "mean", Gaussian: "gaussian"}


def scores(
    logits: Tensor,
    y: Tensor,
    likelihood: Likelihood,
    prior: Prior,
    task: str,
    count: bool = True,
    paired: bool = False,
    nll_grad: bool = False,
) -> Scores | None:
    """Likelihoods, posterior and loss of a mini-batch.

    Args:
        logits: ``[C, N, ...]``; for classification ``[C, N, K]``.
        y: class labels ``[N]``, int64, or the Gaussian likelihood's targets ``[N, ...]``.
        likelihood: :class:`~lasem_fast.likelihoods.Joint`, ``Mean`` or ``Gaussian``.
        prior: any; one whose ``update`` only counts wins is updated here, on a device.
        task: whose prior it is.
        count: whether the prior may be updated.
        paired: whether ``logits`` are the E-step's before the M-step's, ``[2, C, N, ...]``.
        nll_grad: whether the nll of a single set has a gradient.

    Returns:
        The scores; None for another likelihood, double precision, or a CPU without the interpreter.
    """
    kind = _KINDS.get(type(likelihood))
    if kind is None or torch.float64 in (logits.dtype, y.dtype):
        return None
    if logits.device.type == "cpu" and not _INTERPRETED:
        return None
    if kind == "gaussian":
        logits, y = logits.flatten(3 if paired else 2), y.flatten(1)
    wins = log_prior = initial = None
    if count and type(prior).update is Prior.update and not _looked_at_first(logits):
        wins = prior.states[task].wins
    if type(prior).log_prob is Count.log_prob and wins is not None:
        initial = prior.initial
    elif type(prior) is not Uniform:
        log_prior = prior.log_prob(task).contiguous()
    out = posterior_head(
        logits, y, log_prior=log_prior, wins=wins, initial=initial, likelihood=kind,
        sigma=getattr(likelihood, "sigma", 1.0), nll_grad=nll_grad and not paired,
    )  # fmt: skip
    return Scores(*out, counted=wins is not None)


def _looked_at_first(logits: Tensor) -> bool:
    """Whether LASEM looks at the values before anything is counted, as it does on the CPU."""
    return logits.device.type == "cpu"
