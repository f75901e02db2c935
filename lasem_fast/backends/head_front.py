"""The front of a head, flatten, dropout and linear layer, on leaves as they lie: channels last."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from lasem_fast.levels.fold import Fold, RowsFirst
from lasem_fast.networks.layers import (
    any_uses_batch_statistics,
    does_nothing,
    flattens_samples,
    is_patched,
    modules_in,
)


class HeadFront(NamedTuple):
    """What a head begins with.

    Attributes:
        data: the leaves ``[P, N, H, W, C]``.
        drop: probability of the dropout before the linear layer; 0 without.
        linear: the layer that reads the leaves, flattened with channels outermost.
        behind: the layers that follow.
    """

    data: Tensor
    drop: float
    linear: nn.Linear
    behind: Sequence[nn.Module]

    def images(self) -> Tensor:
        """What the dropout leaves of ``data``, ``[P * N, S, C]`` with S pixels; not scaled."""
        data = _dropped(self.data, self.drop) if self.drop else self.data
        return data.flatten(2, 3).flatten(0, 1)

    def weight(self) -> Tensor:
        """The linear layer's, with the scale that belongs to the dropout."""
        return self.linear.weight / (1 - self.drop) if self.drop else self.linear.weight

    def go_on(self, h: Tensor) -> Tensor:
        """The layers behind the linear one."""
        for layer in self.behind:
            h = layer(h)
        return h


def head_front(head: nn.Module, h: Fold, rows: int) -> HeadFront | None:
    """The front of a head on its leaves.

    Args:
        head: a task's head.
        h: the leaves, images with rows outermost and channels last.
        rows: number of leaves P.

    Returns:
        None for any other head or form, with batch norm in training mode behind the linear layer,
        and where the weight is larger than the leaves: then putting it into their order costs too
        much.
    """
    if not isinstance(h, RowsFirst) or h.data.dim() != 5:
        return None
    if type(head) is not nn.Sequential or is_patched(head):
        return None
    layers = [layer for layer in head if is_patched(layer) or not does_nothing(layer)]
    if not layers or not flattens_samples(layers[0]) or is_patched(layers[0]):
        return None
    dropout = layers.pop(1) if len(layers) > 1 and type(layers[1]) is nn.Dropout else None
    if len(layers) < 2 or type(layers[1]) is not nn.Linear or is_patched(layers[1]):
        return None
    linear, (samples, height, width, channels) = layers[1], h.data.shape[1:]
    if linear.in_features != height * width * channels or linear.out_features > rows * samples:
        return None
    if any_uses_batch_statistics(modules_in(*layers[2:])):
        return None  # it sees samples outermost
    if dropout is not None and not _draws_alike(dropout, h.data):
        return None
    return HeadFront(h.data, 0.0 if dropout is None else dropout.p, linear, layers[2:])


def _draws_alike(dropout: nn.Dropout, data: Tensor) -> bool:
    """Whether PyTorch draws the dropout's mask from the same numbers as :func:`_dropped`."""
    return data.device.type == "cpu" and dropout.p < 1 and not is_patched(dropout)


def _dropped(data: Tensor, p: float) -> Tensor:
    """What PyTorch's dropout of the folded batch, samples outermost, leaves; not scaled."""
    rows, samples, height, width, channels = data.shape
    size = samples, rows, channels, height, width
    kept = torch.empty(size, dtype=torch.bool, device=data.device).bernoulli_(1 - p)
    dropped = kept.logical_not_().permute(1, 0, 3, 4, 2).contiguous()
    # filled, not multiplied: what overflowed and is dropped is 0
    return data.masked_fill(dropped, 0)
