"""Kernels as they are compiled for tensors whose offsets pass 32 bits, on tensors of any size."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from unittest import mock

from lasem_fast.kernels.launches import Launch


@contextmanager
def wide_offsets() -> Iterator[None]:
    """Launches in here count with 64 bits."""
    narrow = Launch.__call__

    def wide(launch, *tensors):
        constants = launch._constants
        if "WIDE" not in constants:
            return narrow(launch, *tensors)
        with mock.patch.object(launch, "_constants", {**constants, "WIDE": True}):
            return narrow(launch, *tensors)

    with mock.patch.object(Launch, "__call__", wide):
        yield
