"""Settings that all tests run under."""

from __future__ import annotations

import pytest
import torch
from hypothesis import HealthCheck, Phase, settings

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
def _seeded(monkeypatch):
    monkeypatch.setenv("LASEM_FAST_CHOICES", "first")  # no test depends on what was faster
    torch.set_num_threads(1)  # nets here are tiny; threads only wait for one another
    torch.manual_seed(0)
