"""How long a stage takes on this machine, from a few short runs."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from lasem_fast.configs import ConfigSpace
from lasem_fast.levels.plan import Plan
from lasem_fast.net import TransferNet

_MANY_ROWS = 4
_REPEATS = 3


class StageTime(NamedTuple):
    """Forward and backward of one branch of a stage on ``rows`` rows: ``fixed + rows * per_row``.

    Attributes:
        fixed: seconds that a call takes however small it is.
        per_row: seconds for each row of one mini-batch.
    """

    fixed: float
    per_row: float

    def seconds(self, rows: int, calls: int = 1) -> float:
        """Of ``rows`` rows in ``calls`` calls."""
        return calls * self.fixed + rows * self.per_row


def stage_times(net: TransferNet, task: str, x: Tensor) -> list[StageTime]:
    """The time of every stage and of the head, by running the shared branches on ``x``."""
    modules = [*net.shared, net.heads[task]]
    times, h = [], x
    for i, module in enumerate(modules):
        one = _median_seconds(module, h, needs_input_grad=i > 0)
        wide = torch.cat([h] * _MANY_ROWS)
        many = _median_seconds(module, wide, needs_input_grad=i > 0)
        per_row = max(0.0, (many - one) / (_MANY_ROWS - 1))
        times.append(StageTime(max(0.0, one - per_row), per_row))
        with torch.no_grad():
            h = module(h)
    net.zero_grad()
    return times


def tree_seconds(times: list[StageTime], space: ConfigSpace) -> float:
    """Predicted time of a step by the tree."""
    levels = Plan.of_configs(space.configs).levels
    rows = [len(level) for level in levels]
    return sum(t.seconds(r) for t, r in zip(times, [*rows, rows[-1]], strict=True))


def naive_seconds(times: list[StageTime], space: ConfigSpace) -> float:
    """Predicted time of a step by the naive loop with one forward."""
    return sum(t.seconds(len(space), calls=len(space)) for t in times)


def synchronized_seconds(step: Callable[[], Any], device: torch.device) -> float:
    """Wall-clock time of ``step``, with the device's work finished before and after."""
    synchronize = torch.cuda.synchronize if device.type == "cuda" else lambda: None
    synchronize()
    start = time.perf_counter()
    step()
    synchronize()
    return time.perf_counter() - start


def _median_seconds(module: nn.Module, h: Tensor, needs_input_grad: bool) -> float:
    h = h.detach()
    if needs_input_grad and h.is_floating_point():
        h.requires_grad_()

    def step() -> None:
        out = module(h)
        if out.requires_grad:
            out.backward(torch.ones_like(out))

    step()
    return statistics.median(synchronized_seconds(step, h.device) for _ in range(_REPEATS))
