"""Which rows of a tree a backward has to look at, decided between forward and backward."""

from __future__ import annotations

from itertools import compress

import torch
from torch import Tensor

from lasem_fast._host_values import on_host
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
        if on_host(weighs):
            self._keep_on_host(weighs.tolist())
            return
        device, last = weighs.device, len(self.plan.levels[-1])
        live = _any_of(weighs, index_tensor(self.plan.leaves, device), last)
        for level, liveness in zip(reversed(self.plan.levels), reversed(self.levels), strict=True):
            liveness.live = live
            live = _any_of(live, index_tensor(level.parents, device), level.width)

    def _keep_on_host(self, counts: list[bool]) -> None:
        places, all_live = self.plan.leaves, False
        for level, liveness in zip(reversed(self.plan.levels), reversed(self.levels), strict=True):
            if not all_live:
                used = set(compress(places, counts))
                counts, places = [row in used for row in range(len(level))], level.parents
                all_live = len(used) == len(level)  # and so above: every row there has one here
            liveness.live = None if all_live else torch.tensor(counts, device="cpu")

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
