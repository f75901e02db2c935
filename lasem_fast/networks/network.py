"""A task's network as evaluators see it: branches of stages, and a head."""

from __future__ import annotations

from collections.abc import Container, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import NamedTuple

import torch
from torch import Tensor, nn

from lasem_fast.networks.batch_norm import BatchNorms, OfRows
from lasem_fast.networks.layers import (
    active_random_layers,
)
from lasem_fast.networks.walk import Walk
from lasem_fast.transfer import Branch


class Network(NamedTuple):
    """One task's network.

    Attributes:
        stages: for every stage its branches, `shared` first; None for one that was dropped.
        head: maps the last stage's output to the logits.
        task: the task's name, for messages.
        head_writes_input: whether the head was seen to change its input tensor in place.
        may_draw: whether a layer inside draws random numbers; True where nobody has looked.
        may_write: whether a layer inside says that it changes its input; True likewise.
        batch_norms: what the layers that use a mini-batch's statistics see; None: there are none.
        watched: whether every module has to be called as itself, see
            :func:`~lasem_fast.networks.layers.are_watched`.
        layers: all modules inside, and perhaps others; none where nobody has looked.
    """

    stages: list[Sequence[Branch | None]]
    head: nn.Module
    task: str
    head_writes_input: bool = False
    may_draw: bool = True
    may_write: bool = True
    batch_norms: BatchNorms | None = None
    watched: bool = False
    layers: Sequence[nn.Module] = ()

    def looked_into(self, walk: Walk | None = None) -> Network:
        """The same network with what a walk through all of it tells, as it is now.

        ``walk``: one through the task's parts of the net. There is another if there is none, and
        where a mechanism takes a branch from elsewhere.
        """
        if torch.compiler.is_compiling():
            return self
        modules = self.modules()
        if walk is None or not walk.covers(modules):
            walk = Walk.through(*modules)
        return Network(
            self.stages, self.head, self.task, self.head_writes_input, walk.may_draw,
            walk.may_write, BatchNorms() if walk.is_normed else None, walk.watched,
            # branches may change their places among the same modules
            [*modules, *walk.layers],
        )  # fmt: skip

    def rows_apart(
        self, module: nn.Module, rows: int, samples: int, weights: OfRows
    ) -> AbstractContextManager:
        """Meanwhile batch norm in ``module`` sees its input's rows apart.

        See :meth:`BatchNorms.apart <lasem_fast.networks.batch_norm.BatchNorms.apart>`.
        """
        if self.batch_norms is None:
            return nullcontext()
        return self.batch_norms.apart(module, rows, samples, weights)

    def aside(self) -> Network:
        """The same network for a pass whose statistics are of no account."""
        return self if self.batch_norms is None else self._replace(batch_norms=BatchNorms())

    def protected(self, writers: Container[int]) -> Network:
        """The same network, of which the stages at these positions write to their input.

        The head's position is the depth.
        """
        if not writers:
            return self
        stages = [
            [b and b._replace(writes_input=True) for b in branches] if i in writers else branches
            for i, branches in enumerate(self.stages)
        ]
        return self._replace(stages=stages, head_writes_input=len(stages) in writers)

    def modules(self, first: int = 0) -> list[nn.Module]:
        """The branches' modules from stage ``first`` on, and the head."""
        stages = self.stages[first:]
        return [*[b.module for stage in stages for b in stage if b is not None], self.head]

    def tensors(self) -> Iterator[Tensor]:
        """Parameters, and tensors that stand in for some."""
        for module in self.modules():
            yield from module.parameters()
        for branches in self.stages:
            for branch in branches:
                yield from () if branch is None else branch.tensors.values()

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


def tensors_in_force(
    branches: Sequence[Branch], layers: Sequence[tuple[str, nn.Module]], name: str
) -> list[Tensor] | list[None] | None:
    """A parameter of a layer of every branch, generated or its own.

    ``layers``: for each branch the layer's name in it, and the layer.

    None if they cannot be put side by side: they differ in shape, or only some branches have it.
    """
    tensors = [
        branch.parameter(layer, layer_name, name)
        for branch, (layer_name, layer) in zip(branches, layers, strict=True)
    ]
    shape = None if tensors[0] is None else tensors[0].shape
    for tensor in tensors:
        if (None if tensor is None else tensor.shape) != shape:
            return None
    return tensors
