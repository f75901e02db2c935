"""Launches of the head's dropout: images and vectors, forward and backward."""

from __future__ import annotations

import torch

from bench.compiling import Launch, recorded
from lasem_fast.kernels import dropout as kernels

_HALVES = {"alone": kernels.ALONE, "calm": kernels.CALM, "zero": kernels.ZERO}


def launches() -> dict[str, Launch]:
    """By name: what the launcher would start for tensors of these shapes."""
    found = {}
    for dtype in (torch.bfloat16, torch.float32):
        for size, channels in ((8, 64), (1, 1000)):
            for name, half in _HALVES.items():
                x = torch.empty(16, 10, size, size, channels, device="meta", dtype=dtype)
                mask = torch.empty(x.numel(), device="meta", dtype=torch.bool)
                with recorded() as started:
                    kernels.dropout(x, mask, None, 16, 0, 2.0, half.value)
                kind = str(dtype).removeprefix("torch.")
                found[f"dropout/{kind}/{size}x{size}x{channels}/{name}"] = started[0]
    return found
