"""Programmatic dependent launch (sm_90): a kernel is on its way while the one before it ends.

``LASEM_FAST_PDL=1`` turns it on. In a CUDA graph it saves some of what lies between two kernels,
but kernels on two streams no longer run side by side: small steps gain, large ones lose.
"""

from __future__ import annotations

import os
from functools import cache

import torch
import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_wait

_VARIABLE = "LASEM_FAST_PDL"


@triton.jit
def wait_for_others(EARLY: tl.constexpr):
    """What every kernel does before it looks at memory: waits until all before it is written."""
    if EARLY:
        gdc_wait()


def early(device: torch.device) -> dict[str, bool]:
    """What a launch on a device is told about it.

    Raises:
        ValueError: ``LASEM_FAST_PDL`` is neither 0 nor 1.
    """
    if device.type != "cuda" or not _is_wanted(device):
        return {"EARLY": False}
    return {"EARLY": True, "launch_pdl": True}


@cache
def _is_wanted(device: torch.device) -> bool:
    asked = os.environ.get(_VARIABLE, "0")
    if asked not in ("0", "1"):
        raise ValueError(f"{_VARIABLE}: expected 0 or 1, got {asked!r}")
    return asked == "1" and torch.cuda.get_device_capability(device) >= (9, 0)
