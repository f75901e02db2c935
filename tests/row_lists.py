"""The level operation of PyTorch itself, which works in float64: proves lists, skips and cuts."""

from __future__ import annotations

from lasem_fast.backends import plain_torch
from lasem_fast.backends.operations import Operations
from lasem_fast.levels.plan import Plan
from lasem_fast.tree.tree import Tree


class PlainLevel:
    """Takes every fused layer, in plain PyTorch."""

    carries = False

    def __init__(self) -> None:
        self.calls = 0

    def why_not(self, layer, x) -> str:
        return ""

    def __call__(self, layer, x, level, skip, liveness, carry=False):
        self.calls += 1
        return plain_torch.run_level(layer, x, level, skip)


PLAIN = Operations(levels=(PlainLevel(),))


def evaluator_of(space, operations) -> Tree:
    return Tree(Plan.of_configs(space.configs), operations)
