"""Posterior head: logits and targets -> log-likelihoods, posterior, loss, d(logits), new count.

Two launches without atomics. The first has one program per configuration and scores it; where the
M-step has logits of its own (dropout), one more each for their mean NLL. In the second every
program takes the softmax over all configurations for itself, from C numbers, and goes on with its
own configurations; program 0 also sums the loss and counts the winner. The prior's counts are read
in the first launch and written in the second.

Sums over samples and over configurations are in float64: L_c of size 1e3 must not carry its
rounding into the posterior.
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from lasem_fast.kernels.early_launch import early, wait_for_others

# likelihoods
JOINT, MEAN, GAUSSIAN = tl.constexpr(0), tl.constexpr(1), tl.constexpr(2)
# where log P(c) comes from
UNIFORM, LOG_PRIOR, COUNTS = tl.constexpr(0), tl.constexpr(1), tl.constexpr(2)

_MOST_PROGRAMS = 1024  # of the second launch: each reads all C scores
_TILE = 2048  # logits that a program holds at a time
_LONGEST = 1024  # of one dimension of a tile


@triton.jit
def _normaliser(row, there, stride_k, n_classes, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr):
    """Largest logit and log of the sum of exp(logit - largest), for a block of rows.

    The latter is NaN for a row with NaN or +inf.
    """
    # reduced after the loops: Triton 3.6 aborts on a row maximum kept in the loop and used twice
    largest = tl.full((BLOCK_N, BLOCK_K), -float("inf"), tl.float32)
    for start in range(0, n_classes, BLOCK_K):
        k = start + tl.arange(0, BLOCK_K).to(tl.int64)
        inside = there[:, None] & (k < n_classes)[None, :]
        z = tl.load(row[:, None] + (k * stride_k)[None, :], mask=inside, other=-float("inf"))
        largest = tl.maximum(largest, z.to(tl.float32))
    top = tl.max(largest, axis=1)
    mass = tl.zeros((BLOCK_N, BLOCK_K), tl.float32)
    for start in range(0, n_classes, BLOCK_K):
        k = start + tl.arange(0, BLOCK_K).to(tl.int64)
        inside = there[:, None] & (k < n_classes)[None, :]
        z = tl.load(row[:, None] + (k * stride_k)[None, :], mask=inside, other=0.0)
        mass += tl.where(inside, tl.exp(z.to(tl.float32) - top[:, None]), 0.0)
    return top, tl.log(tl.sum(mass, axis=1))


@triton.jit
def _squared_error(
    row, target, there, stride_k, target_stride_k, n_outputs,
    BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Sum over a sample's outputs of (output - target)^2, for a block of rows."""
    total = tl.zeros((BLOCK_N, BLOCK_K), tl.float32)
    for start in range(0, n_outputs, BLOCK_K):
        k = start + tl.arange(0, BLOCK_K).to(tl.int64)
        inside = there[:, None] & (k < n_outputs)[None, :]
        z = tl.load(row[:, None] + (k * stride_k)[None, :], mask=inside, other=0.0)
        y = tl.load(target[:, None] + (k * target_stride_k)[None, :], mask=inside, other=0.0)
        error = z.to(tl.float32) - y.to(tl.float32)
        total += error * error
    return tl.sum(total, axis=1)


@triton.jit
def with_log_probs(total, top, mass, log_prob, there, LIKELIHOOD: tl.constexpr):
    """Running sum of log P(y_i | x_i, c) and, for their mean, largest one and sum of shares."""
    total += tl.where(there, log_prob, 0.0).to(tl.float64)
    if LIKELIHOOD == MEAN:
        larger = tl.where(there, tl.maximum(top, log_prob), top)
        old = tl.where(top == larger, 1.0, tl.exp(top - larger))
        new = tl.where(there, tl.exp(log_prob - larger), 0.0)
        mass = mass * old.to(tl.float64) + new.to(tl.float64)
        top = larger
    return total, top, mass


@triton.jit
def store_mean_nll(at, total, n_samples):
    """The mean NLL of a running sum, +inf where it is not finite."""
    mean_nll = (-tl.sum(total, axis=0) / n_samples).to(tl.float32)
    tl.store(at, tl.where(tl.abs(mean_nll) < float("inf"), mean_nll, float("inf")))


@triton.jit
def store_score(
    c, total, top, mass, log_prior, wins, initial, score, log_likelihood, nll, n_samples,
    LIKELIHOOD: tl.constexpr, PRIOR: tl.constexpr,
):  # fmt: skip
    """L_c, mean NLL and log P(c) + L_c of configuration ``c`` from its running sums."""
    summed = tl.sum(total, axis=0)
    mean_nll = (-summed / n_samples).to(tl.float32)
    finite = tl.abs(mean_nll) < float("inf")
    value = summed
    if LIKELIHOOD == MEAN:
        largest = tl.max(top, axis=0)
        share = tl.where(top == -float("inf"), 0.0, tl.exp(top - largest)).to(tl.float64)
        total_mass = tl.sum(mass * share, axis=0)
        value = largest.to(tl.float64) + tl.log(total_mass / n_samples)
    prior = tl.zeros((), tl.float64)
    if PRIOR == COUNTS:
        prior = tl.log(tl.load(wins + c).to(tl.float64) + initial)
    if PRIOR == LOG_PRIOR:
        prior = tl.load(log_prior + c).to(tl.float64)
    tl.store(score + c, tl.where(finite, prior + value, -float("inf")))
    tl.store(log_likelihood + c, tl.where(finite, value, -float("inf")).to(tl.float32))
    tl.store(nll + c, tl.where(finite, mean_nll, float("inf")))


@triton.jit
def score_configurations(
    logits, target, log_prior, wins, initial, score, log_likelihood, nll, m_nll,
    n_samples, n_outputs, stride_m, stride_c, stride_n, stride_k, target_stride_n, target_stride_k,
    precision, constant,
    LIKELIHOOD: tl.constexpr, PRIOR: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
    EARLY: tl.constexpr,
):  # fmt: skip
    """One program per configuration: log P(y | x, c), mean NLL and log P(c) + L_c.

    ``score`` is float64 [C], -inf where the mean NLL is not finite; it lacks the prior's
    normalisation, which the softmax does not see. Programs (c, 1) score the M-step's logits.
    """
    wait_for_others(EARLY)
    c = tl.program_id(0).to(tl.int64)
    logits += tl.program_id(1).to(tl.int64) * stride_m
    total = tl.zeros((BLOCK_N,), tl.float64)
    top = tl.full((BLOCK_N,), -float("inf"), tl.float32)
    mass = tl.zeros((BLOCK_N,), tl.float64)
    for start in range(0, n_samples, BLOCK_N):
        n = start + tl.arange(0, BLOCK_N).to(tl.int64)
        there = n < n_samples
        row = logits + c * stride_c + n * stride_n
        if LIKELIHOOD == GAUSSIAN:
            error = _squared_error(row, target + n * target_stride_n, there, stride_k,
                                   target_stride_k, n_outputs, BLOCK_N, BLOCK_K)  # fmt: skip
            log_prob = -0.5 * precision * error - constant
        else:
            top_logit, log_mass = _normaliser(row, there, stride_k, n_outputs, BLOCK_N, BLOCK_K)
            label = tl.load(target + n * target_stride_n, mask=there, other=0)
            known = there & (label >= 0) & (label < n_outputs)
            picked = tl.load(row + tl.where(known, label, 0) * stride_k, mask=known, other=0.0)
            log_prob = picked.to(tl.float32) - top_logit - log_mass
            log_prob = tl.where(known, log_prob, float("nan"))
        total, top, mass = with_log_probs(total, top, mass, log_prob, there, LIKELIHOOD)
    if tl.program_id(1) == 1:
        store_mean_nll(m_nll + c, total, n_samples)
        return
    store_score(
        c, total, top, mass, log_prior, wins, initial, score, log_likelihood, nll, n_samples,
        LIKELIHOOD, PRIOR,
    )  # fmt: skip


@triton.jit
def posterior_of(score, top, total):
    """exp(score - top) / total in float32; the difference is taken in float64."""
    usable = top > -float("inf")
    p = tl.exp((score - top).to(tl.float32)) / total.to(tl.float32)
    return tl.where(usable, p, 0.0)


@triton.jit
def softmax_over(score, n_configs, BLOCK_C: tl.constexpr):
    """Largest score, and the sum of exp(score - largest), of all configurations."""
    largest = tl.full((BLOCK_C,), -float("inf"), tl.float64)
    for start in range(0, n_configs, BLOCK_C):
        c = start + tl.arange(0, BLOCK_C)
        value = tl.load(score + c, mask=c < n_configs, other=-float("inf"))
        largest = tl.maximum(largest, value)
    top = tl.max(largest, axis=0)
    partial = tl.zeros((BLOCK_C,), tl.float64)
    for start in range(0, n_configs, BLOCK_C):
        c = start + tl.arange(0, BLOCK_C)
        value = tl.load(score + c, mask=c < n_configs, other=-float("inf"))
        partial += tl.exp((value - top).to(tl.float32)).to(tl.float64)
    return top, tl.sum(partial, axis=0)


@triton.jit
def store_loss(
    score, nll, wins, loss, top, total, n_configs, COUNT: tl.constexpr, BLOCK_C: tl.constexpr
):
    """The loss, NaN where no configuration is usable, and the winner's count."""
    # nor with a log-prior of NaN or +inf
    usable = (top > -float("inf")) & (total < float("inf"))
    expected = tl.zeros((BLOCK_C,), tl.float64)
    best = tl.full((), -1.0, tl.float32)
    winner = tl.zeros((), tl.int32)
    for start in range(0, n_configs, BLOCK_C):
        c = start + tl.arange(0, BLOCK_C)
        inside = c < n_configs
        value = tl.load(score + c, mask=inside, other=-float("inf"))
        p = posterior_of(value, top, total)
        # 0 * inf is NaN: a configuration that overflowed has no gradient of its own, but its
        # activations are in those of the weights, which the loss has to show
        cost = tl.load(nll + c, mask=inside, other=0.0)
        expected += p.to(tl.float64) * cost.to(tl.float64)
        p = tl.where(inside, p, -1.0)
        here = tl.max(p, axis=0)
        lowest = tl.min(tl.where(p == here, c, n_configs), axis=0)
        winner = tl.where(here > best, lowest, winner)
        best = tl.maximum(best, here)
    loss_value = tl.where(usable, tl.sum(expected, axis=0), float("nan"))
    tl.store(loss, loss_value.to(tl.float32))
    if COUNT:
        # an address, so that nothing is read or written where nothing is usable
        at = wins + tl.where(usable, winner, 0)
        tl.store(at, tl.load(at, mask=usable, other=0) + 1, mask=usable)


@triton.jit
def _store_gradient(dlogits, rounded, at, gradient, inside, ROUNDS: tl.constexpr):
    """In float32, and in the logits' dtype where that is another."""
    tl.store(dlogits + at, gradient, mask=inside)
    if ROUNDS:
        tl.store(rounded + at, gradient.to(rounded.dtype.element_ty), mask=inside)


@triton.jit
def weigh_configurations(
    logits, target, score, nll, wins, posterior, loss, dlogits, rounded,
    n_configs, n_samples, n_outputs, stride_m, stride_c, stride_n, stride_k,
    target_stride_n, target_stride_k, grad_stride_m, grad_stride_c, grad_stride_n, grad_stride_k,
    precision,
    LIKELIHOOD: tl.constexpr, COUNT: tl.constexpr, PAIR: tl.constexpr, ROUNDS: tl.constexpr,
    BLOCK_C: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
    EARLY: tl.constexpr,
):  # fmt: skip
    """Posterior, loss, the winner's count and d(loss)/d(logits), from the scores.

    Any number of programs: each takes as many configurations as it must. PAIR: ``logits`` are the
    E-step's and the M-step's; loss (``nll`` too) and gradient are of the latter. ROUNDS: the
    gradient is written in the dtype of ``rounded`` too.
    """
    wait_for_others(EARLY)
    first = tl.program_id(0)
    if PAIR:
        logits += stride_m
    top, total = softmax_over(score, n_configs, BLOCK_C)
    if first == 0:
        store_loss(score, nll, wins, loss, top, total, n_configs, COUNT, BLOCK_C)
    for config in range(first, n_configs, tl.num_programs(0)):
        c = tl.cast(config, tl.int64)
        p = posterior_of(tl.load(score + c), top, total)
        tl.store(posterior + c, p)
        scale = p / n_samples
        for start in range(0, n_samples, BLOCK_N):
            n = start + tl.arange(0, BLOCK_N).to(tl.int64)
            there = n < n_samples
            row = logits + c * stride_c + n * stride_n
            out = c * grad_stride_c + n * grad_stride_n
            if PAIR:
                out += grad_stride_m
            label = tl.zeros((BLOCK_N,), tl.int64)
            row_top = tl.zeros((BLOCK_N,), tl.float32)
            log_mass = tl.zeros((BLOCK_N,), tl.float32)
            if LIKELIHOOD != GAUSSIAN:
                row_top, log_mass = _normaliser(row, there, stride_k, n_outputs, BLOCK_N, BLOCK_K)
                label = tl.load(target + n * target_stride_n, mask=there, other=0)
            for first_k in range(0, n_outputs, BLOCK_K):
                k = first_k + tl.arange(0, BLOCK_K).to(tl.int64)
                inside = there[:, None] & (k < n_outputs)[None, :]
                z = tl.load(row[:, None] + (k * stride_k)[None, :], mask=inside, other=0.0)
                z = z.to(tl.float32)
                if LIKELIHOOD == GAUSSIAN:
                    at = (target + n * target_stride_n)[:, None] + (k * target_stride_k)[None, :]
                    y = tl.load(at, mask=inside, other=0.0).to(tl.float32)
                    residual = (z - y) * precision
                else:
                    residual = tl.exp(z - row_top[:, None] - log_mass[:, None])
                    residual -= tl.where(k[None, :] == label[:, None], 1.0, 0.0)
                # chosen, not multiplied: 0 * NaN would be NaN
                grad = tl.where(scale > 0, scale * residual, 0.0)
                at = out[:, None] + (k * grad_stride_k)[None, :]
                _store_gradient(dlogits, rounded, at, grad, inside, ROUNDS)
    if PAIR:
        # the E-step's have no gradient
        for config in range(first, n_configs, tl.num_programs(0)):
            for start in range(0, n_samples, BLOCK_N):
                n = start + tl.arange(0, BLOCK_N).to(tl.int64)
                out = tl.cast(config, tl.int64) * grad_stride_c + n * grad_stride_n
                for first_k in range(0, n_outputs, BLOCK_K):
                    k = first_k + tl.arange(0, BLOCK_K).to(tl.int64)
                    inside = (n < n_samples)[:, None] & (k < n_outputs)[None, :]
                    at = out[:, None] + (k * grad_stride_k)[None, :]
                    nothing = tl.zeros((BLOCK_N, BLOCK_K), tl.float32)
                    _store_gradient(dlogits, rounded, at, nothing, inside, ROUNDS)


def posterior_head(
    logits: Tensor,
    target: Tensor,
    log_prior: Tensor | None,
    wins: Tensor | None,
    initial: float | None,
    likelihood: int,
    sigma: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Launches both kernels; the contract is that of ``lasem_fast::posterior_head_triton``."""
    paired = logits.dim() == 4
    configs, samples, outputs = logits.shape[-3:]
    log_likelihood, posterior, nll, m_nll = (
        logits.new_empty((configs,), dtype=torch.float32) for _ in range(4)
    )
    score = logits.new_empty((configs,), dtype=torch.float64)
    loss = logits.new_empty((), dtype=torch.float32)
    dlogits = torch.empty_like(logits, dtype=torch.float32)
    rounds = logits.dtype != torch.float32
    rounded = torch.empty_like(logits) if rounds else logits.new_empty(0)
    target_strides = (*target.stride(), 0)[:2]
    precision = sigma**-2
    constant = outputs * (math.log(sigma) + 0.5 * math.log(2 * math.pi))
    if log_prior is not None:
        prior = LOG_PRIOR
    else:
        prior = UNIFORM if initial is None else COUNTS
    block_k = min(triton.next_power_of_2(outputs), _LONGEST)
    block_n = min(triton.next_power_of_2(samples), max(1, _TILE // block_k))
    strides, grad_strides = (t.stride() if paired else (0, *t.stride()) for t in (logits, dlogits))
    score_configurations[configs, 2 if paired else 1](
        logits, target, log_prior, wins, initial, score, log_likelihood, nll, m_nll,
        samples, outputs, *strides, *target_strides, precision, constant,
        LIKELIHOOD=likelihood, PRIOR=prior.value, BLOCK_N=block_n, BLOCK_K=block_k,
        **early(logits.device),
    )  # fmt: skip
    weigh_configurations[(min(configs, _MOST_PROGRAMS),)](
        logits, target, score, m_nll if paired else nll, wins, posterior, loss, dlogits, rounded,
        configs, samples, outputs, *strides, *target_strides, *grad_strides, precision,
        LIKELIHOOD=likelihood, COUNT=wins is not None, PAIR=paired, ROUNDS=rounds,
        BLOCK_C=min(triton.next_power_of_2(configs), _LONGEST), BLOCK_N=block_n, BLOCK_K=block_k,
        # those with which the compiler neither runs out of registers nor keeps to too few
        num_warps=4 if likelihood == GAUSSIAN.value else 2, **early(logits.device),
    )  # fmt: skip
    return log_likelihood, posterior, nll, loss, dlogits, rounded
