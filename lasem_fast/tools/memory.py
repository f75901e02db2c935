"""Memory of a step, as PyTorch's own profiler measures it."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

from lasem_fast.backends import cpu_ops


def measured_peak(step: Callable[[], Any], device: torch.device | str) -> int:
    """Peak of what PyTorch allocates during ``step``, in bytes, above what was there before.

    On the CPU: the running sum of the profiler's allocation events, and all that the CPU kernels
    hold on to between steps. On a CUDA device: the allocator's own maximum.
    """
    if torch.device(device).type == "cuda":
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        step()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before
    cpu_ops.clear_scratch()
    changes = _allocations(step)
    total = peak = 0
    for change in changes:
        total += change
        peak = max(peak, total)
    return peak + cpu_ops.clear_scratch()


def measured_held(forward: Callable[[], Any]) -> int:
    """What a forward leaves allocated on the CPU while its result is alive, in bytes."""
    results = []
    changes = _allocations(lambda: results.append(forward()))
    return sum(changes)


def _allocations(step: Callable[[], Any]) -> list[int]:
    """Bytes taken (+) and given back (-) by ``step``, in order."""
    # The profiler would announce its start and stop on standard error.
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        step()
    events = [e for e in profiler.profiler.kineto_results.events() if e.name() == "[memory]"]
    return [e.nbytes() for e in sorted(events, key=lambda e: e.start_ns())]
