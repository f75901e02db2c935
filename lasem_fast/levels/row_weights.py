"""From the weights of configurations to those of a level's rows."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

from torch import Tensor

from lasem_fast.levels.fold import index_tensor
from lasem_fast.levels.plan import SubPlan


class RowWeights(NamedTuple):
    """What some rows weigh: the sum over the configurations that go through each.

    Attributes:
        part: the tree that the rows belong to.
        stage: their level in it; its depth: the leaves.
        rows: their numbers on that level.
    """

    part: SubPlan
    stage: int
    rows: Sequence[int]

    def __call__(self, weights: Tensor, known: dict[Any, Tensor]) -> Tensor:
        """``[R]``, from the weights of all configurations ``[C]``.

        ``known``: what was found for other rows with the same weights, and is added to.
        """
        level = _of_level(self.part, self.stage, weights, known)
        return level[index_tensor(tuple(self.rows), level.device)]


def _of_level(part: SubPlan, stage: int, weights: Tensor, known: dict[Any, Tensor]) -> Tensor:
    plan, device = part.plan, weights.device
    last = len(plan.levels) - 1
    stage = min(stage, last)
    key = id(part), stage
    if key in known:
        return known[key]
    if stage == last:
        own = weights[index_tensor(part.configs, device)]
        places, rows = plan.leaves, len(plan.levels[last])
    else:
        own = _of_level(part, stage + 1, weights, known)
        below = plan.levels[stage + 1]
        places, rows = below.parents, below.width
    known[key] = own.new_zeros(rows).index_add(0, index_tensor(places, device), own)
    return known[key]
