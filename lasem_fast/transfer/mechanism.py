"""What a transfer mechanism has to say about a stage."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import NamedTuple

import torch
from torch import Tensor, nn

from lasem_fast._called_with import called_with
from lasem_fast._copied import copied
from lasem_fast.initialisers import redraw_


class Branch(NamedTuple):
    """One branch of a stage, as the tree evaluates it.

    Attributes:
        module: the stage's module.
        tensors: plain tensors that stand in for the module's own parameters, by their names inside
            the module; empty where the module's own are meant. This is how a generated weight (a
            factorised kernel, an adapted linear layer) reaches the tree: generated once per step.
            A parameter that only ever comes from here is None in the module.
        writes_input: whether the module was seen to change its input tensor in place.
    """

    module: nn.Module
    tensors: Mapping[str, Tensor] = {}
    writes_input: bool = False

    def __call__(self, h: Tensor) -> Tensor:
        """The branch's output for ``h``."""
        if self.tensors:
            return called_with(self.module, self.tensors, (h,))
        return self.module(h)

    def weights(self) -> list[Tensor]:
        """The tensors in force that require gradients."""
        own = (p for name, p in self.module.named_parameters() if name not in self.tensors)
        return [t for t in (*own, *self.tensors.values()) if t.requires_grad]

    def check_tensors(self, where: str) -> None:
        """Raises TypeError or ValueError unless each tensor stands in for one that is there."""
        for name, tensor in self.tensors.items():
            owner, _, leaf = name.rpartition(".")
            layer = dict(self.module.named_modules(remove_duplicate=False)).get(owner)
            known = {} if layer is None else {**layer._parameters, **layer._buffers}
            if leaf not in known:
                raise ValueError(
                    f"transfer: expected {where} to name parameters or buffers of "
                    f"{type(self.module).__name__}, got a tensor for {name!r}"
                )
            if not isinstance(tensor, Tensor):
                raise TypeError(
                    f"transfer: expected {where} to give a tensor for {name!r}, got "
                    f"{type(tensor).__name__}"
                )
            own = known[leaf]
            if own is not None and own.shape != tensor.shape:
                raise ValueError(
                    f"transfer: expected {where} to give {name!r} with shape {list(own.shape)}, "
                    f"got {list(tensor.shape)}"
                )

    def parameter(self, layer: nn.Module, layer_name: str, name: str) -> Tensor | None:
        """The tensor in force as parameter ``name`` of the layer called ``layer_name``."""
        own = layer._parameters.get(name)
        if own is None:  # perhaps no parameter, but computed from some
            own = getattr(layer, name)
        if not self.tensors:
            return own
        key = inner_name(layer_name, name)
        if key not in self.tensors:
            key = next((k for k in self.tensors if self._is_of(k, layer, name)), key)
        return self.tensors.get(key, own)

    def part(self, module: nn.Sequential) -> Branch:
        """The branch with some of its layers alone, which have kept their names."""
        tensors = {}
        for key, tensor in self.tensors.items():
            if key.partition(".")[0] not in module._modules:
                places = (
                    inner_name(layer_name, name)
                    for layer_name, layer in module.named_modules()
                    for name in (*layer._parameters, *layer._buffers)
                    if self._is_of(key, layer, name)
                )
                key = next(places, None)
            if key is not None:
                tensors[key] = tensor
        return self._replace(module=module, tensors=tensors)  # which part writes is not known

    def _is_of(self, key: str, layer: nn.Module, name: str) -> bool:
        """Whether a tensor's name is another one of this layer's: used twice, or weights tied."""
        owner, _, leaf = key.rpartition(".")
        there, own = self.module.get_submodule(owner), layer._parameters.get(name)
        if there is layer:
            return leaf == name
        return own is not None and there._parameters.get(leaf) is own


class TransferMechanism:
    """How a stage is shared between tasks and how a task gets a branch of its own.

    A subclass has to define :meth:`shared_branch`; everything else has a default. Each method is
    handed a module of ``net.shared`` and, where there are any, the task's adapters of that stage;
    a mechanism itself holds settings only, no tensors.

    Args:
        init: called on every new module, a copy of the shared one, to give it its initial weights;
            what it leaves alone stays as in the shared one. None: :func:`new_weights`.

    Raises:
        TypeError: ``init`` cannot be called.
    """

    def __init__(self, init: Callable[[nn.Module], object] | None = None) -> None:
        if init is not None and not callable(init):
            raise TypeError(
                f"init: expected a function of a module, or None, got {type(init).__name__} "
                f"{init!r}"
            )
        self.init = new_weights if init is None else init

    def shared_modules(self, stages: list[nn.Module]) -> list[nn.Module]:
        """What is registered as ``net.shared``, one module per stage: the stages themselves.

        A mechanism that keeps something else than the stage's weights returns modules that hold
        that. Called once, before anything is registered; it may refuse a stage with a ValueError.
        """
        return stages

    @torch.no_grad()
    def reset_shared(self, shared: nn.Module) -> None:
        """Draws a shared stage anew, in place, as if no task had ever trained it.

        Frozen parameters, which no task trains, keep their values.
        """
        frozen = [(p, p.clone()) for p in shared.parameters() if not p.requires_grad]
        if frozen and len(frozen) == len(list(shared.parameters())):
            return
        self.init(shared)
        for parameter, value in frozen:
            parameter.copy_(value).requires_grad_(False)

    def new_specific(self, shared: nn.Module) -> nn.Module:
        """The task's own branch of a stage: a module of the same form with new weights.

        The branch of a stage that is frozen as a whole is trainable.
        """
        specific = copy_of(shared)
        if not any(p.requires_grad for p in specific.parameters()):
            _make_trainable(specific.parameters())
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


def copy_of(stage: nn.Module) -> nn.Module:
    """A deep copy.

    Raises:
        ValueError: the stage cannot be copied.
    """
    # where gradients are recorded, a scripted module's copy hands them on to its model
    with torch.no_grad():
        copy = copied(stage)
    given = dict(stage.named_parameters())
    for name, parameter in copy.named_parameters():
        if name in given:
            parameter.requires_grad_(given[name].requires_grad)
    return copy


def new_weights(module: nn.Module) -> None:
    """New weights by the layers' own rules, in place; what is drawn is trainable.

    A parameter that no rule draws (see :func:`lasem_fast.initialisers.redraw_`) has to be frozen:
    then it counts as a constant and stays as it is.

    Raises:
        ValueError: a trainable parameter is drawn by no rule.
    """
    left = set(redraw_(module))
    _make_trainable(p for name, p in module.named_parameters() if name not in left)
    for name, parameter in module.named_parameters():
        if name in left and parameter.requires_grad:
            owner, _, leaf = name.rpartition(".")
            # a scripted module has no get_submodule
            kind = type(dict(module.named_modules())[owner]).__name__
            raise ValueError(
                f"expected a rule for new values of every trainable parameter, got none for "
                f"{leaf!r} of {kind} ({name!r} of the stage); give {kind} a reset_parameters() "
                f"method that draws it, or freeze it if it is a constant, or pass a function of "
                f"the stage as init=, as in lf.transfer.HardParameterSharing(init=draw) "
                f"(lf.initialisers.redraw_ draws what has a rule)"
            )


def _make_trainable(parameters: Iterable[nn.Parameter]) -> None:
    for parameter in parameters:
        if parameter.is_floating_point() or parameter.is_complex():
            parameter.requires_grad_(True)


def inner_name(layer_name: str, name: str) -> str:
    """The name of a layer's parameter inside a module; ``layer_name`` is "" for itself."""
    return f"{layer_name}.{name}" if layer_name else name
