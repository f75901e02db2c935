"""The switch of programmatic dependent launch; what it compiles to is looked at in tests/aot."""

from __future__ import annotations

import pytest
import torch

from lasem_fast.kernels import early_launch


@pytest.fixture
def on_hopper(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    early_launch._is_wanted.cache_clear()
    yield
    early_launch._is_wanted.cache_clear()


@pytest.mark.parametrize(("value", "wanted"), [(None, False), ("0", False), ("1", True)])
def test_it_is_off_unless_asked_for(value, wanted, on_hopper, monkeypatch):
    monkeypatch.delenv("LASEM_FAST_PDL", raising=False)
    if value is not None:
        monkeypatch.setenv("LASEM_FAST_PDL", value)
    assert early_launch._is_wanted(torch.device("cuda")) is wanted


def test_another_value_is_refused(on_hopper, monkeypatch):
    monkeypatch.setenv("LASEM_FAST_PDL", "yes")
    with pytest.raises(ValueError, match="LASEM_FAST_PDL: expected 0 or 1, got 'yes'"):
        early_launch._is_wanted(torch.device("cuda"))


def test_launches_without_a_device_are_as_always():
    assert early_launch.early(torch.device("cpu")) == {"EARLY": False}
