"""How much memory a step holds, and where to cut the tree so that it holds less.

The model counts bytes by stage and row: what a forward keeps for the backward, and the activations
that are alive while one level runs. It is measured on one configuration of the mini-batch itself.
"""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lasem_fast.fold import Carried, Fold, RowsFirst
from lasem_fast.network import Network
from lasem_fast.operations import Operations
from lasem_fast.plan import Plan
from lasem_fast.tree import Tree


class StepBytes(NamedTuple):
    """Bytes of one mini-batch by stage; the head comes last.

    Attributes:
        held: what the forward of one row keeps for the backward.
        once: what it keeps however many rows there are (weights put side by side).
        output: the output of one row, which is what its gradient takes too.
    """

    held: list[int]
    once: list[int]
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


def check_max_memory(max_memory: Any) -> None:
    """Raises TypeError or ValueError unless it is None, a fraction or a number of bytes."""
    if max_memory is None:
        return
    if isinstance(max_memory, bool) or not isinstance(max_memory, (int, float)):
        raise TypeError(
            f"max_memory: expected None, bytes (int) or a fraction of the device's memory (float), "
            f"got {type(max_memory).__name__}"
        )
    if not 0 < max_memory < math.inf or (isinstance(max_memory, float) and max_memory > 1):
        raise ValueError(
            f"max_memory: expected bytes (int) above 0 or a fraction (float) of at most 1.0 of the "
            f"device's memory, got {max_memory!r}"
        )


def bytes_of(max_memory: float, device: torch.device) -> int:
    """A budget in bytes; a float is a fraction of the device's memory."""
    if not isinstance(max_memory, float):
        return max_memory
    if device.type == "cuda":
        return int(max_memory * torch.cuda.get_device_properties(device).total_memory)
    return int(max_memory * os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"))


def step_bytes(network: Network, operations: Operations, x: Tensor) -> StepBytes:
    """Measures one configuration of a mini-batch, forward only, leaving random state as it is."""
    single, output = _saved(network, operations, x)
    double, _ = _saved(network, operations, torch.cat([x, x]))
    held = [max(0, b - a) for a, b in zip(single, double, strict=True)]
    # both branches keep what the one that was measured keeps
    once = [2 * max(0, a - h) for a, h in zip(single, held, strict=True)]
    return StepBytes(held, once, output)


def _saved(network: Network, operations: Operations, x: Tensor) -> tuple[list[int], list[int]]:
    """Bytes that each stage and the head save for the backward, and bytes of their outputs."""
    plan = Plan.of_configs([tuple(branches[0] is not None for branches in network.stages)])
    tree = Tree(plan, operations)
    held, output = [], []
    devices = [x.device] if x.device.type == "cuda" else []
    with torch.random.fork_rng(devices=devices), torch.enable_grad():
        h = x
        saved = _Saved([x, *_weights(network)])
        for i in range(len(network.stages) + 1):
            saved.total = 0
            with torch.autograd.graph.saved_tensors_hooks(saved.pack, saved.unpack):
                if i < len(network.stages):
                    h = tree.advance(network, h, i, i + 1)
                    output.append(_size(h))
                else:
                    output.append(_bytes(tree.finish(network, h, x.shape[0])))
            held.append(saved.total)
    return held, output


def peak_of(plan: Plan, costs: StepBytes) -> int:
    """Predicted bytes that a step over a whole plan holds at most."""
    rows = [len(level) for level in plan.levels]
    return _peak([*rows, rows[-1]], costs)


def best_cut(plan: Plan, costs: StepBytes, max_memory: int) -> Cut | None:
    """The cut within a budget that recomputes least; None where the whole tree fits.

    Raises:
        ValueError: no cut fits; the message says what the least is.
    """
    if peak_of(plan, costs) <= max_memory:
        return None
    cuts = [cut for stage in range(1, len(plan.levels)) for cut in _cuts(plan, costs, stage)]
    fitting = [cut for cut in cuts if cut.peak <= max_memory]
    if not fitting:
        least = min([peak_of(plan, costs), *(cut.peak for cut in cuts)])
        raise ValueError(
            f"max_memory: expected at least {least} bytes, which is what the best cut of the tree "
            f"needs for a mini-batch of this size, got {max_memory}; a smaller mini-batch or fewer "
            f"groups need less"
        )
    rows = [len(level) for level in plan.levels]
    return min(fitting, key=lambda cut: (-(-rows[cut.stage - 1] // cut.rows), -cut.stage))


def _cuts(plan: Plan, costs: StepBytes, stage: int) -> list[Cut]:
    """The cuts before a stage, with runs of 1, 2, 4 ... rows."""
    rows = [len(level) for level in plan.levels]
    trunk, cuts, k = rows[stage - 1], [], 1
    while k < trunk:
        runs = [plan.below(stage, a, min(a + k, trunk)).plan for a in range(0, trunk, k)]
        largest = max(runs, key=lambda p: p.stage_evaluations)
        below = [len(level) for level in largest.levels]
        peak = _peak([*rows[:stage], *below, below[-1]], costs, boundary=stage)
        cuts.append(Cut(stage, k, peak + len(plan) * costs.output[-1]))
        k *= 2
    return cuts


def _peak(rows: Sequence[int], costs: StepBytes, boundary: int | None = None) -> int:
    """Everything that is held, and the gradients of the largest level with its input's."""
    held = sum(costs.once) + sum(r * b for r, b in zip(rows, costs.held, strict=True))
    outputs = [r * b for r, b in zip(rows, costs.output, strict=True)]
    passing = max(a + b for a, b in zip([0, *outputs], outputs, strict=False))
    # the gradients of all rows that sub-trees hang on wait until the last of them is done
    waiting = 2 * outputs[boundary - 1] if boundary is not None else 0
    return held + passing + waiting


class _Saved:
    """Counts the bytes of distinct storages that autograd saves, beside those known before."""

    def __init__(self, known: Sequence[Tensor]) -> None:
        self.known = {t.untyped_storage().data_ptr() for t in known}
        self.total = 0

    def pack(self, tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in self.known:
            self.known.add(storage.data_ptr())
            self.total += storage.nbytes()
        return tensor

    def unpack(self, tensor: Tensor) -> Tensor:
        return tensor


def _weights(network: Network) -> list[Tensor]:
    modules = [tensor for m in network.modules() for tensor in (*m.parameters(), *m.buffers())]
    generated = [t for pair in network.stages for b in pair if b is not None
                 for t in b.tensors.values()]  # fmt: skip
    return [*modules, *generated]


def _bytes(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()


def _size(h: Fold) -> int:
    if isinstance(h, Tensor):
        return _bytes(h)
    if isinstance(h, Carried):
        return _bytes(h.main.data)
    tensors = [h.data] if isinstance(h, RowsFirst) else h.parts
    return sum(_bytes(t) for t in tensors)
