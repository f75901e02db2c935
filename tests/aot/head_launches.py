"""Launches of the posterior head: every likelihood and prior, short and long rows."""

from __future__ import annotations

import torch
from torch import Tensor

from bench.compiling import Launch, recorded
from lasem_fast.backends.triton_head_op import LIKELIHOODS
from lasem_fast.kernels.posterior_head import posterior_head

_DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
# configurations, samples, outputs
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
