"""A layer at which a skip begins, passes or ends, for nets whose skips span several stages."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class SkipLayer(nn.Module):
    """A layer at which a skip begins, passes or ends.

    A stage has one tensor in and one out, so a skip on its way travels behind the activation's
    channels of that tensor: ``[N, C + C_skip, H, W]``. Pooling applies to both. The layer's own
    input is the first ``conv.in_channels`` channels.

    Args:
        conv: the layer's convolution.
        pool: the layer's pooling, or ``nn.Identity()``.
        begins: the layer's input is the skip; otherwise the skip comes in with the input.
        ends: the skip is added behind the ReLU, before the pooling; otherwise it goes on.
    """

    def __init__(
        self, conv: nn.Conv2d, pool: nn.Module, *, begins: bool = False, ends: bool = False
    ) -> None:
        super().__init__()
        if not isinstance(conv, nn.Conv2d):
            raise TypeError(f"conv: expected an nn.Conv2d, got {type(conv).__name__}")
        if not isinstance(pool, nn.Module):
            raise TypeError(f"pool: expected an nn.Module, got {type(pool).__name__}")
        self.conv = conv
        self.pool = pool
        self.begins = begins
        self.ends = ends

    def forward(self, h: Tensor) -> Tensor:
        if self.begins:
            own, skip = h, h
        else:
            own, skip = h[:, : self.conv.in_channels], h[:, self.conv.in_channels :]
        out = self.conv(own).relu()
        if self.ends:
            return self.pool(out + skip)
        return torch.cat([self.pool(out), self.pool(skip)], dim=1)
