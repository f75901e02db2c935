"""The `triton` backend: the posterior head of one mini-batch, prior included, in two kernels."""

from __future__ import annotations

import os
from typing import NamedTuple

import torch
from torch import Tensor

from lasem_fast.backends.operations import Scores
from lasem_fast.backends.triton_head_op import posterior_head
from lasem_fast.likelihoods import Gaussian, Joint, Likelihood, Mean, is_changed
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
    kind = kind_of(likelihood)
    if kind is None or torch.float64 in (logits.dtype, y.dtype):
        return None
    if logits.device.type == "cpu" and not _INTERPRETED:
        return None
    if kind == "gaussian":
        logits, y = logits.flatten(3 if paired else 2), y.flatten(1)
    form = prior_form(prior, task, count and not _looked_at_first(logits))
    out = posterior_head(
        logits, y, **form._asdict(), likelihood=kind, sigma=getattr(likelihood, "sigma", 1.0),
        nll_grad=nll_grad and not paired,
    )  # fmt: skip
    return Scores(*out, counted=form.wins is not None)


def kind_of(likelihood: Likelihood) -> str | None:
    """Its name, if the kernels have it."""
    return None if is_changed(likelihood) else _KINDS.get(type(likelihood))


class PriorForm(NamedTuple):
    """A prior as :func:`~lasem_fast.backends.triton_head_op.posterior_head` takes it."""

    log_prior: Tensor | None
    wins: Tensor | None
    initial: float | None


def prior_form(prior: Prior, task: str, count: bool) -> PriorForm:
    """A task's prior; with ``count`` its wins too, if they are all that an update changes."""
    wins = log_prior = initial = None
    if count and type(prior).update is Prior.update:
        wins = prior.states[task].wins
    if type(prior).log_prob is Count.log_prob and wins is not None:
        initial = prior.initial
    elif type(prior) is not Uniform:
        log_prior = prior.log_prob(task).contiguous()
    return PriorForm(log_prior, wins, initial)


def _looked_at_first(logits: Tensor) -> bool:
    """Whether LASEM looks at the values before anything is counted, as it does on the CPU."""
    return logits.device.type == "cpu"
