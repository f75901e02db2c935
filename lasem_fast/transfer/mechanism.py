"""What a transfer mechanism has to say about a stage."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from typing import NamedTuple

from torch import Tensor, nn
from torch.func import functional_call


class Branch(NamedTuple):
    """One branch of a stage, as the tree evaluates it.

    Attributes:
        module: the stage's module.
        tensors: plain tensors that stand in for the module's own parameters, by their names inside
            the module; empty where the module's own are meant. This is how a generated weight (a
            factorised kernel, an adapted linear layer) reaches the tree: generated once per step.
    """

    module: nn.Module
    tensors: Mapping[str, Tensor] = {}

    def __call__(self, h: Tensor) -> Tensor:
        """The branch's output for ``h``."""
        if self.tensors:
            return functional_call(self.module, dict(self.tensors), (h,))
        return self.module(h)

    def parameter(self, layer: nn.Module, layer_name: str, name: str) -> Tensor | None:
        """The tensor in force as parameter ``name`` of the layer called ``layer_name``."""
        full_name = f"{layer_name}.{name}" if layer_name else name
        return self.tensors.get(full_name, getattr(layer, name))


class TransferMechanism:
    """How a stage is shared between tasks and how a task gets a branch of its own.

    Args:
        init: called on every new module to give it its initial weights; None:
            :func:`reset_parameters`.
    """

    def __init__(self, init: Callable[[nn.Module], object] | None = None) -> None:
        self.init = reset_parameters if init is None else init

    def new_specific(self, stage: nn.Module) -> nn.Module:
        """The task's own branch of a stage: a module of the same form with new weights."""
        specific = copy.deepcopy(stage)
        self.init(specific)
        return specific

    def new_adapters(self, stage: nn.Module) -> nn.Module | None:
        """The task's own factors inside the shared branch, or None if there are none."""
        return None

    def shared_branch(self, stage: nn.Module, adapters: nn.Module | None) -> Branch:
        """The shared branch as the task sees it."""
        raise NotImplementedError(f"{type(self).__name__} does not define shared_branch")


def reset_parameters(module: nn.Module) -> None:
    """Calls ``reset_parameters`` of every layer that has it; other layers keep their values."""
    for layer in module.modules():
        reset = getattr(layer, "reset_parameters", None)
        if callable(reset):
            reset()
