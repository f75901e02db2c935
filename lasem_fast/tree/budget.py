"""How much memory a step holds, and where to cut the tree so that it holds less.

The model counts bytes by stage and row: what a forward leaves alive for the backward, and what a
backward of one level takes beside that. It is measured on one prefix of the mini-batch itself.
"""

from __future__ import annotations

import math
import os
from bisect import bisect_left
from collections.abc import Callable, Iterator, Sequence
from itertools import accumulate
from numbers import Real
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lasem_fast._numbers import is_whole
from lasem_fast.backends.operations import Operations
from lasem_fast.levels.fold import Carried, Fold, RowsFirst, folded, split_rows
from lasem_fast.levels.plan import Level, Plan
from lasem_fast.networks.network import Network
from lasem_fast.tree.count import Count
from lasem_fast.tree.tree import Tree


class StepBytes(NamedTuple):
    """Bytes of one mini-batch by stage; the head comes last.

    Attributes:
        held: what the forward of one row leaves alive, its output with it.
        once: what it leaves alive however many rows there are (weights put side by side).
        passing: what the backward of one row takes beside that, its output's gradient with it.
        passing_once: what it takes however many rows there are (gradients of weights).
        output: the output of one row.
    """

    held: list[int]
    once: list[int]
    passing: list[int]
    passing_once: list[int]
    output: list[int]


class Cut(NamedTuple):
    """A tree run as upper levels and, one after another, runs of sub-trees.

    Attributes:
        stage: the first stage (0-based, at least 1) that belongs to the sub-trees.
        rows: how many rows of the level before a run of sub-trees hangs on.
        peak: predicted bytes.
    """

    stage: int
    rows: int
    peak: int


def checked_max_memory(max_memory: Any) -> float | None:
    """None, a number of bytes (int) or a fraction (float).

    Raises:
        TypeError, ValueError: it is none of these.
    """
    if max_memory is None:
        return None
    if is_whole(max_memory):
        max_memory = int(max_memory)
    elif isinstance(max_memory, bool) or not isinstance(max_memory, Real):
        raise TypeError(
            f"max_memory: expected None, bytes (int) or a fraction of the device's memory (float), "
            f"got {type(max_memory).__name__}"
        )
    else:
        max_memory = float(max_memory)
    if not 0 < max_memory < math.inf or (isinstance(max_memory, float) and max_memory > 1):
        raise ValueError(
            f"max_memory: expected bytes (int) above 0 or a fraction (float) of at most 1.0 of the "
            f"device's memory, got {max_memory!r}"
        )
    return max_memory


def bytes_of(max_memory: float, device: torch.device) -> int:
    """A budget in bytes; a float is a fraction of the device's memory."""
    if not isinstance(max_memory, float):
        return max_memory
    if device.type == "cuda":
        return int(max_memory * torch.cuda.get_device_properties(device).total_memory)
    return int(max_memory * os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"))


def step_bytes(network: Network, operations: Operations, x: Tensor) -> StepBytes:
    """Measures one prefix of a mini-batch and its branches, leaving random state as it is."""
    devices = [x.device] if x.device.type == "cuda" else []
    with torch.random.fork_rng(devices=devices), torch.enable_grad():
        single = list(_measured(network, operations, x))
        double = list(_measured(network, operations, torch.cat([x, x])))
    found = StepBytes([], [], [], [], [])
    for one, two in zip(single, double, strict=True):
        held = max(0, two.held - one.held) // one.rows
        passing = max(0, two.passing - one.passing) // one.rows
        found.held.append(held)
        found.once.append(max(0, one.held - one.rows * held))
        found.passing.append(passing)
        found.passing_once.append(max(one.gradients, one.whole - one.rows * passing))
        found.output.append(one.output)
    return found


class _Measured(NamedTuple):
    """A level of one parent.

    Attributes:
        rows: how many it has.
        held: bytes alive after its forward.
        passing: bytes that its backward takes beside that, to give gradients of its inputs.
        whole: likewise, to give those of its weights too; some kernels always make both.
        gradients: bytes of its weights' gradients.
        output: bytes of one row's output.
    """

    rows: int
    held: int
    passing: int
    whole: int
    gradients: int
    output: int


def _measured(network: Network, operations: Operations, x: Tensor) -> Iterator[_Measured]:
    """Every stage on one row through all its branches, then the head on one row."""
    weights = _weights(network)
    h: Fold = x.detach()
    for i, stage in enumerate([*network.stages, None]):
        there = [0] if stage is None else [b for b in (0, 1) if stage[b] is not None]
        level = Level((0,) * len(there), tuple(there), 1)
        tree = Tree(Plan((level,), tuple(range(len(there)))), operations)
        inputs = _tensors(h)  # an image's own gradient is a little more than a step needs
        for tensor in inputs:
            tensor.requires_grad_(tensor.is_floating_point() or tensor.is_complex())
        own = [t for t in _weights_of(network, i) if t.requires_grad]

        def forward(stage=stage, h=h, tree=tree) -> Fold:
            if stage is None:
                return tree.finish(network, h, x.shape[0])
            return tree.advance(network._replace(stages=[stage]), h, 0, 1)

        _, _, passing = _counted(forward, inputs, [*weights, *inputs])
        out, held, whole = _counted(forward, [*inputs, *own], [*weights, *inputs])
        output = out if isinstance(out, Tensor) else folded(out)
        yield _Measured(
            rows=len(there),
            held=held,
            passing=passing,
            whole=whole,
            gradients=sum(map(_bytes, own)),
            output=_bytes(output) // len(there),
        )
        h = _detached(split_rows(out, len(there), [1] * len(there))[0]) if stage else out


def _counted(
    forward: Callable[[], Fold], wrt: Sequence[Tensor], known: Sequence[Tensor]
) -> tuple[Fold, int, int]:
    """The output, the bytes that it leaves alive beside ``known``, and what a backward takes more.

    ``wrt``: what the backward is asked gradients of.
    """
    count = Count()
    count.ignore(*known)
    with count:
        out = forward()
        held = count.peak = count.alive
        _backward(_tensors(out), wrt)
    return out, held, count.peak - held


def _backward(outputs: Sequence[Tensor], inputs: Sequence[Tensor]) -> None:
    loss = sum(_Ones.apply(t) for t in outputs if t.requires_grad)
    inputs = [t for t in inputs if t.requires_grad]
    if isinstance(loss, Tensor) and inputs:
        torch.autograd.grad(loss, inputs, allow_unused=True)


class _Ones(torch.autograd.Function):
    """A number whose gradient is a tensor of ones, which nobody holds but the backward."""

    @staticmethod
    def forward(ctx, x):
        ctx.size, ctx.dtype = x.shape, x.dtype
        return x.new_zeros((), dtype=x.dtype.to_real())

    @staticmethod
    def backward(ctx, dy):
        return dy.new_ones(ctx.size, dtype=ctx.dtype)


def _tensors(h: Fold) -> list[Tensor]:
    if isinstance(h, Carried):
        return [h.main.data, h.skip.data]
    return [h] if isinstance(h, Tensor) else [h.data] if isinstance(h, RowsFirst) else h.parts


def _detached(h: Fold) -> Fold:
    if isinstance(h, Carried):
        return Carried(_detached(h.main), _detached(h.skip), h.rows)
    return RowsFirst(h.data.detach()) if isinstance(h, RowsFirst) else h.detach()


def peak_of(plan: Plan, costs: StepBytes) -> int:
    """Predicted bytes that a step over a whole plan holds at most."""
    return _peak(_rows(plan), costs, 0)


def best_cut(plan: Plan, costs: StepBytes, max_memory: int) -> Cut | None:
    """The cut within a budget that recomputes least; None where the whole tree fits.

    Raises:
        ValueError: no cut fits; the message says what the least is.
    """
    if peak_of(plan, costs) <= max_memory:
        return None
    cuts = cuts_of(plan, costs)
    fitting = [cut for cut in cuts if cut.peak <= max_memory]
    if not fitting:
        raise ValueError(
            f"max_memory: expected at least {least_of(plan, costs)} bytes, which is what the best "
            f"cut of the tree needs for a mini-batch of this size, got {max_memory}; a smaller "
            f"mini-batch or fewer groups need less"
        )
    rows = [len(level) for level in plan.levels]
    return min(fitting, key=lambda cut: (-(-rows[cut.stage - 1] // cut.rows), -cut.stage))


def least_of(plan: Plan, costs: StepBytes) -> int:
    """The smallest budget that can be met."""
    return min([peak_of(plan, costs), *(cut.peak for cut in cuts_of(plan, costs))])


def cuts_of(plan: Plan, costs: StepBytes) -> list[Cut]:
    """All cuts that are looked at: before each stage, in runs of 1, 2, 4 ... rows."""
    return [cut for stage in range(1, len(plan.levels)) for cut in _cuts(plan, costs, stage)]


def _cuts(plan: Plan, costs: StepBytes, stage: int) -> Iterator[Cut]:
    rows = _rows(plan)
    trunk, k = rows[stage - 1], 1
    # for each level below, where the rows begin that hang on the trunk's first, second ... row
    begins, levels = list(range(trunk + 1)), []
    for level in plan.levels[stage:]:
        begins = [bisect_left(level.parents, begin) for begin in begins]
        levels.append(begins)
    top = _held(rows[:stage], costs, 0)[-1]
    # runs of rows that wait and gradients of those that are done, then all of these put together
    split = trunk * costs.output[stage - 1]
    together = top + 2 * split
    # gradients of weights are summed over all runs before they go where gradients are kept
    top_and_sums = top + split + sum(costs.passing_once[stage:])
    logits = 2 * len(plan) * costs.output[-1]
    above = _peak(rows[:stage], costs, 0)
    while k < trunk:
        edges = [(a, min(a + k, trunk)) for a in range(0, trunk, k)]
        runs = ([begins[b] - begins[a] for begins in levels] for a, b in edges)
        largest = max(runs, key=sum)
        below = top_and_sums + _peak([*largest, largest[-1]], costs, stage)
        yield Cut(stage, k, max(above, together, below) + logits)
        k *= 2


def _rows(plan: Plan) -> list[int]:
    rows = [len(level) for level in plan.levels]
    return [*rows, rows[-1]]


def _held(rows: Sequence[int], costs: StepBytes, first: int) -> list[int]:
    """What is alive after each of some levels' forward, of stages from ``first`` on."""
    pairs = zip(rows, costs.held[first:], costs.once[first:], strict=False)
    return list(accumulate(r * held + once for r, held, once in pairs))


def _peak(rows: Sequence[int], costs: StepBytes, first: int) -> int:
    """At most during the backward of some levels, each of which lets go of what it held."""
    held = _held(rows, costs, first)
    passing = zip(rows, costs.passing[first:], costs.passing_once[first:], strict=False)
    return max(h + r * p + once for h, (r, p, once) in zip(held, passing, strict=True))


def _weights(network: Network) -> list[Tensor]:
    """Parameters, buffers and generated weights of all stages and the head."""
    return [t for i in range(len(network.stages) + 1) for t in _weights_of(network, i)]


def _weights_of(network: Network, stage: int) -> list[Tensor]:
    if stage == len(network.stages):
        return [*network.head.parameters(), *network.head.buffers()]
    there = [branch for branch in network.stages[stage] if branch is not None]
    own = [t for b in there for t in (*b.module.parameters(), *b.module.buffers())]
    return [*own, *(t for b in there for t in b.tensors.values())]


def _bytes(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()
