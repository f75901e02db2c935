"""Every backend against brute force in float64, on every net, in every precision it has here."""

from __future__ import annotations

import parity
import pytest
import torch

import lasem_fast as lf
from bench import ceilings
from bench.gate import WrongResult
from lasem_fast.backends import triton_level
from lasem_fast.search import dispatch

BACKENDS = ("torch", "cpp", "triton")


def _needs(backend: str) -> None:
    state = lf.backends()[backend]
    if state != "available":
        pytest.skip(f"{backend}: {state}")


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("net", parity.NETS)
def test_every_net(backend, net):
    _needs(backend)
    parity.check(backend, parity.problem(net))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("layout", [name for name in parity.LAYOUTS if name != "contiguous"])
def test_every_layout(backend, layout):
    _needs(backend)
    parity.check(backend, parity.problem("pool 2", layout=layout))


@pytest.mark.parametrize("net", ["pool 2", "batch norm"])
@pytest.mark.parametrize("backend", ["torch", "cpp"])
def test_autocast_on_the_cpu(backend, net):
    _needs(backend)
    parity.check(backend, parity.problem(net, dtype="bf16"))


@pytest.mark.parametrize("net", ["pool 2", "linear"])
def test_a_wrong_backend_is_found(net, monkeypatch):
    right = dispatch.plain_torch.wide_level
    monkeypatch.setattr(
        dispatch.plain_torch,
        "wide_level",
        lambda branches, *rest: right(branches[::-1], *rest),
    )
    with pytest.raises(WrongResult):
        parity.check("torch", parity.problem(net))


@pytest.fixture
def tf32_as_it_was():
    yield
    ceilings.set_tf32(False)


@pytest.mark.gpu
@pytest.mark.usefixtures("tf32_as_it_was")
@pytest.mark.parametrize("backend", ["torch", "triton"])
@pytest.mark.parametrize("net", parity.NETS)
@pytest.mark.parametrize("dtype", ["fp32", "tf32", "bf16", "fp16"])
def test_every_net_on_the_gpu(backend, net, dtype):
    _needs(backend)
    ceilings.set_tf32(dtype == "tf32")
    parity.check(backend, parity.problem(net, dtype, "cuda"))


@pytest.mark.gpu
@pytest.mark.parametrize("backend", ["torch", "triton"])
@pytest.mark.parametrize("layout", [name for name in parity.LAYOUTS if name != "contiguous"])
def test_every_layout_on_the_gpu(backend, layout):
    _needs(backend)
    ceilings.set_tf32(False)
    parity.check(backend, parity.problem("pool 2", "fp32", "cuda", layout))


@pytest.mark.gpu
@pytest.mark.parametrize("net", ["runs of 8 channels", "residual"])
@pytest.mark.parametrize("dtype", ["bf16", "fp16"])
def test_boxes_on_the_gpu(net, dtype, monkeypatch):
    _needs("triton")
    if torch.cuda.get_device_capability() < (9, 0):
        pytest.skip("boxes need a device of compute capability 9.0")
    # what it does not take is left to PyTorch
    monkeypatch.setattr(dispatch, "_ON_GPU", (triton_level.BoxLevel(),))
    parity.check("triton", parity.problem(net, dtype, "cuda"))


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_the_same_bits_every_time(dtype):
    _needs("triton")
    ceilings.set_tf32(False)
    drawn = parity.problem("pool 2 thrice", dtype, "cuda")
    results = []
    for _ in range(3):
        torch.empty(2**20, device="cuda").fill_(torch.nan)  # what comes out of the allocator next
        runner = parity.library_column("triton").build(drawn)
        outcome = runner.step()
        results.append([*outcome, *(p.grad for p in runner.net.parameters())])
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))
