"""From the weights of configurations to those of a level's rows."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from torch import Tensor

from lasem_fast.levels.fold import index_tensor
from lasem_fast.levels.plan import SubPlan


def row_weights(part: SubPlan, stage: int, rows: Sequence[int]) -> Callable[[Tensor], Tensor]:
    """What a row weighs: the sum over the configurations that go through it.

    Args:
        part: the tree that the rows belong to.
        stage: their level in it; its depth: the leaves.
        rows: numbers of rows of that level.

    Returns:
        From the weights of all configurations ``[C]`` to those of the rows ``[R]``.
    """

    def weights(of_configs: Tensor) -> Tensor:
        plan, device = part.plan, of_configs.device
        leaves = len(plan.levels[-1])
        found = of_configs[index_tensor(part.configs, device)]
        found = found.new_zeros(leaves).index_add(0, index_tensor(plan.leaves, device), found)
        for level in reversed(plan.levels[stage + 1 :]):
            parents = index_tensor(level.parents, device)
            found = found.new_zeros(level.width).index_add(0, parents, found)
        return found[index_tensor(tuple(rows), device)]

    return weights
