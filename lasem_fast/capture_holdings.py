"""What a captured step holds on to, and whether it is still there: quickly, and in full."""

from __future__ import annotations

from functools import partial
from operator import attrgetter, is_, is_not
from typing import Any

from torch import Tensor, nn
from torch.nn.modules.dropout import _DropoutNd
from torch.optim import Optimizer

from lasem_fast.em import LASEM
from lasem_fast.networks.layers import is_batch_norm, is_random

# Calls between two full comparisons.
_RARELY = 256
_address, _trains = Tensor.data_ptr, attrgetter("requires_grad")
_mode, _probability = attrgetter("training"), attrgetter("p")
_there = partial(is_not, None)


class Holdings:
    """The addresses and host values that a graph of ``em`` and ``optimizer`` takes in."""

    def __init__(self, em: LASEM, optimizer: Optimizer) -> None:
        self.em, self.optimizer = em, optimizer
        self._weights = self._weights_now()
        # read past nn.Module.__getattr__, which would cost as much as what is looked at
        self._prior, self._states = em._prior, em._prior.states._modules
        self._calls = 0

    def everything(self) -> tuple:
        """Addresses, and values that are on the host, to be compared by ``==``."""
        groups = self.optimizer.param_groups
        states = self.optimizer.state.values()
        prior = self.em._prior
        return (
            [module.training for module in self.em.modules()],
            [dropout.p for dropout in self._dropouts_now()],
            [(w.data_ptr(), w.requires_grad) for w in self._weights_now()],
            [buffer.data_ptr() for buffer in (*prior.buffers(), *prior.states.all_buffers())],
            [[_mark(value) for value in state.values()] for state in states],
            [[_mark(group[key]) for key in group if key != "params"] for group in groups],
            [[id(parameter) for parameter in group["params"]] for group in groups],
        )

    def remember(self) -> None:
        """Takes what is there now as what :meth:`seem_the_same` compares with."""
        self._calls = 0
        self._weights = self._weights_now()
        self._moded = [self.em, *filter(_shows_its_mode, self.em.net.modules())]
        self._modes = [*map(_mode, self._moded)]
        self._dropouts = self._dropouts_now()
        self._probabilities = [*map(_probability, self._dropouts)]
        self._addresses = [*map(_address, self._in_memory())]
        self._trained = [w for w in self._weights if w.requires_grad]
        self._frozen = [w for w in self._weights if not w.requires_grad]
        self._objects, self._lengths = self._optimizer_now()

    def seem_the_same(self) -> bool:
        """Whether nothing was replaced since :meth:`remember`, in a few microseconds.

        Sees weights and the prior's counts by address, the optimiser by the identity of its state,
        groups and their values, the mode of layers that depend on theirs, and the probabilities of
        dropouts. Every so often it says False, for a comparison in full.
        """
        self._calls += 1
        if self._calls >= _RARELY or [*map(_mode, self._moded)] != self._modes:
            return False
        if [*map(_probability, self._dropouts)] != self._probabilities:
            return False
        objects, lengths = self._optimizer_now()
        return (
            lengths == self._lengths
            and all(map(is_, objects, self._objects))
            and [*map(_address, self._in_memory())] == self._addresses
            and all(map(_trains, self._trained))
            and not any(map(_trains, self._frozen))
        )

    def _weights_now(self) -> list[Tensor]:
        """The net's parameters and buffers; walking its modules takes too long for every call."""
        return [*self.em.net.parameters(), *self.em.net.buffers()]

    def _dropouts_now(self) -> list[nn.Module]:
        return [module for module in self.em.net.modules() if isinstance(module, _DropoutNd)]

    def _in_memory(self) -> list[Tensor]:
        """The weights and the prior's buffers, of all tasks."""
        tensors = [*self._weights, *filter(_there, self._prior._buffers.values())]
        for state in self._states.values():
            tensors += filter(_there, state._buffers.values())
        return tensors

    def _optimizer_now(self) -> tuple[list[Any], list[int]]:
        """The optimiser's state, groups and their values, and how many there are of each."""
        state, groups = self.optimizer.state, self.optimizer.param_groups
        objects: list[Any] = [state, groups]
        lengths = [len(state)]
        for group in groups:
            objects += group.values()
            lengths += len(objects), len(group["params"])
        return objects, lengths


def _shows_its_mode(module: nn.Module) -> bool:
    """Whether what a module does itself may depend on its training mode."""
    ours = type(module).__module__.startswith("torch.nn.")
    return not ours or is_batch_norm(module) or is_random(module)


def _mark(value: Any) -> Any:
    """A value to compare: a tensor by its address, anything else by what it is."""
    if isinstance(value, Tensor):
        return ("tensor", value.data_ptr())
    if isinstance(value, (tuple, list)):
        return [_mark(part) for part in value]
    return value
