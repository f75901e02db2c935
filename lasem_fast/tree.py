"""The shared-prefix tree: evaluates every configuration of a plan, each prefix once.

The rows of a level are folded into the batch, samples outermost: entry ``n * rows + r`` of a folded
batch is sample n under prefix r. A level is then one wide dense operation, never a loop over rows.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from lasem_fast import _checks
from lasem_fast.layers import active_random_layers, has_hooks, may_write_input
from lasem_fast.network import Network
from lasem_fast.plan import Level, Plan
from lasem_fast.transfer import Branch

AllBranches = Callable[[Sequence[Branch], Tensor], "Tensor | None"]


class Stacks(NamedTuple):
    """The rows of a level before they are put together: one folded batch per used branch."""

    parts: list[Tensor]
    level: Level


class Tree:
    """Evaluates networks over a plan.

    Args:
        plan: what to evaluate.
        all_branches: a backend's operation for a level on which every row goes through every
            branch, ``(branches, h [N * P, ...]) -> [N * P * branches, ...]``. It returns None for
            a stage that it does not take; then each branch is called once on the folded batch.
    """

    def __init__(self, plan: Plan, all_branches: AllBranches) -> None:
        self.plan = plan
        self.all_branches = all_branches

    def logits(self, network: Network, x: Tensor) -> Tensor:
        """The head's outputs ``[C, N, K]`` of all configurations, in the layers' present modes."""
        return self._finish(network, self._advance(network, x, 0, len(network.stages)), x.shape[0])

    def logits_without_and_with_noise(self, network: Network, x: Tensor) -> tuple[Tensor, Tensor]:
        """Outputs ``[C, N, K]`` twice: with random layers off and no gradient, and as they are.

        What lies before the first random layer runs once. Without an active random layer both are
        the same tensor, and carry the gradient.
        """
        cut = _first_random_stage(network)
        if cut is None:
            logits = self.logits(network, x)
            return logits, logits
        depth = len(network.stages)
        if cut < depth and (halves := _split(network.stages[cut])) is not None:
            stages = [*network.stages[:cut], *halves, *network.stages[cut + 1 :]]
            network = network._replace(stages=stages)
            return Tree(self.plan.split(cut), self.all_branches)._twice(network, x, cut + 1)
        return self._twice(network, x, cut)

    def _twice(self, network: Network, x: Tensor, cut: int) -> tuple[Tensor, Tensor]:
        depth = len(network.stages)
        trunk = self._advance(network, x, 0, cut)
        with torch.no_grad(), network.random_layers_off(cut):
            calm = self._advance(network, trunk, cut, depth)
            calm = self._finish(network, calm, x.shape[0])
        noisy = self._advance(network, trunk, cut, depth)
        return calm, self._finish(network, noisy, x.shape[0])

    def _advance(
        self, network: Network, h: Tensor | Stacks, first: int, stop: int
    ) -> Tensor | Stacks:
        """Runs the stages ``first .. stop - 1`` on a level's rows."""
        for i in range(first, stop):
            if self.plan.continues(i):
                h = self._continue(network.stages[i], h, self.plan.levels[i])
            else:
                goes_on = i + 1 < len(self.plan.levels) and self.plan.continues(i + 1)
                merge = not goes_on or _is_parameter_free(network.stages[i + 1])
                h = self._branch_out(network.stages[i], _merged(h), self.plan.levels[i], merge)
        return h

    def _branch_out(
        self, branches: Sequence[Branch | None], h: Tensor, level: Level, merge: bool
    ) -> Tensor | Stacks:
        """A level whose rows go through different branches of the same input."""
        used = [branches[b] for b in level.used_branches]
        if merge and level.is_full:
            out = self.all_branches(used, h)
            if out is not None:
                return out
        parts = []
        for b, branch in zip(level.used_branches, used, strict=True):
            rows = _rows(h, level.width, level.parents_of(b))
            parts.append(branch(rows.clone() if may_write_input(branch.module) else rows))
        return Stacks(parts, level)

    def _continue(
        self, branches: Sequence[Branch | None], h: Tensor | Stacks, level: Level
    ) -> Tensor | Stacks:
        """A level whose rows go on in the branch that they came from."""
        used = [branches[b] for b in level.used_branches]
        if isinstance(h, Tensor):
            if _is_parameter_free(branches):
                return used[0](h)
            h = Stacks([_rows(h, len(level), level.rows_of(b)) for b in level.used_branches], level)
        parts = [branch(part) for branch, part in zip(used, h.parts, strict=True)]
        return Stacks(parts, level)

    def _finish(self, network: Network, h: Tensor | Stacks, samples: int) -> Tensor:
        """The head on the leaves, one configuration after another."""
        h = _merged(h)
        leaves = len(self.plan.levels[-1])
        if may_write_input(network.head):
            h = h.clone()
        logits = network.head(h)
        _checks.check_logits(logits, leaves, samples, network.task)
        logits = logits.unflatten(0, (samples, leaves))
        if self.plan.leaves == tuple(range(leaves)):
            return logits.transpose(0, 1)
        return logits[:, torch.tensor(self.plan.leaves, device=logits.device)].transpose(0, 1)


def _merged(h: Tensor | Stacks) -> Tensor:
    """All rows of a level as one folded batch, in nested-loop order."""
    if isinstance(h, Tensor):
        return h
    parts, level = h
    if len(parts) == 1:
        return parts[0]
    samples = parts[0].shape[0] // len(level.rows_of(level.used_branches[0]))
    if level.is_full:
        split = [part.unflatten(0, (samples, level.width)) for part in parts]
        return torch.stack(split, dim=2).flatten(0, 2)
    rows = torch.cat([part.unflatten(0, (samples, -1)) for part in parts], dim=1)
    order = torch.tensor(level.merge_order(), device=rows.device)
    return rows.index_select(1, order).flatten(0, 1)


def _rows(h: Tensor, width: int, rows: tuple[int, ...]) -> Tensor:
    """Some of the ``width`` rows of a folded batch."""
    if rows == tuple(range(width)):
        return h
    split = h.unflatten(0, (-1, width))
    step = rows[1] - rows[0] if len(rows) > 1 else 1
    if step > 0 and rows == tuple(range(rows[0], rows[-1] + 1, step)):
        return split[:, rows[0] : rows[-1] + 1 : step].flatten(0, 1)
    return split.index_select(1, torch.tensor(rows, device=h.device)).flatten(0, 1)


def _is_parameter_free(branches: Sequence[Branch | None]) -> bool:
    """Whether the branches of a stage are one and the same function."""
    there = [branch for branch in branches if branch is not None]
    if any(branch.tensors for branch in there):
        return False
    return not any(True for b in there for _ in (*b.module.parameters(), *b.module.buffers()))


def _first_random_stage(network: Network) -> int | None:
    """The first stage with an active random layer; the depth if only the head has one."""
    for i, branches in enumerate(network.stages):
        if any(active_random_layers(b.module) for b in branches if b is not None):
            return i
    return len(network.stages) if active_random_layers(network.head) else None


def _split(branches: Sequence[Branch | None]) -> tuple[list, list] | None:
    """A stage cut in two before its first random layer, or None where that cannot be done."""
    modules = [branch.module for branch in branches if branch is not None]
    if any(type(m) is not nn.Sequential or has_hooks(m) for m in modules):
        return None
    at = min(
        next((i for i, layer in enumerate(m) if active_random_layers(layer)), len(m))
        for m in modules
    )
    if at == 0:
        return None
    halves = [
        (None, None) if b is None else (_part(b, 0, at), _part(b, at, None)) for b in branches
    ]
    return [first for first, _ in halves], [second for _, second in halves]


def _part(branch: Branch, start: int, stop: int | None) -> Branch:
    module = branch.module[start:stop]
    layers = dict(module.named_children())
    tensors = {k: t for k, t in branch.tensors.items() if k.partition(".")[0] in layers}
    return Branch(module, tensors)
