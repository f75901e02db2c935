"""Which backend is taken, why another one cannot be, and what is imported for that."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch

import lasem_fast as lf
from lasem_fast.backends.triton_level import is_for_pytorch
from lasem_fast.kernels.level_geometry import Geometry

without_gpu = pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")


def _python(code: str) -> str:
    command = [sys.executable, "-c", code]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()


def test_triton_is_not_imported_with_the_package():
    code = "import sys, lasem_fast as lf; lf.backends(); print('triton' in sys.modules)"
    assert _python(code) == "False"


def test_the_package_works_without_triton():
    code = (
        "import sys; sys.modules['triton'] = None\n"
        "import lasem_fast as lf; print(lf.backends()['triton'])"
    )
    assert _python(code) == "not available: triton is not installed"


@without_gpu
def test_without_a_device_triton_says_why_it_cannot_run():
    assert lf.backends()["triton"] == "not available: there is no CUDA device"
    net = lf.TransferNet([torch.nn.Linear(2, 2)])
    with pytest.raises(RuntimeError, match="backend 'triton': not available: there is no CUDA"):
        lf.LASEM(net, backend="triton")
    assert lf.LASEM(net).backend != "triton"


def test_only_what_exists_is_listed():
    assert set(lf.backends()) == {"reference", "torch", "cpp", "triton"}
    net = lf.TransferNet([torch.nn.Linear(2, 2)])
    with pytest.raises(ValueError, match=r"backend: expected one of .*got 'cuda'; 'triton' is"):
        lf.LASEM(net, backend="cuda")


@pytest.mark.parametrize(
    ("tf32", "samples", "side", "left"),
    [(True, 10, 32, True), (True, 1, 8, False), (False, 1, 32, True), (False, 100, 8, False)],
)
def test_products_of_32_bits_that_are_left_to_pytorch_on_a_gpu(tf32, samples, side, left):
    """Large ones in TF32; in float32 those of larger images."""
    geometry = Geometry(1, 1, 1, 1, side, side, 1, 0, side, side, 1)
    settings = torch.backends.cudnn.conv
    before = settings.fp32_precision
    try:
        settings.fp32_precision = "tf32" if tf32 else "ieee"
        shapes = (4, samples, side, side, 64), (128, 64, 3, 3)
        assert is_for_pytorch(*shapes, geometry) == left
    finally:
        settings.fp32_precision = before
