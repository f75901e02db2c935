"""A task's network as evaluators see it: branches of stages, and a head."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import NamedTuple

from torch import nn

from lasem_fast.layers import active_random_layers
from lasem_fast.transfer import Branch


class Network(NamedTuple):
    """One task's network.

    Attributes:
        stages: for every stage its branches, `shared` first; None for one that was dropped.
        head: maps the last stage's output to the logits.
        task: the task's name, for messages.
    """

    stages: list[Sequence[Branch | None]]
    head: nn.Module
    task: str

    def modules(self, first: int = 0) -> list[nn.Module]:
        """The branches' modules from stage ``first`` on, and the head."""
        branches = [b for stage in self.stages[first:] for b in stage if b is not None]
        return [*(branch.module for branch in branches), self.head]

    @contextmanager
    def random_layers_off(self, first: int = 0) -> Iterator[None]:
        """Puts the random layers from stage ``first`` on into evaluation mode for a while."""
        layers = [layer for m in self.modules(first) for layer in active_random_layers(m)]
        for layer in layers:
            layer.training = False
        try:
            yield
        finally:
            for layer in layers:
                layer.training = True
