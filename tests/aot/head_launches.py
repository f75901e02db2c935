"""Launches of the posterior head, alone and with its linear layer."""

from __future__ import annotations

import torch
from torch import Tensor

from bench.compiling import Launch, recorded
from lasem_fast.backends.triton_head_op import LIKELIHOODS
from lasem_fast.kernels.posterior_head import posterior_head
from lasem_fast.kernels.scored_linear import scored_linear

_DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
# configurations, samples, outputs
_LAYERS = {"cifar-4": (16, 10, (1, 1, 64), 10), "widest": (64, 16, (4, 4, 64), 128)}
_SHAPES = {"cifar-4": (16, 10, 10), "grouped": (256, 128, 1000), "largest": (65536, 3, 5000)}


def launches() -> dict[str, Launch]:
    """By name: what the launcher would start for tensors of these shapes."""
    found = {}
    for likelihood in LIKELIHOODS:
        for shape in _SHAPES:
            found |= _head(likelihood, "bf16", shape, "count")
        for dtype in ("fp32", "fp16"):
            found |= _head(likelihood, dtype, "cifar-4", "count")
        for prior in ("given", "uniform"):
            found |= _head(likelihood, "bf16", "cifar-4", prior)
        found |= _head(likelihood, "bf16", "cifar-4", "count", paired=True)
        found |= _scored(likelihood, "bf16", "cifar-4", paired=True)
        found |= _scored(likelihood, "bf16", "cifar-4")
    for precision in ("fp32", "tf32"):
        found |= _scored("joint", precision, "cifar-4")
    found |= _scored("joint", "bf16", "widest")
    found |= _scored("mean", "fp32", "widest", paired=True)
    return found


def _meta(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.empty(shape, device="meta", dtype=dtype)


def _head(
    likelihood: str, dtype: str, shape: str, prior: str, paired: bool = False
) -> dict[str, Launch]:
    configs, samples, outputs = _SHAPES[shape]
    logits = _meta(samples, configs, outputs, dtype=_DTYPES[dtype]).transpose(0, 1)
    if paired:
        logits = _meta(2, *logits.shape, dtype=logits.dtype)
    if likelihood == "gaussian":
        target = _meta(samples, outputs)
    else:
        target = _meta(samples, dtype=torch.int64)
    log_prior = _meta(configs, dtype=torch.float64) if prior == "given" else None
    wins = _meta(configs, dtype=torch.int64) if prior == "count" else None
    initial = 1.0 if prior == "count" else None
    kind = LIKELIHOODS.index(likelihood)
    with recorded() as started:
        posterior_head(logits, target, log_prior, wins, initial, kind, 1.0)
    return {
        f"{launch.kernel.__name__}/{dtype}/{shape}/{likelihood}_{prior}{'_pair' * paired}": launch
        for launch in started
    }


def _scored(likelihood: str, precision: str, layer: str, paired: bool = False) -> dict[str, Launch]:
    configs, samples, sample, outputs = _LAYERS[layer]
    tf32 = precision == "tf32"
    dtype = torch.float32 if tf32 else _DTYPES[precision]
    x = _meta(2 * configs if paired else configs, samples, *sample, dtype=dtype)
    weight = _meta(outputs, sample[0] * sample[1] * sample[2])
    target = _meta(samples, dtype=torch.int64)
    if likelihood == "gaussian":
        target = _meta(samples, outputs)
    wins = _meta(configs, dtype=torch.int64)
    with recorded() as started:
        scored_linear(
            x, weight, _meta(outputs), wins, target, None, wins, 1.0,
            LIKELIHOODS.index(likelihood), 1.0, paired, tf32,
        )  # fmt: skip
    return {
        f"{launch.kernel.__name__}/{precision}/{layer}/{likelihood}{'_pair' * paired}": launch
        for launch in started
    }
