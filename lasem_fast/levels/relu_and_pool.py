"""ReLU and max-pool behind a weighted layer, where there is nothing else behind it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from torch import nn


class Pool(NamedTuple):
    """A max-pool whose stride is its window; ``size`` 1 is none."""

    size: int = 1
    padding: int = 0
    ceil: bool = False

    def output(self, size: int) -> int:
        """The pooled size of ``size`` pixels, by PyTorch's rule."""
        span = size + 2 * self.padding - self.size
        windows = (-(-span // self.size) if self.ceil else span // self.size) + 1
        # a last window that would start in the padding behind the image is left out
        if self.ceil and (windows - 1) * self.size >= size + self.padding:
            windows -= 1
        return windows


class ReluAndPool(NamedTuple):
    """What follows a weighted layer; which of the two comes first makes no difference."""

    relu: bool
    pool: Pool


def relu_and_pool(layers: Sequence[nn.Module]) -> ReluAndPool | None:
    """What ``layers`` are together; None unless they are at most one ReLU and one max-pool."""
    layers = [layer for layer in layers if type(layer) is not nn.Identity]
    pools = [layer for layer in layers if type(layer) is nn.MaxPool2d]
    relus = [layer for layer in layers if type(layer) is nn.ReLU]
    if len(pools) > 1 or len(relus) > 1 or len(pools) + len(relus) < len(layers):
        return None
    pool = max_pool(pools[0]) if pools else Pool()
    return None if pool is None else ReluAndPool(len(relus) > 0, pool)


def max_pool(layer: nn.Module) -> Pool | None:
    """A square max-pool of 2 or 3 whose stride is its window; None for any other layer."""
    if type(layer) is not nn.MaxPool2d or layer.return_indices:
        return None

    def same(value: int | tuple[int, int]) -> int | None:
        pair = value if isinstance(value, tuple) else (value, value)
        return pair[0] if pair[0] == pair[1] else None

    size, stride, padding = same(layer.kernel_size), same(layer.stride), same(layer.padding)
    if size not in (2, 3) or stride != size or padding is None or same(layer.dilation) != 1:
        return None
    return Pool(size, padding, layer.ceil_mode)
