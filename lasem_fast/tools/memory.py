"""Memory of a step: measured by PyTorch's own profiler, or counted on the meta device."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


def measured_peak(step: Callable[[], Any], device: torch.device | str) -> int:
    """Peak of what PyTorch allocates during ``step``, in bytes, above what was there before.

    On the CPU: the running sum of the profiler's allocation events. On a CUDA device: the
    allocator's own maximum.
    """
    if torch.device(device).type == "cuda":
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        step()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before
    changes = _allocations(step)
    total = peak = 0
    for change in changes:
        total += change
        peak = max(peak, total)
    return peak


def measured_held(forward: Callable[[], Any]) -> int:
    """What a forward leaves allocated on the CPU while its result is alive, in bytes."""
    results = []
    changes = _allocations(lambda: results.append(forward()))
    return sum(changes)


def _allocations(step: Callable[[], Any]) -> list[int]:
    """Bytes taken (+) and given back (-) by ``step``, in order."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        step()
    events = [e for e in profiler.profiler.kineto_results.events() if e.name() == "[memory]"]
    return [e.nbytes() for e in sorted(events, key=lambda e: e.start_ns())]


class MemoryCount(TorchDispatchMode):
    """Counts the bytes of the storages made inside it that are alive.

    Works on the meta device, where nothing is allocated: the count is what a real device would
    hold, without an operator's private workspace.

    Attributes:
        alive: bytes alive now.
        peak: the largest ``alive`` so far.
    """

    def __init__(self) -> None:
        super().__init__()
        self.alive = self.peak = 0
        self._known: weakref.WeakSet = weakref.WeakSet()

    def ignore(self, *tensors: Tensor) -> None:
        """Leaves out storages that were there before."""
        for tensor in tensors:
            self._known.add(tensor.untyped_storage())

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            if isinstance(leaf, Tensor):
                self._count(leaf.untyped_storage())
        return result

    def _count(self, storage: torch.UntypedStorage) -> None:
        if storage in self._known:
            return
        self._known.add(storage)
        size = storage.nbytes()
        self.alive += size
        self.peak = max(self.peak, self.alive)
        weakref.finalize(storage, self._gone, size)

    def _gone(self, size: int) -> None:
        self.alive -= size
