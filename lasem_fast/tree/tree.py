"""The shared-prefix tree: evaluates every configuration of a plan, each prefix once.

All rows of a level are one batch (see fold.py), so that a level is one wide dense operation, never
a loop over rows.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager
from functools import partial
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from lasem_fast.backends import plain_torch
from lasem_fast.backends.operations import Normed, Operations, Scores, Targets
from lasem_fast.levels.fold import Fold, Stacks, folded, index_tensor, rows_of
from lasem_fast.levels.liveness import TreeLiveness
from lasem_fast.levels.plan import Level, Plan, SubPlan
from lasem_fast.levels.row_liveness import Liveness, passed_over
from lasem_fast.levels.row_weights import RowWeights
from lasem_fast.networks import checks
from lasem_fast.networks.layers import (
    active_random_layers,
    has_tensors,
    is_patched,
    may_write_input,
    one_function,
    plain_stage,
)
from lasem_fast.networks.network import Network
from lasem_fast.transfer import Branch
from lasem_fast.tree import fused_stage
from lasem_fast.tree.evaluation import Evaluation, Follow, Part, Scored, Whole
from lasem_fast.tree.fused_stage import Lowered

Lowerings = dict[tuple[int, tuple[int, ...]], "Lowered | None"]
"""Stages as fused layers, by number from 0 and branches; None: no operation takes any layer."""


class Tree:
    """Evaluates networks over a plan.

    Args:
        plan: what to evaluate.
        operations: a backend's operations on whole levels and on the leaves.
        cut: the stage that the plan has been split at, if it has been: two levels are one stage.
        first: number of the plan's first stage in the net, from 0.
        lowered: what other trees found out about the stages of the same network, in the same modes
            and on inputs of the same type, and this one adds to; by stage and branches.
        part: the tree of all stages whose upper levels this one's are, or which part of a larger
            tree this one is, with the numbers of its configurations; None: it is the whole.
    """

    def __init__(
        self,
        plan: Plan,
        operations: Operations,
        cut: int | None = None,
        first: int = 0,
        lowered: Lowerings | None = None,
        part: SubPlan | None = None,
    ) -> None:
        self.plan = plan
        self.part = SubPlan(plan, tuple(range(len(plan)))) if part is None else part
        self.operations = operations
        self.cut = cut
        self.first = first
        self.lowered = lowered
        # of each level's stage, for messages
        self._names = [
            f"stage {first + i + (0 if cut is not None and i > cut else 1)}"
            for i in range(len(plan.levels))
        ]

    def logits(self, network: Network, x: Tensor) -> Tensor:
        """The head's outputs ``[C, N, K]`` of all configurations, in the layers' present modes."""
        return self.finish(network, self.advance(network, x, 0, len(network.stages)), x.shape[0])

    def evaluate(
        self,
        network: Network,
        x: Tensor,
        *,
        one_pass: bool,
        follow: Follow = "all",
        targets: Targets | None = None,
    ) -> Evaluation:
        """Outputs for both steps of EM; what lies before the first random layer runs once."""
        if follow == "few" and not one_pass and torch.is_grad_enabled():
            return _TwoForwards(self, network, x)
        cut = None if one_pass else first_random_stage(network)
        if cut is None:
            liveness = self._liveness(follow)
            h = self.advance(network, x, 0, len(network.stages), liveness)
            if (scores := self._scored(network, h, targets, pair=False)) is not None:
                return Scored(scores)
            logits = self.finish(network, h, x.shape[0])
            return Whole(logits, logits, liveness)
        first = cut
        network, plan, cut = split_at(network, self.plan, cut)
        split = first if len(plan.levels) > len(self.plan.levels) else None
        return Tree(plan, self.operations, split)._evaluate_twice(network, x, cut, follow, targets)

    def _evaluate_twice(
        self, network: Network, x: Tensor, cut: int, follow: Follow, targets: Targets | None
    ) -> Evaluation:
        depth = len(network.stages)
        liveness = self._liveness(follow)
        trunk = self.advance(network, x, 0, cut, liveness)
        if cut == depth:
            if (scores := self._scored(network, trunk, targets, pair=True)) is not None:
                return Scored(scores)
            pair = self._finish_twice(network, trunk, x.shape[0])
            if pair is not None:
                return Whole(pair[0].detach(), pair[1], liveness, pair)
        with torch.no_grad(), network.random_layers_off(cut):
            aside = network.aside()
            calm = self.advance(aside, trunk, cut, depth)
            calm = self.finish(aside, calm, x.shape[0])
        noisy = self.advance(network, trunk, cut, depth, liveness)
        return Whole(calm, self.finish(network, noisy, x.shape[0]), liveness)

    def _liveness(self, follow: Follow) -> TreeLiveness | None:
        wanted = follow != "all" and torch.is_grad_enabled()
        return TreeLiveness(self.plan) if wanted else None

    def advance(
        self,
        network: Network,
        h: Fold,
        first: int,
        stop: int,
        liveness: TreeLiveness | None = None,
    ) -> Fold:
        """Runs the stages ``first .. stop - 1`` on a level's rows."""
        lowers = len(self.operations.levels) > 0 and not network.watched
        for i in range(first, stop):
            branches, level = network.stages[i], self.plan.levels[i]
            used = [branches[b] for b in level.used_branches]
            live = None if liveness is None else liveness.levels[i]
            out = None
            if lowers and (lowered := self._lowered(used, h, i)) is not None:
                seen = None if network.batch_norms is None else partial(self._note, network, i)
                out = fused_stage.run(lowered, h, level, live, seen)
            if out is not None:
                h = out
            elif self.plan.continues(i):
                h = self._continue(network, h, i, live)
            else:
                goes_on = i + 1 < len(self.plan.levels) and self.plan.continues(i + 1)
                merge = not goes_on or (
                    _is_parameter_free(network.stages[i + 1])
                    # else it cannot be one wide layer anyway
                    and plain_stage(used[0].module) is not None
                )
                h = self._branch_out(network, h, merge, i, live)
        return h

    def _lowered(self, used: Sequence[Branch], h: Fold, stage: int) -> Lowered | None:
        if self.lowered is None:
            return fused_stage.lowered(self.operations.levels, used, h, self.operations.norms)
        key = self.first + stage, self.plan.levels[stage].used_branches
        if key not in self.lowered:
            operations = self.operations
            self.lowered[key] = fused_stage.lowered(operations.levels, used, h, operations.norms)
        return self.lowered[key]

    def _branch_out(
        self, network: Network, h: Fold, merge: bool, stage: int, live: Liveness | None
    ) -> Fold:
        """A level in PyTorch whose rows go through different branches of the same input."""
        h, level = folded(h), self.plan.levels[stage]
        used = [network.stages[stage][b] for b in level.used_branches]
        if merge and level.is_full and not network.watched:
            out = plain_torch.wide_level(used, h, level.width, live)
            if out is not None:
                return out
        passed_over(live)
        parts = []
        for b, branch in zip(level.used_branches, used, strict=True):
            rows = h if level.is_full else rows_of(h, level.width, level.parents_of(b))
            parts.append(self._call(network, branch, rows, stage, level.rows_of(b)))
        return Stacks(parts, level)

    def _continue(self, network: Network, h: Fold, stage: int, live: Liveness | None) -> Fold:
        """A level in PyTorch whose rows go on in the branch that they came from."""
        level = self.plan.levels[stage]
        used = [network.stages[stage][b] for b in level.used_branches]
        if not isinstance(h, Stacks):
            h = folded(h)
            if _is_parameter_free(used) and one_function([b.module for b in used]):
                return self._call(network, used[0], h, stage, range(len(level)))
            h = Stacks(
                [rows_of(h, len(level), level.rows_of(b)) for b in level.used_branches], level
            )
        passed_over(live)
        parts = [
            self._call(network, branch, part, stage, level.rows_of(b))
            for b, branch, part in zip(level.used_branches, used, h.parts, strict=True)
        ]
        return Stacks(parts, level)

    def _call(
        self, network: Network, branch: Branch, h: Tensor, stage: int, rows: Sequence[int]
    ) -> Tensor:
        """The branch's output, which is these rows; ``h`` stays as it is: others read it too."""
        where = self._names[stage]
        if branch.writes_input or (network.may_write and may_write_input(branch.module)):
            h = h.clone()
            version = None
        else:
            version = checks.version_of(h)
        if network.batch_norms is None:
            out = branch(h)
        else:
            with self._apart(network, branch.module, h, stage, rows):
                out = branch(h)
        checks.check_stage_output(out, h.shape[0], branch.module, where)
        checks.check_input_as_it_was(version, h, branch.module, where)
        return out

    def _apart(
        self, network: Network, module: nn.Module, h: Tensor, stage: int, rows: Sequence[int]
    ) -> AbstractContextManager:
        """Meanwhile batch norm in a branch sees its rows apart."""
        weights = RowWeights(self.part, stage, rows)
        return network.rows_apart(module, len(rows), h.shape[0] // len(rows), weights)

    def _note(
        self,
        network: Network,
        stage: int,
        layers: list[nn.Module],
        level: Level,
        number: int,
        normed: Normed,
    ) -> None:
        """Tells the network's batch norms what they saw of a level's rows."""
        for branch, layer in zip(level.used_branches, layers, strict=True):
            rows = level.rows_of(branch)
            seen = normed.statistics[index_tensor(rows, normed.statistics.device)]
            network.batch_norms.note(layer, number, seen, RowWeights(self.part, stage, rows))

    def finish(self, network: Network, h: Fold, samples: int) -> Tensor:
        """The head on the leaves, one configuration after another."""
        leaves, order = len(self.plan.levels[-1]), self.plan.order
        for operation in () if network.watched else self.operations.heads:
            logits = operation(network.head, h, leaves, order)
            if logits is not None:
                checks.check_logits(logits, leaves, samples, network.task)
                return self._by_configuration(logits.unflatten(0, (leaves, samples)), 0)
        logits = self._samples_first_logits(network, h, leaves, samples)
        logits = logits.unflatten(0, (samples, leaves)).transpose(0, 1)
        if order is not None:
            logits = logits.index_select(0, index_tensor(order, logits.device))
        return self._by_configuration(logits, 0)

    def _scored(
        self, network: Network, h: Fold, targets: Targets | None, pair: bool
    ) -> Scores | None:
        """The scores of the leaves, if an operation makes them with the head's outputs.

        Args:
            network: the task's.
            h: the leaves.
            targets: what they are scored by; None: they are not.
            pair: whether the M-step's outputs are those with the head's random layers on.
        """
        if targets is None or network.watched:
            return None
        order, places = self.plan.order, self.plan.places
        leaves = places if order is None else tuple(order[place] for place in places)
        for operation in self.operations.scored_heads:
            scores = operation(network.head, h, leaves, order, targets, pair)
            if scores is not None:
                return scores
        return None

    def _by_configuration(self, logits: Tensor, dim: int) -> Tensor:
        """What is in nested-loop order, one configuration after another."""
        if self.plan.is_in_order:
            return logits
        return logits.index_select(dim, index_tensor(self.plan.places, logits.device))

    def _finish_twice(self, network: Network, h: Fold, samples: int) -> Tensor | None:
        """The head with its random layers off and on, ``[2, C, N, K]``; None if it takes two."""
        leaves = len(self.plan.levels[-1])
        for operation in () if network.watched else self.operations.heads_twice:
            logits = operation(network.head, h, leaves, self.plan.order)
            if logits is not None:
                checks.check_logits(logits, 2 * leaves, samples, network.task)
                return self._by_configuration(logits.unflatten(0, (2, leaves, samples)), 1)
        return None

    def _samples_first_logits(self, network: Network, h: Fold, leaves: int, samples: int) -> Tensor:
        """PyTorch's ``[N * P, K]``."""
        h = folded(h)
        writes = network.head_writes_input or (network.may_write and may_write_input(network.head))
        if writes:
            h = h.clone()
        version = checks.version_of(h)
        if network.batch_norms is None:
            logits = network.head(h)
        else:
            with self._apart(network, network.head, h, len(self.plan.levels), range(leaves)):
                logits = network.head(h)
        checks.check_logits(logits, leaves, samples, network.task)
        if not writes:
            where = f"the head of task {network.task!r}"
            checks.check_input_as_it_was(version, h, network.head, where)
        return logits


class _TwoForwards:
    """A forward without a graph for the E-step, and one of what the M-step follows."""

    scores = whole = pair = None

    def __init__(self, tree: Tree, network: Network, x: Tensor) -> None:
        self.tree, self.network, self.x = tree, network, x
        with torch.no_grad(), network.random_layers_off():
            self.e_step = tree.logits(network.aside(), x)

    def m_step(self, weighs: Tensor | None) -> Part:
        if weighs is None:
            return Part(None, self.tree.logits(self.network, self.x))
        rows = tuple(weighs.nonzero().flatten().tolist())
        plan = self.tree.plan.only(rows)
        some = Tree(plan, self.tree.operations, part=SubPlan(plan, rows))
        return Part(rows, some.logits(self.network, self.x))

    def share_of(self, weighs: Tensor) -> float | None:
        rows = weighs.nonzero().flatten().tolist()
        plan = self.tree.plan
        return plan.only(rows).stage_evaluations / plan.stage_evaluations


def _is_parameter_free(branches: Sequence[Branch | None]) -> bool:
    """Whether no branch of a stage has a tensor."""
    there = [branch for branch in branches if branch is not None]
    return not any([branch.tensors or has_tensors(branch.module) for branch in there])


def first_random_stage(network: Network) -> int | None:
    """The first stage with an active random layer; the depth if only the head has one."""
    if not network.may_draw:
        return None
    for i, branches in enumerate(network.stages):
        if any(active_random_layers(b.module) for b in branches if b is not None):
            return i
    return len(network.stages) if active_random_layers(network.head) else None


def split_at(network: Network, plan: Plan, cut: int) -> tuple[Network, Plan, int]:
    """The same network with a stage cut in two where its random layers begin, if that can be.

    Returns:
        The network and its plan, and the first stage with a random layer in them.
    """
    if cut < len(network.stages) and (halves := _split(network.stages[cut])) is not None:
        stages = [*network.stages[:cut], *halves, *network.stages[cut + 1 :]]
        return network._replace(stages=stages), plan.split(cut), cut + 1
    return network, plan, cut


def _split(branches: Sequence[Branch | None]) -> tuple[list, list] | None:
    """A stage cut in two before its first random layer, or None where that cannot be done."""
    modules = [branch.module for branch in branches if branch is not None]
    if any(type(m) is not nn.Sequential or is_patched(m) for m in modules):
        return None
    at = min(
        next((i for i, layer in enumerate(m) if active_random_layers(layer)), len(m))
        for m in modules
    )
    if at == 0:
        return None
    halves = [
        (None, None) if b is None
        else (b.part(_slice(b.module, 0, at)), b.part(_slice(b.module, at, None)))
        for b in branches
    ]  # fmt: skip
    return [first for first, _ in halves], [second for _, second in halves]


def _slice(module: nn.Sequential, start: int, stop: int | None) -> nn.Sequential:
    """Some of a stage's layers as a module; the same object for as long as the layers stay."""
    if torch.compiler.is_compiling():
        return module[start:stop]
    parts = _slices.setdefault(module, {})
    layers = list(module)[start:stop]
    known = parts.get((start, stop))
    if known is None or list(known) != layers:
        known = parts[start, stop] = module[start:stop]
    known.training = module.training
    return known


_slices: WeakKeyDictionary[nn.Sequential, dict[tuple, nn.Sequential]] = WeakKeyDictionary()
