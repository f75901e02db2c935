"""The last linear layer of a head with the posterior head behind it, forward and backward.

Two launches without atomics, for heads whose logits a few programs hold. The first has one program
per configuration, which makes its logits and scores them; where the M-step has inputs of its own
(dropout), one more each. It leaves what the gradient of the logits is in proportion to. In the
second every program takes the softmax over all configurations for itself, as in
:mod:`lasem_fast.kernels.posterior_head`; the first of them sum the weight's gradient over all
samples of all configurations, the others make the input's, each of one configuration.
"""

from __future__ import annotations

import math
from math import prod
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from lasem_fast.kernels.early_launch import early, wait_for_others
from lasem_fast.kernels.kept import kept
from lasem_fast.kernels.launches import Launch
from lasem_fast.kernels.level_tiles import cdiv
from lasem_fast.kernels.posterior_head import (
    COUNTS,
    GAUSSIAN,
    LOG_PRIOR,
    UNIFORM,
    posterior_of,
    softmax_over,
    store_loss,
    store_mean_nll,
    store_score,
    with_log_probs,
)

# Sizes for which the weight's gradient is a short sum and a program holds all outputs of a sample.
MOST_SAMPLES, MOST_FEATURES, MOST_OUTPUTS = 1024, 1024, 128
# What a matrix product takes at least, and blocks of it; of blocks of outputs with one of them.
_LEAST, _FEATURES, _SAMPLES, _MOST_SAMPLES_AT_ONCE = 16, 64, 64, 32
_MOST_VALUES = 4096
_MOST_CONFIGS_AT_ONCE = 1024


@triton.jit
def _place(f, CHANNELS: tl.constexpr, PIXELS: tl.constexpr):
    """Where a filter, channels outermost, has what an image, channels innermost, has at f."""
    return f % CHANNELS * PIXELS + f // CHANNELS


@triton.jit
def score_linear_kernel(
    x, weight, bias, leaves, target, log_prior, wins,
    score, log_likelihood, nll, m_nll, residual,
    initial, precision, constant, n_samples, n_leaves, target_n, target_k,
    FEATURES: tl.constexpr, CHANNELS: tl.constexpr, PIXELS: tl.constexpr, OUTPUTS: tl.constexpr,
    HAS_BIAS: tl.constexpr, LIKELIHOOD: tl.constexpr, PRIOR: tl.constexpr, PAIR: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_F: tl.constexpr,
    EARLY: tl.constexpr,
):  # fmt: skip
    """Scores [C] as score_configurations, and residual [C, N, K]: d(N nll)/d(logits).

    PAIR: programs (c, 0) have the E-step's inputs, (c, 1) the M-step's, of which the residual is.
    """
    wait_for_others(EARLY)
    operand: tl.constexpr = x.dtype.element_ty
    c = tl.program_id(0)
    of_m_step = tl.program_id(1)
    row = tl.load(leaves + c) + of_m_step * n_leaves
    k = tl.arange(0, BLOCK_K)
    used = k < OUTPUTS
    offset = tl.zeros((BLOCK_K,), tl.float32)
    if HAS_BIAS:
        offset = tl.load(bias + k, mask=used, other=0.0).to(tl.float32)
    total = tl.zeros((BLOCK_N,), tl.float64)
    top = tl.full((BLOCK_N,), -float("inf"), tl.float32)
    mass = tl.zeros((BLOCK_N,), tl.float64)
    for start in range(0, n_samples, BLOCK_N):
        n = start + tl.arange(0, BLOCK_N)
        there = n < n_samples
        z = tl.zeros((BLOCK_N, BLOCK_K), tl.float32)
        for first in range(0, FEATURES, BLOCK_F):
            f = first + tl.arange(0, BLOCK_F)
            inside = f < FEATURES
            x_at = ((row * n_samples + n) * FEATURES)[:, None] + f[None, :]
            read = there[:, None] & inside[None, :]
            # through registers, as level_wgrad_kernel says
            values = tl.where(read, tl.load(x + x_at, mask=read, other=0.0), 0.0)
            w_at = (k * FEATURES)[None, :] + _place(f, CHANNELS, PIXELS)[:, None]
            read = used[None, :] & inside[:, None]
            filters = tl.where(read, tl.load(weight + w_at, mask=read, other=0.0), 0.0)
            z = tl.dot(values, filters.to(operand), z, input_precision=PRECISION)
        z += offset[None, :]
        inside = there[:, None] & used[None, :]
        if LIKELIHOOD == GAUSSIAN:
            at = (n * target_n)[:, None] + (k * target_k)[None, :]
            y = tl.load(target + at, mask=inside, other=0.0).to(tl.float32)
            error = tl.where(inside, z - y, 0.0)
            log_prob = -0.5 * precision * tl.sum(error * error, axis=1) - constant
            left = error * precision
        else:
            largest = tl.max(tl.where(used[None, :], z, -float("inf")), axis=1)
            share = tl.where(used[None, :], tl.exp(z - largest[:, None]), 0.0)
            log_mass = tl.log(tl.sum(share, axis=1))
            label = tl.load(target + n * target_n, mask=there, other=0)
            known = there & (label >= 0) & (label < OUTPUTS)
            named = k[None, :] == label[:, None]
            log_prob = tl.sum(tl.where(named, z, 0.0), axis=1) - largest - log_mass
            log_prob = tl.where(known, log_prob, float("nan"))
            left = tl.exp(z - largest[:, None] - log_mass[:, None]) - tl.where(named, 1.0, 0.0)
        total, top, mass = with_log_probs(total, top, mass, log_prob, there, LIKELIHOOD)
        if not PAIR or of_m_step == 1:
            at = ((c * n_samples + n) * OUTPUTS)[:, None] + k[None, :]
            tl.store(residual + at, left, mask=inside)
    if of_m_step == 1:
        store_mean_nll(m_nll + c, total, n_samples)
        return
    store_score(
        c, total, top, mass, log_prior, wins, initial, score, log_likelihood, nll, n_samples,
        LIKELIHOOD, PRIOR,
    )  # fmt: skip


@triton.jit
def weigh_linear_kernel(
    x, weight, leaves, residual, score, nll, wins, posterior, loss, dx, dweight, dbias,
    n_configs, n_samples, n_leaves,
    FEATURES: tl.constexpr, CHANNELS: tl.constexpr, PIXELS: tl.constexpr, OUTPUTS: tl.constexpr,
    HAS_BIAS: tl.constexpr, COUNT: tl.constexpr, PAIR: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_C: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
    BLOCK_F: tl.constexpr,
    EARLY: tl.constexpr,
):  # fmt: skip
    """Posterior, loss, the winner's count and d(loss)/d(x, weight, bias), from the scores."""
    wait_for_others(EARLY)
    operand: tl.constexpr = x.dtype.element_ty
    BLOCKS: tl.constexpr = (FEATURES + BLOCK_F - 1) // BLOCK_F
    program = tl.program_id(0)
    f = program % BLOCKS * BLOCK_F + tl.arange(0, BLOCK_F)
    inside = f < FEATURES
    k = tl.arange(0, BLOCK_K)
    used = k < OUTPUTS
    w_at = (k * FEATURES)[:, None] + _place(f, CHANNELS, PIXELS)[None, :]
    is_weight = used[:, None] & inside[None, :]
    top, whole = softmax_over(score, n_configs, BLOCK_C)
    if program < BLOCKS:
        total = tl.zeros((BLOCK_K, BLOCK_F), tl.float32)
        bias = tl.zeros((BLOCK_M, BLOCK_K), tl.float32)
        for start in range(0, n_configs * n_samples, BLOCK_M):
            m = start + tl.arange(0, BLOCK_M)
            there = m < n_configs * n_samples
            c = m // n_samples
            p = posterior_of(tl.load(score + c, mask=there, other=-float("inf")), top, whole)
            scale = (p / n_samples)[:, None]
            read = there[:, None] & used[None, :]
            left = tl.load(residual + (m * OUTPUTS)[:, None] + k[None, :], mask=read, other=0.0)
            # chosen, not multiplied: 0 * NaN would be NaN
            gradient = tl.where(scale > 0, scale * left, 0.0)
            row = tl.load(leaves + c, mask=there, other=0)
            if PAIR:
                row += n_leaves
            at = ((row * n_samples + m % n_samples) * FEATURES)[:, None] + f[None, :]
            values = tl.load(x + at, mask=there[:, None] & inside[None, :], other=0.0)
            # likewise
            finite = tl.abs(values.to(tl.float32)) < float("inf")
            values = tl.where(finite, values, 0.0).to(operand)
            total = tl.dot(tl.trans(gradient.to(operand)), values, total, input_precision=PRECISION)
            bias += gradient
        tl.store(dweight + w_at, total.to(dweight.dtype.element_ty), mask=is_weight)
        if HAS_BIAS:
            if program == 0:
                tl.store(dbias + k, tl.sum(bias, axis=0).to(dbias.dtype.element_ty), mask=used)
    else:
        if program == BLOCKS:
            store_loss(score, nll, wins, loss, top, whole, n_configs, COUNT, BLOCK_C)
        c = program // BLOCKS - 1
        p = posterior_of(tl.load(score + c), top, whole)
        if program % BLOCKS == 0:
            tl.store(posterior + c, p)
        scale = p / n_samples
        row = tl.load(leaves + c)
        filters = tl.load(weight + w_at, mask=is_weight, other=0.0).to(operand)
        for start in range(0, n_samples, BLOCK_N):
            n = start + tl.arange(0, BLOCK_N)
            there = n < n_samples
            at = ((c * n_samples + n) * OUTPUTS)[:, None] + k[None, :]
            left = tl.load(residual + at, mask=there[:, None] & used[None, :], other=0.0)
            gradient = tl.where(scale > 0, scale * left, 0.0).to(operand)
            to = tl.dot(gradient, filters, input_precision=PRECISION)
            at = ((row * n_samples + n) * FEATURES)[:, None] + f[None, :]
            keep = there[:, None] & inside[None, :]
            if PAIR:
                # the E-step's have no gradient
                tl.store(dx + at, tl.zeros((BLOCK_N, BLOCK_F), operand), mask=keep)
                at += n_leaves * n_samples * FEATURES
            tl.store(dx + at, to.to(operand), mask=keep)


class Scored(NamedTuple):
    """What both launches give.

    Attributes:
        log_likelihood, posterior, nll: ``[C]``, float32.
        loss: scalar, float32.
        dx, dweight, dbias: its gradients, like what they are of; dbias is empty without a bias.
    """

    log_likelihood: Tensor
    posterior: Tensor
    nll: Tensor
    loss: Tensor
    dx: Tensor
    dweight: Tensor
    dbias: Tensor


def takes(configs: int, samples: int, features: int, outputs: int) -> bool:
    """Whether sizes are small enough for two launches to be less work than five."""
    few = configs * samples <= MOST_SAMPLES
    return few and features <= MOST_FEATURES and 1 <= outputs <= MOST_OUTPUTS


def scored_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    leaves: Tensor,
    target: Tensor,
    log_prior: Tensor | None,
    wins: Tensor | None,
    initial: float | None,
    likelihood: int,
    sigma: float,
    paired: bool,
    tf32: bool,
) -> Scored:
    """Launches both kernels.

    Args:
        x: ``[P, N, H, W, C]``, contiguous, float32 or bfloat16; with ``paired`` ``2 * P`` rows, the
            E-step's before the M-step's.
        weight: ``[K, C * H * W]``, channels outermost, contiguous; converted as it is read.
        bias: contiguous ``[K]``, or None.
        leaves: int32 ``[C]``, every row of P once: that of each configuration.
        target, log_prior, wins, initial, likelihood, sigma: as in
            :func:`~lasem_fast.kernels.posterior_head.posterior_head`.
        paired: whether both steps have inputs of their own.
        tf32: whether a float32 product may round its operands to TF32.
    """
    configs, outputs = len(leaves), len(weight)
    log_likelihood, posterior, nll, m_nll = (
        x.new_empty((configs,), dtype=torch.float32) for _ in range(4)
    )
    score = x.new_empty((configs,), dtype=torch.float64)
    residual = x.new_empty((configs, x.shape[1], outputs), dtype=torch.float32)
    loss = x.new_empty((), dtype=torch.float32)
    dx, dweight = torch.empty_like(x), torch.empty_like(weight)
    dbias = x.new_empty(0) if bias is None else torch.empty_like(bias)
    prior = LOG_PRIOR if log_prior is not None else UNIFORM if initial is None else COUNTS
    first, second = _launches(
        tuple(x.shape), configs, outputs, bias is not None, (*target.stride(), 0)[:2], likelihood,
        prior.value, initial or 0.0, sigma, wins is not None, paired, tf32, x.device,
    )  # fmt: skip
    # others stand where nothing is read or written
    first(
        x, weight, weight if bias is None else bias, leaves, target,
        score if log_prior is None else log_prior, score if wins is None else wins,
        score, log_likelihood, nll, m_nll, residual,
    )  # fmt: skip
    second(
        x, weight, leaves, residual, score, m_nll if paired else nll,
        score if wins is None else wins, posterior, loss, dx, dweight, dbias,
    )  # fmt: skip
    return Scored(log_likelihood, posterior, nll, loss, dx, dweight, dbias)


@kept
def _launches(
    x: tuple[int, ...], configs: int, outputs: int, has_bias: bool, target: tuple[int, int],
    likelihood: int, prior: int, initial: float, sigma: float, count: bool, paired: bool,
    tf32: bool, device: torch.device,
) -> tuple[Launch, Launch]:  # fmt: skip
    rows, samples, *_, channels = x
    features = prod(x[2:])
    leaves = rows // 2 if paired else rows
    block = lambda n: max(_LEAST, triton.next_power_of_2(n))  # noqa: E731
    alike = {
        "FEATURES": features, "CHANNELS": channels, "PIXELS": features // channels,
        "OUTPUTS": outputs, "HAS_BIAS": has_bias, "PAIR": paired,
        "PRECISION": "tf32" if tf32 else "ieee", "BLOCK_K": block(outputs),
        "BLOCK_N": min(block(samples), _MOST_SAMPLES_AT_ONCE),
        "BLOCK_F": min(block(features), _FEATURES, _MOST_VALUES // block(outputs)),
        "num_warps": 4, **early(device),
    }  # fmt: skip
    constant = outputs * (math.log(sigma) + 0.5 * math.log(2 * math.pi))
    first = Launch(
        score_linear_kernel, (configs, 2 if paired else 1),
        (initial, sigma**-2, constant, samples, leaves, *target),
        LIKELIHOOD=likelihood, PRIOR=prior, **alike,
    )  # fmt: skip
    blocks = cdiv(features, alike["BLOCK_F"])
    second = Launch(
        weigh_linear_kernel, (blocks * (1 + configs),), (configs, samples, leaves),
        COUNT=count, BLOCK_C=min(triton.next_power_of_2(configs), _MOST_CONFIGS_AT_ONCE),
        BLOCK_M=min(block(configs * samples), _SAMPLES, _MOST_VALUES // block(outputs)), **alike,
    )  # fmt: skip
    return first, second
