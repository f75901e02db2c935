"""The tree within a memory budget: upper levels whole, then sub-trees one after another.

The sub-trees' forward keeps nothing but the outputs; the M-step's backward runs each sub-tree that
carries weight a second time (PyTorch's activation checkpointing) and adds up the gradients. Random
layers draw the same masks in both passes.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from operator import attrgetter
from typing import Any

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from lasem_fast.backends.operations import Operations, Targets
from lasem_fast.levels.fold import Fold, split_rows
from lasem_fast.levels.liveness import TreeLiveness
from lasem_fast.levels.plan import Plan, SubPlan
from lasem_fast.networks.network import Network
from lasem_fast.tree.budget import Cut, best_cut, bytes_of, step_bytes
from lasem_fast.tree.evaluation import Evaluation, Follow, Part
from lasem_fast.tree.heap import Heap
from lasem_fast.tree.tree import Lowerings, Tree, first_random_stage

_version, _mode = attrgetter("_version"), attrgetter("training")
_trains, _dtype = attrgetter("requires_grad"), attrgetter("dtype")


class BoundedTree:
    """Evaluates networks over a plan, holding at most ``max_memory`` bytes at a time.

    Args:
        plan: what to evaluate.
        operations: a backend's operations on whole levels and on the leaves.
        max_memory: what a step may hold beside weights, their gradients and the mini-batch, in
            bytes or as a fraction of the device's memory.
    """

    def __init__(self, plan: Plan, operations: Operations, max_memory: float) -> None:
        self.plan = plan
        self.operations = operations
        self.max_memory = max_memory
        self._cuts: dict[tuple, Cut | None] = {}
        self._runs: dict[Cut, list[SubPlan]] = {}

    def logits(self, network: Network, x: Tensor) -> Tensor:
        """The head's outputs ``[C, N, K]`` of all configurations, in the layers' present modes."""
        return self.evaluate(network, x, one_pass=True).m_step(None).logits

    def evaluate(
        self,
        network: Network,
        x: Tensor,
        *,
        one_pass: bool,
        follow: Follow = "all",
        targets: Targets | None = None,
    ) -> Evaluation:
        """Outputs for both steps of EM.

        Raises:
            ValueError: the budget is too small for every cut of the tree.
        """
        cut = self._cut(network, x)
        if cut is None:
            tree = Tree(self.plan, self.operations)
            return tree.evaluate(network, x, one_pass=one_pass, follow=follow, targets=targets)
        parts = self._parts(cut)
        random = None if one_pass else first_random_stage(network)
        return _Chunked(self, network, x, cut, parts, random)

    def _cut(self, network: Network, x: Tensor) -> Cut | None:
        """Where to cut the tree for mini-batches like ``x``; None where all of it fits."""
        autocast = torch.is_autocast_enabled(x.device.type)
        key = (network.task, x.shape, x.dtype, x.device, autocast, _costs_alike(network))
        if key not in self._cuts:
            with torch.inference_mode(False):  # a step of training is measured, whoever asks first
                costs = step_bytes(_ordinary(network), self.operations, x.clone())
            self._cuts[key] = best_cut(self.plan, costs, bytes_of(self.max_memory, x.device))
        return self._cuts[key]

    def _parts(self, cut: Cut) -> list[SubPlan]:
        if cut not in self._runs:
            self._runs[cut] = self._run_plans(cut)
        return self._runs[cut]

    def _run_plans(self, cut: Cut) -> list[SubPlan]:
        rows = len(self.plan.levels[cut.stage - 1])
        edges = range(0, rows, cut.rows)
        return [self.plan.below(cut.stage, a, min(a + cut.rows, rows)) for a in edges]


def _costs_alike(network: Network) -> tuple[tuple[Any, ...], ...]:
    """What decides about a network's costs besides its mini-batch."""
    tensors = [*network.tensors()]
    modes = tuple(map(_mode, network.layers))
    return modes, tuple(map(_trains, tensors)), tuple(map(_dtype, tensors))


def _ordinary(network: Network) -> Network:
    """The network without tensors that were generated in inference mode: no graph holds those."""
    stages = [
        [b and b._replace(tensors={n: t.clone() for n, t in b.tensors.items()}) for b in branches]
        for branches in network.stages
    ]
    return network.aside()._replace(stages=stages)


class _Chunked:
    """One mini-batch under all configurations, some sub-trees at a time."""

    scores = whole = pair = None

    def __init__(
        self,
        tree: BoundedTree,
        network: Network,
        x: Tensor,
        cut: Cut,
        parts: Sequence[SubPlan],
        random: int | None,
    ) -> None:
        self.tree, self.network, self.cut, self.parts = tree, network, cut, parts
        self.samples = x.shape[0]
        whole = SubPlan(tree.plan, tuple(range(len(tree.plan))))
        self._top = Tree(tree.plan.top(cut.stage), tree.operations, part=whole)
        self._heap = None if x.device.type == "cuda" else Heap(cut.peak)
        # up to here both steps see the same activations
        same = cut.stage if random is None else min(random, cut.stage)
        self._shared = self._top.advance(network, x, 0, same)
        self._same = same
        self._lowered: Lowerings = {}  # of the parts, for one pass
        self._weights = [t for t in network.tensors() if not t.is_inference()]
        self._versions = [*map(_version, self._weights)]
        self._outputs: list[Tensor] | None = None
        if random is None:
            self._outputs = list(self._noisy())
            self.e_step = self._in_order([logits.detach() for logits in self._outputs])
        else:
            with torch.no_grad(), network.random_layers_off(same):
                self.e_step = self._in_order([*self._plain()])

    def m_step(self, weighs: Tensor | None) -> Part:
        wanted = list(range(len(self.parts)))
        if weighs is not None:
            wanted = [i for i in wanted if bool(weighs[list(self.parts[i].configs)].any())]
        if self._outputs is None:
            self._outputs = list(self._noisy(wanted, weighs))
            outputs = self._outputs
            self._outputs = None
        else:
            outputs = [self._outputs[i] for i in wanted]
            for i in wanted:
                self._keep(i, weighs)
        configs = [c for i in wanted for c in self.parts[i].configs]
        order = sorted(range(len(configs)), key=configs.__getitem__)
        logits = torch.cat(outputs)
        if order != list(range(len(order))):
            logits = logits[torch.tensor(order, device=logits.device)]
        everything = len(configs) == len(self.tree.plan)
        return Part(None if everything else tuple(sorted(configs)), logits)

    def share_of(self, weighs: Tensor) -> float | None:
        return None  # sub-trees that nothing follows are left out anyway

    def _keep(self, i: int, weighs: Tensor | None) -> None:
        if weighs is not None and self._liveness[i] is not None:
            self._liveness[i].keep(weighs[list(self.parts[i].configs)])

    def _noisy(
        self, wanted: Sequence[int] | None = None, weighs: Tensor | None = None
    ) -> Iterator[Tensor]:
        """The outputs of some sub-trees with their graph, layers as they are."""
        self._liveness = [TreeLiveness(part.plan) for part in self.parts]
        self._lowered = {}
        rows = self._rows(self.network)
        for i in range(len(self.parts)) if wanted is None else wanted:
            self._keep(i, weighs)
            if torch.is_grad_enabled():
                yield checkpoint(self._run, self.network, i, rows[i], use_reentrant=False)
            else:
                yield self._run(self.network, i, rows[i])

    def _plain(self) -> Iterator[Tensor]:
        """The outputs of all sub-trees without a graph."""
        self._liveness = [None] * len(self.parts)
        self._lowered = {}
        aside = self.network.aside()
        rows = self._rows(aside)
        for i in range(len(self.parts)):
            yield self._run(aside, i, rows[i])

    def _rows(self, network: Network) -> list[Fold]:
        """What each part's sub-trees hang on."""
        h = self._top.advance(network, self._shared, self._same, self.cut.stage)
        width = len(self.tree.plan.levels[self.cut.stage - 1])
        sizes = [part.plan.levels[0].width for part in self.parts]
        return split_rows(h, width, sizes)

    def _run(self, network: Network, i: int, h: Fold) -> Tensor:
        if [*map(_version, self._weights)] != self._versions:
            raise RuntimeError(
                "loss: expected a backward before any weight is changed in place, because "
                "max_memory computes parts of the network anew in it"
            )
        if self._heap is not None:
            self._heap.keep_down()
        part = self.parts[i]
        tree = Tree(
            part.plan, self.tree.operations, first=self.cut.stage, lowered=self._lowered, part=part
        )
        network = network._replace(stages=network.stages[self.cut.stage :])
        h = tree.advance(network, h, 0, len(network.stages), self._liveness[i])
        return tree.finish(network, h, self.samples)

    def _in_order(self, outputs: Sequence[Tensor]) -> Tensor:
        """All configurations' outputs in the order of the space."""
        configs = [c for part in self.parts for c in part.configs]
        logits = torch.cat(list(outputs))
        if configs == list(range(len(configs))):
            return logits
        order = torch.tensor(configs, device=logits.device).argsort()
        return logits[order]
