"""Drawn levels, and what PyTorch makes of them in float64."""

from __future__ import annotations

import random
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from lasem_fast.kernels.level_geometry import Geometry


class Case(NamedTuple):
    """A level with small integers for values: every sum is exact, and windows are full of ties."""

    x: Tensor
    weights: list[Tensor]
    biases: list[Tensor]
    geometry: Geometry
    ceil: bool
    dtype: torch.dtype

    def with_values(self, draw) -> Case:
        """The same level with other values, ``draw(shape)``."""
        tensors = [draw(tuple(t.shape)) for t in (self.x, *self.weights, *self.biases)]
        branches = len(self.weights)
        weights, biases = tensors[1 : branches + 1], tensors[branches + 1 :]
        return self._replace(x=tensors[0], weights=weights, biases=biases)


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
    x = permuted(integers(pick.randint(1, 2), pick.randint(1, 3), *size, channels), pick)
    weights = [integers(out, channels, *kernel) for _ in range(branches)]
    if pick.random() < 0.5:
        weights = [w.contiguous(memory_format=torch.channels_last) for w in weights]
    elif pick.random() < 0.3:
        weights = [permuted(w, pick) for w in weights]
    biases = [integers(out) for _ in range(branches)] if pick.random() < 0.8 else []
    return Case(x, weights, biases, geometry, ceil, dtype)


def usual() -> Case:
    """Both branches with biases, ReLU and a padded pool of 2, 3 x 3 taps, ragged channels."""
    torch.manual_seed(0)
    geometry = Geometry(1, 1, 1, 1, 3, 4, 2, 1, 2, 3, 1)
    weights = [integers(9, 17, 3, 3).contiguous(memory_format=torch.channels_last) for _ in "ab"]
    x, biases = integers(2, 1, 3, 4, 17), [integers(9) for _ in "ab"]
    return Case(x, weights, biases, geometry, False, torch.float32)


def reference(case: Case, x: Tensor, weights: list[Tensor], biases: list[Tensor]) -> Tensor:
    """``[P, B, N, out_h, out_w, Co]`` through PyTorch's convolution, ReLU and pool."""
    g = case.geometry
    bias = torch.cat(biases) if biases else None
    images = x.flatten(0, 1).permute(0, 3, 1, 2)
    z = F.conv2d(
        images, torch.cat(weights), bias, (g.stride_h, g.stride_w), padding=(g.pad_h, g.pad_w)
    )
    z = z.relu() if g.relu else z
    z = F.max_pool2d(z, g.pool, padding=g.pool_pad, ceil_mode=case.ceil) if g.pool > 1 else z
    return z.reshape(*x.shape[:2], len(weights), -1, *z.shape[2:]).permute(0, 2, 1, 4, 5, 3)


class Truth(NamedTuple):
    y: Tensor
    dx: Tensor
    dweights: tuple[Tensor, ...]
    dbiases: tuple[Tensor, ...]


def truth(case: Case, dy: Tensor, dtype: torch.dtype = torch.float64) -> Truth:
    """Output and gradients by autograd in ``dtype``."""
    leaves = [t.detach().to(dtype).requires_grad_() for t in (case.x, *case.weights, *case.biases)]
    branches = len(case.weights)
    weights, biases = leaves[1 : branches + 1], leaves[branches + 1 :]
    y = reference(case, leaves[0], weights, biases)
    dx, *rest = torch.autograd.grad(y, leaves, dy.to(dtype))
    return Truth(y.detach(), dx, tuple(rest[:branches]), tuple(rest[branches:]))
