"""Settings that all tests run under."""

from __future__ import annotations

import pytest
import torch
from isas import has

import lasem_fast as lf
from lasem_fast.backends import choices
from lasem_fast.backends import cpu_ops as ops

try:
    from hypothesis import HealthCheck, Phase, settings
except ImportError:  # the tests that need a GPU run without it
    pass
else:
    settings.register_profile(
        "lasem_fast",
        deadline=None,
        derandomize=True,
        print_blob=True,
        phases=(Phase.explicit, Phase.generate),  # shrinking a net takes minutes
        suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
    )
    settings.load_profile("lasem_fast")


def pytest_runtest_setup(item):
    if item.get_closest_marker("gpu") and not torch.cuda.is_available():
        pytest.skip("there is no CUDA device")


@pytest.fixture(autouse=True)
def _seeded(monkeypatch):
    monkeypatch.delenv("LASEM_FAST_CHOICES", raising=False)  # nothing is timed
    torch.set_num_threads(1)  # nets here are tiny; threads only wait for one another
    torch.manual_seed(0)


@pytest.fixture
def unset(tmp_path, monkeypatch):
    """The choices of a new process, whose cache is this file of the test's own."""
    (tmp_path / "cache").mkdir()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    choices.process.cache_clear()
    yield tmp_path / "cache" / "lasem_fast" / "measurements.json"
    choices.process.cache_clear()


@pytest.fixture
def measuring(unset, monkeypatch):
    """As ``unset``, of a process that measures."""
    monkeypatch.setenv("LASEM_FAST_CHOICES", "measure")
    return unset


@pytest.fixture(params=["torch", "cpp"])
def backend(request):
    """Runs the test once with each backend for a CPU that is not the reference."""
    if lf.backends()[request.param] != "available":
        pytest.skip(f"cpp: {lf.backends()[request.param]}")
    return request.param


@pytest.fixture(params=["avx2", "avx512"])
def isa(request):
    """Runs the test once with the kernels of each instruction set."""
    if not has(request.param):
        pytest.skip(f"this CPU has no {request.param}")
    ops.force_isa(request.param)
    yield request.param
    ops.force_isa(None)


@pytest.fixture(params=["by block", "by panel"])
def schedule(request):
    """Runs the test once with each schedule of a level, where the level has both."""
    ops._cpu.force_schedule(request.param)
    yield request.param
    ops._cpu.force_schedule("")
