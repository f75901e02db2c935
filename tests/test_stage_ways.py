"""Which way each stage takes is told as it is: by kernels, in PyTorch and why, or both."""

from __future__ import annotations

import pytest
import torch
from nets import Residual
from torch import nn

import lasem_fast as lf
from lasem_fast.backends import plain_torch
from lasem_fast.tools.stage_ways import stage_ways

needs_kernels = pytest.mark.skipif(
    lf.backends()["cpp"] != "available", reason=f"cpp: {lf.backends()['cpp']}"
)


class Block(nn.Module):
    """A residual block as a user writes it."""

    def __init__(self, first=3):
        super().__init__()
        self.first = nn.Conv2d(4, 4, first, padding=first // 2)
        self.second = nn.Conv2d(4, 4, 3, padding=1)

    def forward(self, h):
        return torch.relu(self.second(torch.relu(self.first(h))) + h)


def _conv(*behind):
    return nn.Sequential(nn.Conv2d(4, 4, 3, padding=1), *behind)


def _net(*stages):
    net = lf.TransferNet(list(stages))
    net.add_task("a", nn.Sequential(nn.Flatten(), nn.Linear(36, 3)))
    return net


def _ways(*stages, backend="cpp", x=None):
    x = torch.randn(2, 4, 6, 6) if x is None else x
    return [way[1:] for way in stage_ways(_net(*stages), "a", backend, x)]


@needs_kernels
@pytest.mark.parametrize(
    ("stage", "way", "why"),
    [
        (_conv(nn.ReLU(), nn.MaxPool2d(2)), "kernels", ""),
        (_conv(), "kernels", ""),
        (Block(), "kernels", ""),
        (Block(first=7), "kernels and PyTorch", "first: kernel_size (7, 7): the C++ kernels have"),
        (_conv(nn.GELU()), "kernels and PyTorch", "0: GELU runs in PyTorch"),
        (Residual(4), "kernels and PyTorch", "first: GroupNorm runs in PyTorch"),
        (_conv(nn.Softmax2d()), "PyTorch", "it has a layer Softmax2d, which no kernel has"),
        (nn.Sequential(nn.Flatten(), nn.Linear(144, 5)), "PyTorch", "1: Linear is left to PyTorch"),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, nn.Module) else "",
)
def test_ways_of_one_stage(stage, way, why):
    ((found, reason),) = _ways(stage)
    assert found == way
    assert reason.startswith(why) and bool(reason) == bool(why)


@needs_kernels
def test_every_stage_has_its_number_and_its_own_input():
    stages = _conv(nn.ReLU()), nn.Sequential(nn.Flatten(), nn.Linear(144, 36)), nn.Unflatten(
        1, (4, 3, 3)), _conv(nn.ReLU())  # fmt: skip
    ways = stage_ways(_net(*stages), "a", "cpp", torch.randn(2, 4, 6, 6))
    assert [way.stage for way in ways] == [1, 2, 3, 4]
    assert [way.way for way in ways] == ["kernels", "PyTorch", "PyTorch", "kernels"]
    assert str(ways[0]) == "kernels" and str(ways[1]) == f"PyTorch ({ways[1].why})"


@needs_kernels
def test_dropout_is_in_the_way_of_the_m_step_alone():
    stage = _conv(nn.ReLU(), nn.Dropout(0.5))
    assert _ways(stage) == [
        ("E-step: kernels, M-step: PyTorch", "Dropout draws random numbers in training mode")
    ]
    assert _ways(stage.eval()) == [("kernels", "")]


@needs_kernels
def test_other_dtypes_are_told():
    ((way, why),) = _ways(_conv(nn.ReLU()).double(), x=torch.randn(2, 4, 6, 6).double())
    assert way == "PyTorch" and "the C++ kernels compute in float32" in why


@pytest.mark.parametrize("backend", ["torch", "reference"])
def test_backends_without_kernels(backend):
    assert _ways(Block(), backend=backend) == [("PyTorch", "the backend has no kernels for levels")]


@needs_kernels
def test_looking_leaves_no_trace():
    stages = _conv(nn.ReLU(inplace=True), nn.Dropout(0.5)), nn.Sequential(nn.ReLU(inplace=True))
    net, x = _net(*stages), torch.randn(2, 4, 6, 6)
    kept, modes = x.clone(), [m.training for m in net.modules()]
    before = torch.get_rng_state()
    stage_ways(net, "a", "cpp", x)
    assert torch.equal(x, kept) and torch.equal(torch.get_rng_state(), before)
    assert [m.training for m in net.modules()] == modes
    assert all(p.grad is None for p in net.parameters())


@needs_kernels
def test_what_is_told_to_take_kernels_does(monkeypatch):
    net = _net(_conv(nn.ReLU()), Block(), _conv(nn.ReLU(), nn.MaxPool2d(2)))
    x, y = torch.randn(2, 4, 6, 6), torch.tensor([0, 1])
    assert {way.way for way in stage_ways(net, "a", "cpp", x)} == {"kernels"}
    for name in ("run_level", "wide_level"):
        monkeypatch.setattr(plain_torch, name, lambda *_: pytest.fail("in PyTorch"))
    for groups in (None, (1, 2)):
        lf.LASEM(net, lf.ConfigSpace(3, groups), backend="cpp")(x, y, "a").loss.backward()
