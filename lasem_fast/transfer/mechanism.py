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
            A parameter that only ever comes from here is None in the module.
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
        return self.tensors.get(inner_name(layer_name, name), getattr(layer, name))


class TransferMechanism:
    """How a stage is shared between tasks and how a task gets a branch of its own.

    A subclass has to define :meth:`shared_branch`; everything else has a default. Each method is
    handed a module of ``net.shared`` and, where there are any, the task's adapters of that stage;
    a mechanism itself holds settings only, no tensors.

    Args:
        init: called on every new module to give it its initial weights; None:
            :func:`reset_parameters`.
    """

    def __init__(self, init: Callable[[nn.Module], object] | None = None) -> None:
        self.init = reset_parameters if init is None else init

    def shared_modules(self, stages: list[nn.Module]) -> list[nn.Module]:
        """What is registered as ``net.shared``, one module per stage: the stages themselves.

        A mechanism that keeps something else than the stage's weights returns modules that hold
        that. Called once, before anything is registered; it may refuse a stage with a ValueError.
        """
        return stages

    def reset_shared(self, shared: nn.Module) -> None:
        """Draws a shared stage anew, in place, as if no task had ever trained it."""
        self.init(shared)

    def new_specific(self, shared: nn.Module) -> nn.Module:
        """The task's own branch of a stage: a module of the same form with new weights."""
        specific = copy.deepcopy(shared)
        self.init(specific)
        return specific

    def new_adapters(self, shared: nn.Module) -> nn.Module | None:
        """The task's own factors inside the shared branch, or None if there are none."""
        return None

    def shared_branch(self, shared: nn.Module, adapters: nn.Module | None) -> Branch:
        """The shared branch as the task sees it; called once per mini-batch.

        What it computes from ``adapters`` and from the weights of ``shared`` goes into
        ``Branch.tensors`` and carries gradients to both.
        """
        raise NotImplementedError(f"{type(self).__name__} does not define shared_branch")

    def auxiliary_loss(self, shared: nn.Module, adapters: nn.Module | None) -> Tensor | None:
        """A scalar that a configuration's loss has on top for sharing this stage, or None.

        It is weighted by the posterior probability that the stage is shared, and is no part of the
        likelihood.
        """
        return None


def reset_parameters(module: nn.Module) -> None:
    """Calls ``reset_parameters`` of every layer that has it; other layers keep their values."""
    for layer in module.modules():
        reset = getattr(layer, "reset_parameters", None)
        if callable(reset):
            reset()


def inner_name(layer_name: str, name: str) -> str:
    """The name of a layer's parameter inside a module; ``layer_name`` is "" for itself."""
    return f"{layer_name}.{name}" if layer_name else name
