"""Drawn levels, and what PyTorch makes of them in float64."""

from __future__ import annotations

import random
from dataclasses import replace
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from lasem_fast.kernels.level_geometry import Geometry, output_shape
from lasem_fast.kernels.level_rows import Rows, Tables, tables_of


class Case(NamedTuple):
    """A level with small integers for values: every sum is exact, and windows are full of ties."""

    x: Tensor
    weights: list[Tensor]
    biases: list[Tensor]
    geometry: Geometry
    ceil: bool
    dtype: torch.dtype
    rows: Rows
    skip: Tensor | None = None
    live: Tensor | None = None

    @property
    def tables(self) -> Tables:
        return tables_of(self.rows, len(self.weights), self.x.device)

    @property
    def leaves(self) -> list[Tensor]:
        """What gets a gradient: input, weights, biases and the skip, if there is one."""
        skips = [] if self.skip is None else [self.skip]
        return [self.x, *self.weights, *self.biases, *skips]

    def with_leaves(self, leaves: list[Tensor]) -> Case:
        """The same level with other values."""
        ends = len(self.weights) + 1, len(self.weights) + len(self.biases) + 1
        skip = leaves[-1] if self.skip is not None else None
        return self._replace(
            x=leaves[0], weights=leaves[1 : ends[0]], biases=leaves[ends[0] : ends[1]], skip=skip
        )

    def with_values(self, draw) -> Case:
        """The same level with values ``draw(shape)``."""
        return self.with_leaves([draw(tuple(t.shape)) for t in self.leaves])

    def gradient(self) -> Tensor:
        """A drawn gradient of the output."""
        return integers(*output_shape(len(self.rows), self.x, self.weights, self.geometry))


def integers(*shape: int) -> Tensor:
    return torch.randint(-2, 3, shape).double()


def permuted(tensor: Tensor, pick: random.Random) -> Tensor:
    """The same values with dimensions laid out in another order."""
    order = pick.sample(range(tensor.dim()), tensor.dim())
    back = [order.index(i) for i in range(tensor.dim())]
    return tensor.permute(order).contiguous().permute(back)


def draw(seed: int, dtype: torch.dtype = torch.float32) -> Case:
    """Ragged sizes, odd and even kernels, strides, clipped and padded pools, linear layers."""
    pick = random.Random(seed)
    torch.manual_seed(seed)
    branches = pick.randint(1, 2)
    kernel = pick.choice([(1, 1), (3, 3), (3, 3), (2, 3), (5, 4), (1, 7), (11, 2)])
    channels = pick.choice([1, 2, 3, 5, 16, 17] if kernel[0] < 4 else [1, 3])
    out = pick.choice([1, 3, 4, 16, 19] if kernel[0] < 4 else [1, 4])
    pool = pick.choice([1, 1, 2, 3])
    pool_pad, ceil = pick.randint(0, pool // 2), pick.random() < 0.5
    if pick.random() < 0.2:
        size, stride, pad, pool, pool_pad = kernel, (1, 1), (0, 0), 1, 0
    else:
        stride = pick.choice([(1, 1), (1, 1), (2, 2), (2, 1), (1, 3)])
        pad = tuple(pick.randint(0, k) for k in kernel)
        least = [
            max(1, k + s * (pool - 1) - 2 * p) for k, s, p in zip(kernel, stride, pad, strict=True)
        ]
        size = tuple(n + pick.randint(0, 3) for n in least)
    conv = [(n + 2 * p - k) // s + 1 for n, p, k, s in zip(size, pad, kernel, stride, strict=True)]
    pooled = F.max_pool2d(torch.zeros(1, *conv), pool, padding=pool_pad, ceil_mode=ceil)
    geometry = Geometry(
        *stride, *pad, *conv, pool, pool_pad, *pooled.shape[1:], int(pick.random() < 0.7)
    )
    samples = pick.randint(1, 3)
    rows = draw_rows(pick, branches)
    x = permuted(integers(rows.width, samples, *size, channels), pick)
    weights = [integers(out, channels, *kernel) for _ in range(branches)]
    if pick.random() < 0.5:
        weights = [w.contiguous(memory_format=torch.channels_last) for w in weights]
    elif pick.random() < 0.3:
        weights = [permuted(w, pick) for w in weights]
    biases = [integers(out) for _ in range(branches)] if pick.random() < 0.8 else []
    case = Case(x, weights, biases, geometry, ceil, dtype, rows)
    if pick.random() < 0.5:
        case = with_skip(case, pick)
    if pick.random() < 0.4:
        case = case._replace(live=torch.tensor([pick.random() < 0.5 for _ in rows.parents]))
    return case


def draw_boxes(seed: int, dtype: torch.dtype) -> Case:
    """As :func:`draw`, of what boxes can read: stride 1, channels in runs of 8, no linear layer."""
    pick = random.Random(seed)
    torch.manual_seed(seed)
    branches, kernel = pick.randint(1, 2), pick.choice([(1, 1), (3, 3), (3, 3), (2, 3), (5, 4)])
    channels, out = pick.choice([8, 16, 24]), pick.choice([8, 16, 24])
    pool, ceil = pick.choice([1, 2, 2, 3]), pick.random() < 0.5
    pad, pool_pad = tuple(pick.randint(0, k) for k in kernel), pick.randint(0, pool // 2)
    size = [
        max(1, k + pool - 1 - 2 * p) + pick.randint(0, 4) for k, p in zip(kernel, pad, strict=True)
    ]
    conv = [n + 2 * p - k + 1 for n, p, k in zip(size, pad, kernel, strict=True)]
    pooled = F.max_pool2d(torch.zeros(1, *conv), pool, padding=pool_pad, ceil_mode=ceil)
    geometry = Geometry(1, 1, *pad, *conv, pool, pool_pad, *pooled.shape[1:], pick.randint(0, 1))
    rows = draw_rows(pick, branches)
    x = integers(rows.width, pick.randint(1, 3), *size, channels)
    weights = [permuted(integers(out, channels, *kernel), pick) for _ in range(branches)]
    biases = [integers(out) for _ in range(branches)] if pick.random() < 0.8 else []
    case = Case(x, weights, biases, geometry, ceil, dtype, rows)
    if pick.random() < 0.5 and pool < 3:
        case = with_skip(case, pick)
    if pick.random() < 0.4:
        case = case._replace(live=torch.tensor([pick.random() < 0.5 for _ in rows.parents]))
    return case


def draw_rows(pick: random.Random, branches: int) -> Rows:
    """All rows of a level, or some of them in any order."""
    if pick.random() < 0.3:
        return Rows.full(pick.randint(1, 2), branches)
    width = pick.randint(1, 4)
    pairs = [(p, b) for p in range(width) for b in range(branches)]
    parents, taken = zip(*pick.sample(pairs, pick.randint(1, min(4, len(pairs)))), strict=True)
    return Rows(parents, taken, width)


def with_skip(case: Case, pick: random.Random) -> Case:
    """The level with a skip, of which rows may share a row and some rows are used by none."""
    count, g = len(case.rows), case.geometry
    skips, width = tuple(range(count)), count
    if pick.random() < 0.7:
        width = pick.randint(1, 3)
        skips = tuple(pick.randrange(width) for _ in range(count))
    shape = (width, case.x.shape[1], g.conv_h, g.conv_w, case.weights[0].shape[0])
    return case._replace(
        skip=permuted(integers(*shape), pick),
        geometry=g._replace(relu_after=pick.randint(0, 1)),
        rows=replace(case.rows, skips=skips, skip_width=width),
    )


def usual() -> Case:
    """Both branches with biases, ReLU and a padded pool of 2, 3 x 3 taps, ragged channels."""
    torch.manual_seed(0)
    geometry = Geometry(1, 1, 1, 1, 3, 4, 2, 1, 2, 3, 1)
    weights = [integers(9, 17, 3, 3).contiguous(memory_format=torch.channels_last) for _ in "ab"]
    x, biases = integers(2, 1, 3, 4, 17), [integers(9) for _ in "ab"]
    return Case(x, weights, biases, geometry, False, torch.float32, Rows.full(2, 2))


def listed() -> Case:
    """The usual level with rows left out, some not live, and a skip that rows share."""
    case = usual()
    rows = Rows((2, 0, 2, 3), (1, 0, 0, 1), 4, (1, 0, 1, 2), 4)
    return case._replace(
        x=integers(4, 1, 3, 4, 17), rows=rows, skip=integers(4, 1, 3, 4, 9),
        live=torch.tensor([True, False, True, True]),
    )  # fmt: skip


def reference(case: Case) -> Tensor:
    """``[R, N, out_h, out_w, Co]`` through PyTorch, one row after another."""
    g = case.geometry
    out = []
    for i, (parent, branch) in enumerate(zip(case.rows.parents, case.rows.branches, strict=True)):
        bias = case.biases[branch] if case.biases else None
        z = F.conv2d(
            case.x[parent].permute(0, 3, 1, 2), case.weights[branch], bias,
            (g.stride_h, g.stride_w), padding=(g.pad_h, g.pad_w),
        )  # fmt: skip
        z = z.relu() if g.relu else z
        if case.skip is not None:
            z = z + case.skip[case.rows.skips[i]].permute(0, 3, 1, 2)
        z = z.relu() if g.relu_after else z
        if g.pool > 1:
            z = F.max_pool2d(z, g.pool, padding=g.pool_pad, ceil_mode=case.ceil)
        out.append(z.permute(0, 2, 3, 1))
    return torch.stack(out)


class Truth(NamedTuple):
    y: Tensor
    dx: Tensor
    dweights: tuple[Tensor, ...]
    dbiases: tuple[Tensor, ...]
    dskip: tuple[Tensor, ...]


def truth(case: Case, dy: Tensor, dtype: torch.dtype = torch.float64) -> Truth:
    """Output and gradients by autograd in ``dtype``; rows that are not live send nothing."""
    leaves = [t.detach().to(dtype).requires_grad_() for t in case.leaves]
    y = reference(case.with_leaves(leaves))
    dy = dy.to(dtype)
    if case.live is not None:
        dy = dy.where(case.live.view(-1, 1, 1, 1, 1), 0)
    dx, *rest = torch.autograd.grad(y, leaves, dy, materialize_grads=True)
    branches, biases = len(case.weights), len(case.biases)
    ends = branches, branches + biases
    return Truth(y.detach(), dx, tuple(rest[: ends[0]]), tuple(rest[ends[0] : ends[1]]),
                 tuple(rest[ends[1] :]))  # fmt: skip
