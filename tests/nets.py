"""Nets and mini-batches for tests, and hypothesis strategies that draw them."""

from __future__ import annotations

from typing import NamedTuple

import torch
from hypothesis import strategies as st
from torch import Tensor, nn

import lasem_fast as lf


class Residual(nn.Module):
    """A block that is no plain stage: two convolutions, a norm and a skip."""

    def __init__(self, channels: int, inplace: bool = False) -> None:
        super().__init__()
        self.relu = nn.ReLU(inplace=inplace)
        self.first = nn.Conv2d(channels, channels, 3, padding=1)
        self.norm = nn.GroupNorm(1, channels)
        self.second = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, h: Tensor) -> Tensor:
        return h + self.second(self.relu(self.norm(self.first(h))))


class Case(NamedTuple):
    net: lf.TransferNet
    space: lf.ConfigSpace
    x: Tensor
    y: Tensor


def small_net(depth=3, *, dtype=torch.float64, classes=3, tasks=("a",), extra=()) -> lf.TransferNet:
    """A small convolutional net; ``extra`` layers follow each stage's ReLU."""
    stages = [
        nn.Sequential(
            nn.Conv2d(2 if i == 0 else 3, 3, 3, padding=1), nn.ReLU(), *(e() for e in extra)
        )
        for i in range(depth)
    ]
    net = lf.TransferNet(stages)
    for task in tasks:
        net.add_task(task, nn.Sequential(nn.Flatten(), nn.Linear(3 * 36, classes)))
    return net.to(dtype)


def batch(samples=4, classes=3, *, dtype=torch.float64, seed=1) -> tuple[Tensor, Tensor]:
    """A mini-batch for :func:`small_net`."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(samples, 2, 6, 6, generator=generator, dtype=dtype)
    return x, torch.randint(classes, (samples,), generator=generator)


@st.composite
def _conv_stage(draw, channels: int, size: int):
    kernel = draw(st.sampled_from([k for k in (1, 3, 5) if k <= size + 2 * (k // 2)]))
    stride = draw(st.sampled_from([1, 1, 2]))
    padding = draw(st.sampled_from([0, kernel // 2]))
    out = draw(st.integers(1, 4))
    if size + 2 * padding < kernel:
        padding = kernel // 2
    layers = [nn.Conv2d(channels, out, kernel, stride, padding, bias=draw(st.booleans()))]
    layers.append(draw(st.sampled_from([nn.ReLU, nn.Tanh, nn.LeakyReLU, nn.Identity]))())
    size = (size + 2 * padding - kernel) // stride + 1
    pool = draw(st.sampled_from([1, 1, 2, 3]))
    if pool > 1 and size >= pool:
        ceil = draw(st.booleans())
        layers.append(nn.MaxPool2d(pool, ceil_mode=ceil))
        size = -(-size // pool) if ceil else size // pool
    return nn.Sequential(*layers), out, size


@st.composite
def cases(draw, max_depth: int = 6) -> Case:
    """Random nets of 1 to 6 stages: convolutions, blocks, linear stages, groups, lists."""
    torch.manual_seed(draw(st.integers(0, 2**20)))
    depth = draw(st.integers(1, max_depth))
    linear_from = draw(st.integers(1, depth + 1))
    channels, size, features = draw(st.integers(1, 3)), draw(st.integers(4, 9)), None
    shape = (channels, size, size)
    stages = []
    for i in range(depth):
        if i >= linear_from:
            before = [] if features else [nn.Flatten()]
            features = features or channels * size * size
            out = draw(st.integers(1, 5))
            stages.append(nn.Sequential(*before, nn.Linear(features, out), nn.ReLU()))
            features = out
        elif size > 1 and draw(st.integers(0, 4)) == 0:
            stages.append(Residual(channels, inplace=draw(st.booleans())))
        else:
            stage, channels, size = draw(_conv_stage(channels, size))
            stages.append(stage)
    net = lf.TransferNet(stages)
    classes = draw(st.integers(1, 4))
    net.add_task(
        "a", nn.Sequential(nn.Flatten(), nn.Linear(features or channels * size**2, classes))
    )
    samples = draw(st.integers(1, 4))
    x = torch.randn(samples, *shape, dtype=torch.float64)
    return Case(net.double(), draw(spaces(depth)), x, torch.randint(classes, (samples,)))


@st.composite
def spaces(draw, depth: int) -> lf.ConfigSpace:
    """A full space, groups, or an explicit list."""
    kind = draw(st.sampled_from(["full", "groups", "list"]))
    if kind == "full":
        return lf.ConfigSpace(depth)
    if kind == "groups":
        sizes = []
        while sum(sizes) < depth:
            sizes.append(draw(st.integers(1, depth - sum(sizes))))
        return lf.ConfigSpace(depth, groups=sizes)
    rows = draw(st.sets(st.integers(0, 2**depth - 1), min_size=1, max_size=9))
    return lf.ConfigSpace.from_configs(rows, depth=depth)
