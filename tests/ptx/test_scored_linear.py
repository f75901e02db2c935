"""The posterior head with its linear layer as Triton compiled it, against PyTorch in float64."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from host_runs import on_host
from shapes import CAPABILITIES

from lasem_fast.backends.triton_head_op import LIKELIHOODS
from lasem_fast.kernels.scored_linear import scored_linear

# configurations, samples, leaf, outputs: one tile; several steps of everything
SIZES = [(4, 3, (1, 1, 16), 10), (7, 35, (2, 2, 33), 40)]
PRECISIONS = {"fp32": 2**-20, "tf32": 2**-9, "bf16": 2**-7}
"""What operands and sums are off by, relative to the norm of a result."""
NAMES = ("log_likelihood", "posterior", "nll", "loss", "dx", "dweight", "dbias")


def expected(x, weight, bias, leaves, target, log_prior, likelihood, paired):
    """As the launches, in float64, and the norms of terms that make up the scores."""
    tensors = [t.double().requires_grad_() for t in (x, weight, bias)]
    samples = tensors[0].permute(0, 1, 4, 2, 3).flatten(2)
    logits = F.linear(samples, *tensors[1:])
    configs, outputs = len(leaves), logits.shape[2]

    def scored(z):
        if likelihood == "gaussian":
            each = torch.distributions.Normal(z, 1.0).log_prob(target.double()).sum(2)
        else:
            labels = target.expand(configs, -1).reshape(-1)
            each = -F.cross_entropy(z.reshape(-1, outputs), labels, reduction="none")
            each = each.view(configs, -1)
        return each

    calm = scored(logits[leaves])
    noisy = scored(logits[leaves + configs]) if paired else calm
    total = calm.sum(1)
    if likelihood == "mean":
        total = calm.logsumexp(1) - torch.tensor(float(calm.shape[1])).log()
    posterior = (total + log_prior).softmax(0).detach()
    loss = (posterior * -noisy.mean(1)).sum()
    gradients = torch.autograd.grad(loss, tensors)
    return [t.detach() for t in (total, posterior, -calm.mean(1), loss, *gradients)]


@pytest.mark.parametrize("capability", CAPABILITIES)
@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("likelihood", LIKELIHOODS)
@pytest.mark.parametrize("sizes", SIZES)
def test_scored_linear(sizes, likelihood, precision, capability):
    torch.manual_seed(0)
    configs, samples, leaf, outputs = sizes
    paired = likelihood == "mean"
    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    x = torch.randn(2 * configs if paired else configs, samples, *leaf).to(dtype)
    features = leaf[0] * leaf[1] * leaf[2]
    # numbers that every precision has, so that only sums and gradients are rounded
    x = (x * 4).round().clamp(-8, 8) / 16
    weight = (torch.randn(outputs, features) * 4).round().clamp(-8, 8) / 16
    bias, leaves = torch.randn(outputs), torch.randperm(configs)
    target = torch.randint(outputs, (samples,))
    if likelihood == "gaussian":
        target = torch.randn(samples, outputs)
    wins = torch.arange(configs)

    def run(seed):
        counted = wins.clone()
        with on_host(capability, seed=seed):
            found = scored_linear(
                x, weight, bias, leaves, target, None, counted, 1.0,
                LIKELIHOODS.index(likelihood), 1.0, paired, precision == "tf32",
            )  # fmt: skip
        return [*found, counted]

    got, again = run(1), run(2)
    for ours, other in zip(got, again, strict=True):
        assert torch.equal(ours, other)
    log_prior = (wins + 1.0).double().log()
    want = expected(x, weight, bias, leaves, target, log_prior, likelihood, paired)
    # a posterior moves by the error of its scores, and carries the gradient along
    moved = 1 + float(want[0].abs().max()) + samples * float(want[2].abs().max())
    scores = PRECISIONS["fp32"] * moved
    for name, ours, theirs in zip(NAMES, got, want, strict=False):
        allowed = scores + (PRECISIONS[precision] if name.startswith("d") else 0)
        assert (ours.double() - theirs).norm() <= allowed * theirs.norm(), name
    winner = F.one_hot(want[1].argmax(), configs)
    assert torch.equal(got[-1], wins + winner)
