"""What a step costs, counted on the meta device: FLOPs and memory, level by level.

Nothing is computed and nothing is allocated: the tree itself runs on tensors that have shapes only.
One multiply-add is two FLOPs.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor, nn

from lasem_fast.configs import ConfigSpace
from lasem_fast.em import LASEM
from lasem_fast.levels.plan import Plan
from lasem_fast.net import TransferNet
from lasem_fast.networks.network import Network
from lasem_fast.search import dispatch
from lasem_fast.tree.count import Count
from lasem_fast.tree.tree import Tree

MOST_CONFIGURATIONS = 4096


class LevelCost(NamedTuple):
    """One level of the tree, or the head on all leaves.

    Attributes:
        rows: how many times the stage is evaluated on the mini-batch.
        flops: of forward and backward.
        held: bytes that it adds to what the forward leaves alive for the backward.
    """

    rows: int
    flops: int
    held: int


class StepCost(NamedTuple):
    """One training step over all configurations by the `torch` backend's tree.

    Attributes:
        levels: one per stage, then the head with posterior and loss.
        flops: of the tree, forward and backward.
        naive_flops: of the naive loop with one forward.
        base_flops: of one configuration alone.
        held: bytes alive between forward and backward, without weights and mini-batch.
        peak: largest number of bytes alive during the step, gradients included, without weights,
            mini-batch and the private workspace of operators (a strided convolution's backward may
            copy its operands).
    """

    levels: list[LevelCost]
    flops: int
    naive_flops: int
    base_flops: int
    held: int
    peak: int


def step_cost(
    net: TransferNet, task: str, space: ConfigSpace, sample: Tensor, batch: int
) -> StepCost:
    """Counts a training step without running it.

    Args:
        net: a net on any device, with an open ``task``.
        task: name of the task.
        space: the configurations.
        sample: one input, without the batch dimension.
        batch: samples in the mini-batch.

    Raises:
        ValueError: more configurations than the tree can be planned for.
    """
    if len(space) > MOST_CONFIGURATIONS:
        raise ValueError(
            f"groups: expected at most {MOST_CONFIGURATIONS} configurations, got {len(space)}; "
            f"bind stages into groups"
        )
    net = copy.deepcopy(net).to("meta")
    net.zero_grad()
    x = torch.empty((batch, *sample.shape), dtype=sample.dtype, device="meta")
    y = torch.empty(batch, dtype=torch.int64, device="meta")
    em = LASEM(net, space, backend="torch").to("meta")
    em(x, y, task)  # makes the prior's counts, which are there before any later step
    flops, held, peak = _count(lambda: em(x, y, task).loss, em, (x, y))
    levels = _levels(net, task, space, x)
    before_head = LevelCost(0, sum(c.flops for c in levels), sum(c.held for c in levels))
    rows = len(Plan.of_configs(space.configs).levels[-1])
    head = LevelCost(rows, flops - before_head.flops, held - before_head.held)
    base = _path_flops(net, task, space.all, x)
    # what each stage costs more in its specific branch: stages add up, configurations are many
    alone = [tuple(i != stage for i in range(net.depth)) for stage in range(net.depth)]
    more = [_path_flops(net, task, row, x) - base for row in alone]
    unshared = [sum(not config[stage] for config in space.configs) for stage in range(net.depth)]
    return StepCost(
        levels=[*levels, head],
        flops=flops,
        naive_flops=len(space) * base + sum(n * m for n, m in zip(unshared, more, strict=True)),
        base_flops=base,
        held=held,
        peak=peak,
    )


def _levels(net: TransferNet, task: str, space: ConfigSpace, x: Tensor) -> list[LevelCost]:
    """The cost of each level: what a tree that ends there costs more than one that ends before."""
    levels, flops_before, held_before = [], 0, 0
    for depth in range(1, net.depth + 1):
        prefixes = list(dict.fromkeys(config[:depth] for config in space.configs))
        plan = Plan.of_configs(prefixes)
        network = Network(net.branches(task)[:depth], nn.Flatten(), task)
        tree = Tree(plan, dispatch.operations("torch"))

        def forward(tree: Tree = tree, network: Network = network) -> Tensor:
            return tree.evaluate(network, x, one_pass=False).m_step(None).logits

        flops, held, _ = _count(forward, net, (x,))
        levels.append(LevelCost(len(plan.levels[-1]), flops - flops_before, held - held_before))
        flops_before, held_before = flops, held
    return levels


def _path_flops(net: TransferNet, task: str, config: tuple[bool, ...], x: Tensor) -> int:
    return _count(lambda: net(x, task, config=config), net, (x,))[0]


def _count(
    forward: Callable[[], Tensor], module: nn.Module, inputs: tuple[Tensor, ...]
) -> tuple[int, int, int]:
    """FLOPs of forward and backward, bytes alive between them, and peak bytes."""
    module.zero_grad()
    count = Count()
    count.ignore(*module.parameters(), *module.buffers(), *inputs)
    with count:
        out = forward()
        held = count.alive
        out.sum().backward()
    return count.flops, held, count.peak
