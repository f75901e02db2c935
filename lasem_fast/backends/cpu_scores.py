"""The `cpp` backend: the posterior head of one mini-batch as one C++ kernel."""

from __future__ import annotations

import torch
from torch import Tensor

from lasem_fast.backends import cpu_ops
from lasem_fast.backends.operations import Scores
from lasem_fast.likelihoods import Joint, Likelihood, Mean, is_changed
from lasem_fast.priors import Prior


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
    """Likelihoods, posterior and loss of a classification mini-batch on the CPU.

    Args:
        logits: ``[C, N, K]``.
        y: class labels ``[N]``, int64.
        likelihood: :class:`~lasem_fast.likelihoods.Joint` or
            :class:`~lasem_fast.likelihoods.Mean`.
        prior: any; it is not updated.
        task: whose prior it is.
        count: of no account here.
        paired: whether there are two sets of logits, which this operation does not take.
        nll_grad: whether the nll has a gradient.

    Returns:
        The scores; None for another likelihood, device or dtype, or two sets of logits.
    """
    if type(likelihood) not in (Joint, Mean) or is_changed(likelihood):
        return None
    if logits.device.type != "cpu" or paired:
        return None
    if logits.dtype in (torch.float16, torch.bfloat16):
        logits = logits.float()
    if logits.dtype not in (torch.float32, torch.float64):
        return None
    mean = type(likelihood) is Mean
    log_prior = prior.log_prob(task)
    if log_prior.dtype in (torch.float16, torch.bfloat16):
        log_prior = log_prior.float()
    out = cpu_ops.posterior_head(logits, y, log_prior, mean_likelihood=mean, nll_grad=nll_grad)
    return Scores(*out)
