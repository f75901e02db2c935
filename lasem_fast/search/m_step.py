"""Which configurations an M-step follows, and with what weight.

The exact M-step weights every configuration's gradient with its posterior (Eq. 3 and 4). Opt-in
approximations leave configurations out and report the posterior mass of what they left out.
"""

from __future__ import annotations

from collections.abc import Callable
from numbers import Real
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lasem_fast._host_values import on_host
from lasem_fast._numbers import whole_number


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


class MStep(NamedTuple):
    """Which configurations an M-step follows.

    Attributes:
        prune: posterior mass that it may leave out; 0: none.
        draws: number of configurations to draw from the posterior; None: follow all.
    """

    prune: float = 0.0
    draws: int | None = None

    @classmethod
    def checked(cls, prune: Any, draws: Any) -> MStep:
        """The M-step of these arguments of a LASEM; TypeError or ValueError names a wrong one."""
        if isinstance(prune, bool) or not isinstance(prune, Real):
            raise TypeError(f"prune: expected a posterior mass, got {type(prune).__name__}")
        if not 0 <= prune < 1:
            raise ValueError(f"prune: expected a posterior mass from 0 to below 1, got {prune!r}")
        if draws is None:
            return cls(float(prune))
        draws = whole_number(draws, "m_step_draws")
        if prune > 0:
            raise ValueError(
                f"m_step_draws: expected None together with prune={prune}, because either says "
                f"which configurations an M-step follows; got {draws}"
            )
        return cls(0.0, draws)

    @property
    def is_exact(self) -> bool:
        """Whether every configuration is followed with its posterior."""
        return self.prune == 0 and self.draws is None

    def follows_all(self, posterior: Tensor) -> bool:
        """Whether nothing of this posterior ``[C]`` may be left out; waits for the device."""
        return self.is_exact or (self.draws is None and posterior.min().item() > self.prune)

    def weights(self, posterior: Tensor, agree: Callable[[Tensor], None] | None = None) -> Weights:
        """The weights for a posterior ``[C]``; ``agree`` overwrites what was drawn, if given."""
        if self.draws is not None:
            return drawn(posterior, self.draws, agree)
        return pruned(posterior, self.prune) if self.prune > 0 else Weights(posterior)


def pruned(posterior: Tensor, mass: float) -> Weights:
    """Leaves out the least probable configurations whose posterior sums to at most ``mass``.

    The others keep their posterior as it is, so that the gradient is off by the dropped
    configurations' part alone: by at most ``dropped_mass`` times the largest of their gradients.
    """
    if on_host(posterior):
        return _pruned_on_host(posterior.detach(), mass)
    ascending, order = posterior.double().sort(stable=True)
    dropped = (ascending.cumsum(0) <= mass).to(posterior.dtype)
    dropped[-1] = 0  # the most probable one, where rounding leaves the sum below 1
    weighs = torch.zeros_like(posterior).index_copy(0, order, dropped) == 0
    return _followed(posterior, posterior, weighs)


def _pruned_on_host(posterior: Tensor, mass: float) -> Weights:
    """Without tensors: the first call of each operation of a step costs 10 to 50 us."""
    weights = posterior.tolist()
    weighs = [True] * len(weights)
    dropped_mass = 0.0
    for row in sorted(range(len(weights)), key=weights.__getitem__)[:-1]:
        if dropped_mass + weights[row] > mass:
            break
        dropped_mass += weights[row]
        weights[row], weighs[row] = 0.0, False
    made = lambda values: torch.tensor(values, dtype=posterior.dtype, device="cpu")  # noqa: E731
    return Weights(made(weights), torch.tensor(weighs, device="cpu"), made(dropped_mass))


def drawn(posterior: Tensor, draws: int, agree: Callable[[Tensor], None] | None = None) -> Weights:
    """Draws configurations from the posterior, with replacement; unbiased.

    Each weighs how often it was drawn over ``draws``. Uses PyTorch's random state.
    """
    rows = torch.multinomial(posterior, draws, replacement=True)
    if agree is not None:
        agree(rows)
    counts = torch.zeros_like(posterior).index_add(0, rows, torch.ones_like(rows).to(posterior))
    return _followed(counts / draws, posterior, counts > 0)


def _followed(weights: Tensor, posterior: Tensor, weighs: Tensor) -> Weights:
    weights = torch.where(weighs, weights, 0)
    return Weights(weights, weighs, torch.where(weighs, 0, posterior).sum())
