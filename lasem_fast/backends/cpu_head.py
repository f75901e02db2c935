"""The `cpp` backend: the linear layer at the front of a head, on channels-last images."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from lasem_fast.backends import cpu_ops
from lasem_fast.backends.head_front import head_front
from lasem_fast.levels.fold import Fold, in_order


def linear_head(
    head: nn.Module, h: Fold, rows: int, order: Sequence[int] | None = None
) -> Tensor | None:
    """A head that flattens images, may drop from them and goes on with a linear layer, in float32.

    Args:
        head: a task's head.
        h: the leaves, images with rows outermost and channels last.
        rows: number of leaves P.
        order: for each row of the result, its leaf, in the order that masks are drawn in; None: as
            they are.

    Returns:
        The logits ``[P * N, K]``, rows outermost; None for any other head, form, device or dtype,
        and where the weight is the larger one: then putting it into order costs too much.
    """
    front = head_front(head, h, rows)
    if front is None or torch.is_autocast_enabled("cpu"):
        return None
    linear = front.linear
    if any(t.device.type != "cpu" or t.dtype != torch.float32 for t in (front.data, linear.weight)):
        return None
    weight, bias = front.weight(), linear.bias
    if bias is None:
        bias = weight.new_zeros(linear.out_features)
    x = front.images().contiguous()
    out = front.go_on(cpu_ops.channels_last_linear(x, weight.contiguous(), bias.contiguous()))
    return in_order(out, rows, order)
