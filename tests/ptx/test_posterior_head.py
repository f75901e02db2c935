"""The posterior head as Triton compiled it, against PyTorch in float64."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from host_runs import on_host
from shapes import CAPABILITIES

from lasem_fast.backends.triton_head_op import LIKELIHOODS
from lasem_fast.kernels.posterior_head import posterior_head

# configurations, samples, outputs: one tile; several steps of outputs and of samples
SIZES = [(4, 3, 10), (5, 7, 1100)]
DTYPES = [torch.float32, torch.float16, torch.bfloat16]
SIGMA = 0.5
# Sums are float64, terms float32: each is off by a few units in its last place.
ULPS = 8


def expected(logits, target, log_prior, likelihood):
    """Log-likelihoods, posterior, mean losses, loss and its gradient, in float64."""
    z = logits.double().requires_grad_()
    configs, samples, outputs = z.shape
    if likelihood == "gaussian":
        density = torch.distributions.Normal(z, SIGMA).log_prob(target.double())
        each = density.sum(2)
    else:
        labels = target.expand(configs, samples).reshape(-1)
        each = -F.cross_entropy(z.reshape(-1, outputs), labels, reduction="none")
        each = each.view(configs, samples)
    nll = -each.mean(1)
    scored = each.sum(1)
    if likelihood == "mean":
        scored = each.logsumexp(1) - math.log(samples)
    posterior = (scored + log_prior).softmax(0).detach()
    loss = (posterior * nll).sum()
    (gradient,) = torch.autograd.grad(loss, z)
    return scored.detach(), posterior, nll.detach(), loss.detach(), gradient


def run(logits, target, log_prior, wins, likelihood, capability, **options):
    wins = None if wins is None else wins.clone()
    with on_host(capability, **options):
        initial = None if wins is None else 1.0
        kind = LIKELIHOODS.index(likelihood)
        return (*posterior_head(logits, target, log_prior, wins, initial, kind, SIGMA), wins)


@pytest.mark.parametrize("capability", CAPABILITIES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("likelihood", LIKELIHOODS)
@pytest.mark.parametrize("sizes", SIZES)
def test_head(sizes, likelihood, dtype, capability):
    torch.manual_seed(0)
    configs, samples, outputs = sizes
    logits = torch.randn(samples, configs, outputs).to(dtype).transpose(0, 1)
    target = torch.randint(outputs, (samples,))
    if likelihood == "gaussian":
        target = torch.randn(samples, outputs)
    wins = torch.arange(configs)
    log_prior, given, counted = (wins + 1.0).double().log(), None, wins
    if dtype == torch.float16:
        given, counted = log_prior, None
    got = run(logits, target, given, counted, likelihood, capability)
    again = run(logits, target, given, counted, likelihood, capability, seed=1)
    want = expected(logits, target, log_prior, likelihood)
    eps = torch.finfo(torch.float32).eps
    # a posterior moves by the error of its scores, and carries the gradient along
    moved = 1 + float(want[0].abs().max()) + samples * float(want[2].abs().max())
    for ours, theirs in zip(got, want, strict=False):
        scale = 1 + theirs.abs()
        assert bool(((ours.double() - theirs).abs() <= ULPS * eps * moved * scale).all())
    if counted is not None:
        winner = F.one_hot(want[1].argmax(), configs)
        assert torch.equal(got[-1], wins + winner)
    for ours, other in zip(got, again, strict=True):
        assert ours is None or torch.equal(ours, other)
