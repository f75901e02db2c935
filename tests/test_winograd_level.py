"""The `cpp` backend inside the tree: which stages it takes, and the sizes and layouts it gives."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

import lasem_fast as lf
from lasem_fast.backends import winograd
from lasem_fast.fold import RowsFirst
from lasem_fast.relu_and_pool import Pool
from lasem_fast.transfer import Branch

needs_kernels = pytest.mark.skipif(
    lf.backends()["cpp"] != "available", reason=f"cpp: {lf.backends()['cpp']}"
)


def _images(channels: int) -> torch.Tensor:
    return torch.randn(2, channels, 9, 9)


def _output(way, x: torch.Tensor, stage: nn.Module) -> torch.Tensor | None:
    out = way([Branch(stage)] * 2, x, 1)
    return None if out is None else out.folded()


def _taken(*layers: nn.Module, way=winograd.winograd_level) -> bool:
    channels = next(layer.in_channels for layer in layers if type(layer) is nn.Conv2d)
    return _output(way, _images(channels), nn.Sequential(*layers)) is not None


@needs_kernels
def test_the_stages_that_it_takes():
    conv, relu = nn.Conv2d(3, 5, 3, padding=1), nn.ReLU()
    for layers in (
        (conv, relu),
        (conv, relu, nn.MaxPool2d(2)),
        (conv, nn.MaxPool2d(3, ceil_mode=True), relu),
        (nn.Conv2d(3, 5, 3, padding="same", bias=False), relu, nn.MaxPool2d(3, padding=1)),
        (nn.Conv2d(3, 5, 3), nn.Identity(), relu),
        (nn.Conv2d(3, 5, 3, padding=2), relu),
    ):
        assert _taken(*layers), layers
        assert not _taken(*layers, way=winograd.large_filter_level), layers


@needs_kernels
@pytest.mark.parametrize("padding", [0, 1, 2, 4, "same", "valid"])
@pytest.mark.parametrize(
    "pool", [nn.Identity(), nn.MaxPool2d(2), nn.MaxPool2d(3, padding=1, ceil_mode=True)]
)
def test_stages_of_5x5_filters(padding, pool):
    torch.manual_seed(0)
    stage, x = nn.Sequential(nn.Conv2d(6, 5, 5, padding=padding), nn.ReLU(), pool), _images(6)
    assert not _taken(*stage)
    got = _output(winograd.large_filter_level, x, stage)
    plain = stage(x).repeat_interleave(2, dim=0)
    exact = stage.double()(x.double()).repeat_interleave(2, dim=0)
    # k = 4: what the outputs of the kernel are held to
    assert got.shape == exact.shape
    assert (got - exact).norm() <= 4 * (plain - exact).norm()


@pytest.mark.parametrize(
    "conv",
    [
        nn.Conv2d(6, 5, 3),
        nn.Conv2d(6, 5, 7),
        nn.Conv2d(6, 5, (5, 3)),
        nn.Conv2d(6, 5, 5, stride=2),
        nn.Conv2d(6, 5, 5, dilation=2),
        nn.Conv2d(6, 5, 5, padding=5),
        nn.Conv2d(6, 5, 5, padding=(1, 2)),
        nn.Conv2d(6, 5, 5, padding=2, padding_mode="reflect"),
    ],
)
def test_other_filters_are_left_to_pytorch(conv):
    assert not _taken(conv, nn.ReLU(), way=winograd.large_filter_level)


@pytest.mark.parametrize(
    "layers",
    [
        (nn.Conv2d(3, 5, 3),),
        (nn.Conv2d(3, 5, 5), nn.ReLU()),
        (nn.Conv2d(3, 5, 3, stride=2), nn.ReLU()),
        (nn.Conv2d(3, 5, 3, dilation=2), nn.ReLU()),
        (nn.Conv2d(3, 5, 3, padding=3), nn.ReLU()),
        (nn.Conv2d(3, 5, 3, padding=(0, 1)), nn.ReLU()),
        (nn.Conv2d(3, 5, 3, padding=1, padding_mode="circular"), nn.ReLU()),
        (nn.Conv2d(3, 5, 3), nn.Tanh()),
        (nn.Conv2d(3, 5, 3), nn.ReLU(), nn.AvgPool2d(2)),
        (nn.Conv2d(3, 5, 3), nn.ReLU(), nn.MaxPool2d(3, stride=2)),
        (nn.Conv2d(3, 5, 3), nn.ReLU(), nn.MaxPool2d(4)),
        (nn.Conv2d(3, 5, 3), nn.ReLU(), nn.MaxPool2d((2, 1))),
        (nn.Conv2d(3, 5, 3), nn.ReLU(), nn.ReLU()),
        (nn.Conv2d(3, 5, 3).double(), nn.ReLU()),
        (nn.AvgPool2d(2), nn.Conv2d(3, 5, 3), nn.ReLU()),
    ],
)
def test_other_stages_are_left_to_pytorch(layers):
    assert not _taken(*layers)


@needs_kernels
def test_autocast_and_other_dtypes_are_left_to_pytorch():
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert not _taken(nn.Conv2d(3, 5, 3), nn.ReLU())


@given(st.integers(3, 14), st.sampled_from([2, 3]), st.integers(0, 1), st.booleans())
def test_pooled_sizes_are_pytorchs(size, window, padding, ceil):
    pool = Pool(window, padding, ceil)
    layer = nn.MaxPool2d(window, padding=padding, ceil_mode=ceil)
    assert pool.output(size) == layer(torch.zeros(1, 1, size, size)).shape[-1]


@given(st.integers(1, 3), st.integers(1, 3), st.integers(1, 4))
def test_rows_first_and_folded_are_the_same_rows(samples, rows, channels):
    h = torch.randn(samples * rows, channels, 2, 3)
    assert torch.equal(RowsFirst.of(h, rows).folded(), h)


@needs_kernels
@pytest.mark.parametrize(
    ("filter_size", "side", "pool", "way"),
    [
        (3, 9, 3, winograd.small_tile_level),  # 9 tiles of 25 products; of F(4x4), 9 of 36
        (3, 8, 3, winograd.winograd_level),  # 9 of 25 against 4 of 36
        (3, 9, 2, winograd.winograd_level),  # the small tile is for pools of 3
        (3, 3, 1, winograd.winograd_level),  # 36 products against 81
        (3, 2, 1, None),  # 36 against 36: a direct convolution is no dearer
        (3, 1, 1, None),
        (5, 2, 1, winograd.large_filter_level),
        (5, 1, 1, None),  # 36 against 25
    ],
)
def test_the_rule_takes_the_way_of_fewest_products(filter_size, side, pool, way):
    conv = nn.Conv2d(2, 3, filter_size, padding="same")
    pools = [nn.MaxPool2d(pool, ceil_mode=True)] if pool > 1 else []
    stage, x = nn.Sequential(conv, nn.ReLU(), *pools), torch.randn(4, 2, side, side)
    branches = [Branch(stage), Branch(stage)]
    for h in (x, RowsFirst.of(x, 2)):
        got = winograd.thrifty_level(branches, h, 2)
        if way is None:
            assert got is None
        else:
            assert torch.equal(got.data, way(branches, h, 2).data)


def test_the_rule_leaves_what_is_no_convolution():
    assert winograd.thrifty_level([Branch(nn.Linear(4, 4))] * 2, torch.randn(4, 4), 1) is None
    conv = nn.Sequential(nn.Conv2d(2, 3, 3, stride=2, padding=1), nn.ReLU())
    assert winograd.thrifty_level([Branch(conv)] * 2, _images(2), 1) is None


@pytest.mark.parametrize("net_layout", [torch.contiguous_format, torch.channels_last])
def test_layouts_of_weights_labels_and_bias_are_taken_as_they_come(net_layout):
    conv = lambda i: nn.Sequential(nn.Conv2d(i, 8, 3, padding=1), nn.ReLU())  # noqa: E731
    net = lf.TransferNet([conv(3), conv(8)])
    net.add_task("a", nn.Sequential(nn.Flatten(), nn.Linear(8 * 36, 4)))
    net.heads["a"][1].bias = nn.Parameter(torch.zeros(8)[::2])
    net = net.to(memory_format=net_layout)
    x = torch.randn(5, 3, 6, 6).contiguous(memory_format=net_layout)
    y = torch.randint(4, (10,))[::2]
    steps = []
    for backend in ("cpp", "torch"):
        net.zero_grad()
        step = lf.LASEM(net, backend=backend)(x, y, "a")
        step.loss.backward()
        steps.append([step.loss.detach(), *(p.grad for p in net.parameters())])
    for got, want in zip(*steps, strict=True):
        torch.testing.assert_close(got, want)
