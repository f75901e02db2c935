"""Outputs hold NaN, or the largest integer, until a kernel writes them."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest
import torch

from lasem_fast.kernels.kept import forget

if os.environ.get("TRITON_INTERPRET") == "1":
    raise pytest.UsageError("tests/ptx: expected an environment without TRITON_INTERPRET")

# the launches that are compiled ahead of time, and levels with their truth
for neighbour in ("aot", "interpreter"):
    sys.path.append(str(Path(__file__).parent.parent / neighbour))


@pytest.fixture(autouse=True)
def _poisoned():
    torch.use_deterministic_algorithms(True)
    forget()  # tests change what launches are made of
    try:
        yield
    finally:
        forget()
        torch.use_deterministic_algorithms(False)
