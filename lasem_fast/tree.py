"""The shared-prefix tree: evaluates every configuration of a plan, each prefix once.

All rows of a level are one batch (see fold.py), so that a level is one wide dense operation, never
a loop over rows.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from lasem_fast import _checks
from lasem_fast.fold import Fold, Stacks, folded, index_tensor, rows_of
from lasem_fast.layers import active_random_layers, has_hooks, may_write_input
from lasem_fast.network import Network
from lasem_fast.operations import Operations
from lasem_fast.plan import Level, Plan
from lasem_fast.transfer import Branch


class Tree:
    """Evaluates networks over a plan.

    Args:
        plan: what to evaluate.
        operations: a backend's operations on whole levels and on the leaves.
        cut: the stage that the plan has been split at, if it has been: two levels are one stage.
    """

    def __init__(self, plan: Plan, operations: Operations, cut: int | None = None) -> None:
        self.plan = plan
        self.operations = operations
        self.cut = cut

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
            return Tree(self.plan.split(cut), self.operations, cut)._twice(network, x, cut + 1)
        return self._twice(network, x, cut)

    def _twice(self, network: Network, x: Tensor, cut: int) -> tuple[Tensor, Tensor]:
        depth = len(network.stages)
        trunk = self._advance(network, x, 0, cut)
        with torch.no_grad(), network.random_layers_off(cut):
            calm = self._advance(network, trunk, cut, depth)
            calm = self._finish(network, calm, x.shape[0])
        noisy = self._advance(network, trunk, cut, depth)
        return calm, self._finish(network, noisy, x.shape[0])

    def _advance(self, network: Network, h: Fold, first: int, stop: int) -> Fold:
        """Runs the stages ``first .. stop - 1`` on a level's rows."""
        for i in range(first, stop):
            if self.plan.continues(i):
                h = self._continue(network.stages[i], h, self.plan.levels[i], i)
            else:
                goes_on = i + 1 < len(self.plan.levels) and self.plan.continues(i + 1)
                merge = not goes_on or _is_parameter_free(network.stages[i + 1])
                h = self._branch_out(network.stages[i], h, self.plan.levels[i], merge, i)
        return h

    def _branch_out(
        self, branches: Sequence[Branch | None], h: Fold, level: Level, merge: bool, stage: int
    ) -> Fold:
        """A level whose rows go through different branches of the same input."""
        used = [branches[b] for b in level.used_branches]
        if merge and level.is_full:
            for operation in self.operations.levels:
                out = operation(used, h, level.width)
                if out is not None:
                    return out
        h = folded(h)
        parts = []
        for b, branch in zip(level.used_branches, used, strict=True):
            rows = rows_of(h, level.width, level.parents_of(b))
            parts.append(self._call(branch, rows, stage))
        return Stacks(parts, level)

    def _continue(
        self, branches: Sequence[Branch | None], h: Fold, level: Level, stage: int
    ) -> Fold:
        """A level whose rows go on in the branch that they came from."""
        used = [branches[b] for b in level.used_branches]
        if not isinstance(h, Stacks):
            h = folded(h)
            if _is_parameter_free(branches):
                return self._call(used[0], h, stage)
            h = Stacks(
                [rows_of(h, len(level), level.rows_of(b)) for b in level.used_branches], level
            )
        parts = [
            self._call(branch, part, stage) for branch, part in zip(used, h.parts, strict=True)
        ]
        return Stacks(parts, level)

    def _call(self, branch: Branch, h: Tensor, stage: int) -> Tensor:
        """The branch's output; ``h`` stays as it is, because others read it too."""
        where = f"stage {stage + 1 if self.cut is None or stage <= self.cut else stage}"
        if branch.writes_input or may_write_input(branch.module):
            h = h.clone()
            version = None
        else:
            version = _checks.version_of(h)
        out = branch(h)
        _checks.check_stage_output(out, h.shape[0], branch.module, where)
        _checks.check_input_as_it_was(version, h, branch.module, where)
        return out

    def _finish(self, network: Network, h: Fold, samples: int) -> Tensor:
        """The head on the leaves, one configuration after another."""
        leaves = len(self.plan.levels[-1])
        logits = self._rows_first_logits(network, h, leaves, samples)
        if self.plan.leaves == tuple(range(leaves)):
            return logits
        return logits[index_tensor(self.plan.leaves, logits.device)]

    def _rows_first_logits(self, network: Network, h: Fold, leaves: int, samples: int) -> Tensor:
        for operation in self.operations.heads:
            logits = operation(network.head, h, leaves)
            if logits is not None:
                _checks.check_logits(logits, leaves, samples, network.task)
                return logits.unflatten(0, (leaves, samples))
        h = folded(h)
        if network.head_writes_input or may_write_input(network.head):
            h = h.clone()
        version = _checks.version_of(h)
        logits = network.head(h)
        _checks.check_logits(logits, leaves, samples, network.task)
        if not (network.head_writes_input or may_write_input(network.head)):
            where = f"the head of task {network.task!r}"
            _checks.check_input_as_it_was(version, h, network.head, where)
        return logits.unflatten(0, (samples, leaves)).transpose(0, 1)


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
    # which part writes is not known
    return Branch(module, tensors, branch.writes_input)
