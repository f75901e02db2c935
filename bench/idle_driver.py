"""Triton without a GPU: kernels are compiled and looked up as on one, and launches do nothing."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import torch
from triton.backends.compiler import GPUTarget
from triton.runtime.driver import driver

from lasem_fast.kernels.kept import forget

Launched = Callable[[Any, tuple[int, int, int], tuple[Any, ...]], None]
"""``(metadata, grid, arguments)``, constants included."""

# Triton keeps what it has compiled by the device's number.
_NO_DEVICE = 10**6


@contextmanager
def idle_driver(launched: Launched | None = None) -> Iterator[None]:
    """Kernels are compiled for sm_90 in here, and not run.

    Args:
        launched: called in place of every launch.
    """
    idle = _Driver(launched or (lambda *_: None))
    forget()
    try:
        with mock.patch.object(driver, "_active", idle):
            yield
    finally:
        forget()  # kernels that were found in here


class _Driver:
    """What Triton asks of a driver."""

    def __init__(self, launched: Launched) -> None:
        self.utils = _Utilities()

        def launcher(source: Any, metadata: Any) -> Callable[..., None]:
            def launch(x, y, z, stream, function, packed, metadata_of_launch, enter, leave, *given):
                launched(metadata, (x, y, z), given)

            return launch

        self.launcher_cls = launcher

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", 90, 32)

    def get_current_device(self) -> int:
        return _NO_DEVICE

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_active_torch_device(self) -> torch.device:
        return torch.device("cpu")


class _Utilities:
    def get_device_properties(self, device: int) -> dict[str, int]:
        return {"max_shared_mem": 232448}

    def load_binary(self, *arguments: Any) -> tuple[int, ...]:
        """Module, function, registers, spills and the most threads of a block."""
        return 1, 2, 0, 0, 1024
