"""Which configurations an M-step follows, and with what weight.

The exact M-step weights every configuration's gradient with its posterior (Eq. 3 and 4). Opt-in
approximations leave configurations out and report the posterior mass of what they left out.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class Weights(NamedTuple):
    """The weights of an M-step.

    Attributes:
        weights: ``[C]``, of the configurations' gradients.
        weighs: bool ``[C]``, the configurations that are followed; None: all.
        dropped_mass: scalar, the posterior mass of those that are not; None: nothing is.
    """

    weights: Tensor
    weighs: Tensor | None = None
    dropped_mass: Tensor | None = None


def pruned(posterior: Tensor, mass: float) -> Weights:
    """Leaves out the least probable configurations whose posterior sums to at most ``mass``.

    The others keep their posterior as it is, so that the gradient is off by the dropped
    configurations' part alone: by at most ``dropped_mass`` times the largest of their gradients.
    """
    ascending, order = posterior.double().sort(stable=True)
    dropped = (ascending.cumsum(0) <= mass).to(posterior.dtype)
    weighs = torch.zeros_like(posterior).index_copy(0, order, dropped) == 0
    return _followed(posterior, posterior, weighs)


def drawn(posterior: Tensor, draws: int) -> Weights:
    """Draws configurations from the posterior, with replacement; unbiased.

    Each weighs how often it was drawn over ``draws``. Uses PyTorch's random state.
    """
    rows = torch.multinomial(posterior, draws, replacement=True)
    counts = torch.zeros_like(posterior).index_add(0, rows, torch.ones_like(rows).to(posterior))
    return _followed(counts / draws, posterior, counts > 0)


def _followed(weights: Tensor, posterior: Tensor, weighs: Tensor) -> Weights:
    weights = torch.where(weighs, weights, 0)
    return Weights(weights, weighs, torch.where(weighs, 0, posterior).sum())
