"""The `cpp` backend: the linear layer at the front of a head, on channels-last images."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from lasem_fast.backends import cpu_ops
from lasem_fast.levels.fold import Fold, RowsFirst
from lasem_fast.networks.layers import flatten_then_linear


def linear_head(head: nn.Module, h: Fold, rows: int) -> Tensor | None:
    """A head that flattens images and goes on with a linear layer, in float32 on the CPU.

    Args:
        head: a task's head.
        h: the leaves, images with rows outermost and channels last.
        rows: number of leaves P.

    Returns:
        The logits ``[P * N, K]``, rows outermost; None for any other head, form, device or dtype,
        and where the weight is the larger one: then putting it into order costs too much.
    """
    if not isinstance(h, RowsFirst) or h.data.dim() != 5 or not flatten_then_linear(head):
        return None
    x, linear = h.data.flatten(2, 3).flatten(0, 1), head[1]
    weight, bias = linear.weight, linear.bias
    if linear.in_features != x.shape[1] * x.shape[2] or linear.out_features > x.shape[0]:
        return None
    if torch.is_autocast_enabled("cpu"):
        return None
    if any(t.device.type != "cpu" or t.dtype != torch.float32 for t in (x, weight)):
        return None
    if bias is None:
        bias = weight.new_zeros(linear.out_features)
    logits = cpu_ops.channels_last_linear(x.contiguous(), weight.contiguous(), bias.contiguous())
    return head[2:](logits)
