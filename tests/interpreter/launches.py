"""Counts what a device would be asked to run."""

from __future__ import annotations

from collections import Counter
from contextlib import contextmanager
from unittest import mock

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from triton.runtime.interpreter import GridExecutor


class _Counted(TorchDispatchMode):
    """Counts operators that start a kernel on a device: neither views nor allocations."""

    def __init__(self) -> None:
        super().__init__()
        self.kernels: Counter[str] = Counter()
        self.grids: list[tuple[int, ...]] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        free = func.is_view or func.namespace != "aten" or "empty" in func.__name__
        if not free and func.overloadpacket is not torch.ops.aten.detach:
            self.kernels[str(func)] += 1
        return func(*args, **(kwargs or {}))


@contextmanager
def launches():
    """Counts what a device would be asked to run."""
    counted, call = _Counted(), GridExecutor.__call__

    def launch(self, *args, **kwargs):
        counted.kernels[self.fn.__name__] += 1
        counted.grids.append(self.grid)
        return call(self, *args, **kwargs)

    # deterministic algorithms would fill fresh memory, which is an operator of its own
    torch.use_deterministic_algorithms(False)
    with mock.patch.object(GridExecutor, "__call__", launch), counted:
        yield counted
