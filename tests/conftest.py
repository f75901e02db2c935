"""Settings that all tests run under."""

from __future__ import annotations

import pytest
import torch
from hypothesis import HealthCheck, Phase, settings
from isas import has

from lasem_fast import _ops as ops

settings.register_profile(
    "lasem_fast",
    deadline=None,
    derandomize=True,
    print_blob=True,
    phases=(Phase.explicit, Phase.generate),  # shrinking a net takes minutes
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
)
settings.load_profile("lasem_fast")


@pytest.fixture(autouse=True)
def _seeded():
    torch.set_num_threads(1)  # nets here are tiny; threads only wait for one another
    torch.manual_seed(0)


@pytest.fixture(params=["avx2", "avx512"])
def isa(request):
    """Runs the test once with the kernels of each instruction set."""
    if not has(request.param):
        pytest.skip(f"this CPU has no {request.param}")
    ops.force_isa(request.param)
    yield request.param
    ops.force_isa(None)
