"""A loss that sends zeros to weights that have no part in it.

What an M-step does not follow has the gradient 0, whatever way it was evaluated: with None in its
place optimisers with momentum or decay would go on in another way.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


class _WithZeros(torch.autograd.Function):
    @staticmethod
    def forward(ctx, loss, *weights):
        ctx.weights = weights
        return loss.view_as(loss)

    @staticmethod
    def backward(ctx, dloss):
        return dloss, *map(torch.zeros_like, ctx.weights)


def with_zeros(loss: Tensor, weights: Sequence[Tensor]) -> Tensor:
    """The same loss; in its backward each of the weights gets a gradient of 0 on top.

    Args:
        loss: a scalar.
        weights: all of them require gradients.
    """
    return _WithZeros.apply(loss, *weights) if weights else loss
