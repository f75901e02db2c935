"""Which rows of a tree a backward has to look at, decided between forward and backward."""

from __future__ import annotations

import torch
from torch import Tensor

from lasem_fast.levels.fold import index_tensor
from lasem_fast.levels.plan import Plan
from lasem_fast.levels.row_liveness import Liveness


class TreeLiveness:
    """The liveness of all levels of a plan.

    Attributes:
        levels: one per stage, handed to the operations of that level.
    """

    def __init__(self, plan: Plan) -> None:
        self.plan = plan
        self.levels = [Liveness() for _ in plan.levels]

    def keep(self, weighs: Tensor) -> None:
        """Says which configurations count, a bool tensor ``[C]``; a row is live if one uses it."""
        device = weighs.device
        looks = device.type == "cpu" and not torch.compiler.is_compiling()
        last = len(self.plan.levels[-1])
        live: Tensor | None = _any_of(weighs, index_tensor(self.plan.leaves, device), last)
        for level, liveness in zip(reversed(self.plan.levels), reversed(self.levels), strict=True):
            if live is not None and looks and bool(live.all()):
                live = None  # and so above, every row of which has a row here
            liveness.live = live
            if live is not None:
                live = _any_of(live, index_tensor(level.parents, device), level.width)

    def share_of(self, weighs: Tensor) -> float | None:
        """The share of the tree's rows that some configurations use; None if all is followed."""
        if all(level.followed for level in self.levels):
            return None
        used = self.plan.only(weighs.nonzero().flatten().tolist())
        return used.stage_evaluations / self.plan.stage_evaluations


def _any_of(values: Tensor, places: Tensor, count: int) -> Tensor:
    """Whether any of the values that go to a place is True, for ``count`` places."""
    sums = torch.zeros(count, dtype=torch.int32, device=values.device)
    return sums.index_add_(0, places, values.to(torch.int32)) > 0
