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


def _taken(*layers: nn.Module) -> bool:
    branch = Branch(nn.Sequential(*layers))
    return winograd.winograd_level([branch, branch], torch.randn(2, 3, 9, 9), 1) is not None


@needs_kernels
def test_the_stages_that_it_takes():
    conv, relu = nn.Conv2d(3, 5, 3, padding=1), nn.ReLU()
    for layers in (
        (conv, relu),
        (conv, relu, nn.MaxPool2d(2)),
        (conv, nn.MaxPool2d(3, ceil_mode=True), relu),
        (nn.Conv2d(3, 5, 3, padding="same", bias=False), relu, nn.MaxPool2d(3, padding=1)),
        (nn.Conv2d(3, 5, 3), nn.Identity(), relu),
    ):
        assert _taken(*layers), layers


@pytest.mark.parametrize(
    "layers",
    [
        (nn.Conv2d(3, 5, 3),),
        (nn.Conv2d(3, 5, 5), nn.ReLU()),
        (nn.Conv2d(3, 5, 3, stride=2), nn.ReLU()),
        (nn.Conv2d(3, 5, 3, dilation=2), nn.ReLU()),
        (nn.Conv2d(3, 5, 3, padding=2), nn.ReLU()),
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
