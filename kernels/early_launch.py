"""Programmatic dependent launch (sm_90): a kernel is launched while the one before it still runs.

Its programs take their places as soon as there are any, and wait there until all that came before
is written. In a CUDA graph that saves most of what lies between two kernels. ``LASEM_FAST_PDL=0``
turns it off.
"""

from __future__ import annotations

import os
from functools import cache

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

_VARIABLE = "LASEM_FAST_PDL"


@triton.jit
def wait_for_others(EARLY: tl.constexpr):
    """What every kernel does before it looks at memory: lets the next one come, and waits."""
    if EARLY:
        gdc_launch_dependents()
        gdc_wait()


def early(x: Tensor) -> dict[str, bool]:
    """What a launch on the tensor's device is told about it.

    Raises:
        ValueError: ``LASEM_FAST_PDL`` is neither 0 nor 1.
    """
    if not x.is_cuda or not _is_wanted(x.device):
        return {"EARLY": False}
    return {"EARLY": True, "launch_pdl": True}


@cache
def _is_wanted(device: torch.device) -> bool:
    asked = os.environ.get(_VARIABLE, "1")
    if asked not in ("0", "1"):
        raise ValueError(f"{_VARIABLE}: expected 0 or 1, got {asked!r}")
    return asked == "1" and torch.cuda.get_device_capability(device) >= (9, 0)
