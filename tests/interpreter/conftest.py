"""Every kernel here runs sanitised, on memory that is poisoned before it is written."""

from __future__ import annotations

import os

import pytest
import torch

if os.environ.get("TRITON_INTERPRET") != "1":
    raise pytest.UsageError("tests/interpreter: expected TRITON_INTERPRET=1 in the environment")

from sanitiser import sanitised

from lasem_fast.kernels.kept import forget


@pytest.fixture(autouse=True)
def _sanitised():
    """Memory from ``torch.empty`` holds NaN, or the largest integer, until it is written."""
    torch.use_deterministic_algorithms(True)
    forget()  # tests change what launches are made of
    try:
        with sanitised():
            yield
    finally:
        forget()
        torch.use_deterministic_algorithms(False)
