"""Brute force: every configuration as a network of its own, by autograd, with no library code.

This is the specification that the fast paths are held against. It reads the net's modules and
computes Algorithm 1 and Eq. 2-4 of the paper as they are written.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class Truth(NamedTuple):
    loss: Tensor
    posterior: Tensor
    log_likelihood: Tensor
    nll: Tensor
    grads: dict[str, Tensor]


def logits_of(net, config, x, task):
    """The logits of one configuration, given as d booleans."""
    h = x.clone()
    for stage, shared in enumerate(config):
        h = (net.shared[stage] if shared else net.specific[task][stage])(h)
    return net.heads[task](h)


def brute_force(
    net,
    bits,
    x,
    y,
    task,
    *,
    log_prior=None,
    likelihood="joint",
    posterior=None,
    logits=logits_of,
    penalty=None,
    gradients=True,
):
    """Loss, posterior and gradients of one mini-batch, without configurations that overflow.

    ``logits`` evaluates one configuration; ``penalty(stage)`` is what a configuration's loss, but
    not its likelihood, has on top for sharing a stage.
    """
    log_probs = []
    for config in bits.tolist():
        log_p = logits(net, config, x, task).log_softmax(dim=1)
        log_probs.append(log_p[torch.arange(len(y)), y])
    nll = [-p.mean() for p in log_probs]
    usable = [bool(torch.isfinite(n)) for n in nll]
    if likelihood == "joint":
        values = [p.sum() for p in log_probs]
    else:
        values = [p.exp().mean().log() for p in log_probs]
    if log_prior is None:
        log_prior = torch.zeros(len(bits), dtype=x.dtype)
    value = torch.stack(
        [
            v.detach() if ok else v.new_tensor(-torch.inf)
            for v, ok in zip(values, usable, strict=True)
        ]
    )
    if posterior is None:
        joint = log_prior + value
        posterior = (joint - joint.max()).exp()
        posterior = posterior / posterior.sum()
    named = dict(net.named_parameters())
    costs = list(nll)
    if penalty is not None:
        for row, config in enumerate(bits.tolist()):
            for stage in (i for i, shared in enumerate(config) if shared):
                costs[row] = costs[row] + penalty(stage)
    loss = sum(
        (p * c for p, c, ok in zip(posterior.tolist(), costs, usable, strict=True) if ok),
        start=0 * sum(p.sum() for p in named.values()),
    )
    grads = [None] * len(named)
    if gradients:
        grads = torch.autograd.grad(loss, list(named.values()), allow_unused=True)
    zero = {n: torch.zeros_like(p) for n, p in named.items()}
    return Truth(
        loss=loss.detach(),
        posterior=posterior,
        log_likelihood=value,
        nll=torch.stack(
            [
                n.detach() if ok else n.detach() * torch.inf
                for n, ok in zip(nll, usable, strict=True)
            ]
        ),
        grads={n: zero[n] if g is None else g for n, g in zip(named, grads, strict=True)},
    )


def assert_equals(actual: Tensor, expected: Tensor, what: str, bound: float = 1e-10):
    """Equal to ``bound``, relative to the largest expected value where that is above 1."""
    assert actual.shape == expected.shape, f"{what}: {actual.shape} is not {expected.shape}"
    finite = torch.isfinite(expected)
    assert torch.equal(actual[~finite], expected[~finite]), f"{what}: {actual} is not {expected}"
    if not bool(finite.any()):
        return
    scale = max(1.0, float(expected[finite].abs().max()))
    error = float((actual[finite] - expected[finite]).abs().max()) / scale
    assert error <= bound, f"{what}: off by {error:.3g} of {scale:.3g}"


def assert_step_equals(net, step, truth: Truth):
    """Runs the step's backward and compares loss, posterior and every gradient with the truth."""
    net.zero_grad()
    step.loss.backward()
    assert_equals(step.loss.detach(), truth.loss, "loss")
    assert_equals(step.posterior, truth.posterior.to(step.posterior), "posterior")
    assert_equals(step.log_likelihood, truth.log_likelihood, "log_likelihood")
    for name, parameter in net.named_parameters():
        grad = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
        assert_equals(grad, truth.grads[name], f"gradient of {name}")
