"""What a captured step holds on to, and whether it is still there: quickly, and in full."""

from __future__ import annotations

from functools import partial
from operator import attrgetter, is_, is_not
from typing import Any

from torch import Tensor
from torch.optim import Optimizer

from lasem_fast.em import LASEM

# Calls between two full comparisons.
_RARELY = 256
_trains = attrgetter("requires_grad")
_there = partial(is_not, None)


class Holdings:
    """The addresses and host values that a graph of ``em`` and ``optimizer`` takes in."""

    def __init__(self, em: LASEM, optimizer: Optimizer) -> None:
        self.em, self.optimizer = em, optimizer
        self._weights = [*em.net.parameters(), *em.net.buffers()]
        # read past nn.Module.__getattr__, which would cost as much as what is looked at
        self._prior, self._states = em._prior, em._prior.states._modules
        self._quick: tuple | None = None
        self._objects: list[Any] = []
        self._calls = 0

    def everything(self) -> tuple:
        """Addresses, and values that are on the host, to be compared by ``==``."""
        groups = self.optimizer.param_groups
        states = self.optimizer.state.values()
        prior = self.em._prior
        return (
            self.em.training,
            [(w.data_ptr(), w.requires_grad) for w in self._weights],
            [buffer.data_ptr() for buffer in (*prior.buffers(), *prior.states.all_buffers())],
            [[_mark(value) for value in state.values()] for state in states],
            [[_mark(group[key]) for key in group if key != "params"] for group in groups],
            [[id(parameter) for parameter in group["params"]] for group in groups],
        )

    def remember(self) -> None:
        """Takes what is there now as what :meth:`seem_the_same` compares with."""
        self._calls = 0
        self._quick, self._objects = self._version(), self._identities()

    def seem_the_same(self) -> bool:
        """Whether nothing was replaced since :meth:`remember`, in a few microseconds.

        Sees weights and the prior's counts by address and the optimiser by the identity of its
        state, groups and their values. Every so often it says False, for a comparison in full.
        """
        self._calls += 1
        if self._calls >= _RARELY or self._quick != self._version():
            return False
        now = self._identities()
        return len(now) == len(self._objects) and all(map(is_, now, self._objects))

    def _version(self) -> tuple:
        buffers = [*self._prior._buffers.values()]
        for state in self._states.values():
            buffers += state._buffers.values()
        return (
            self.em.training,
            [*map(Tensor.data_ptr, self._weights)],
            [*map(_trains, self._weights)],
            [*map(Tensor.data_ptr, filter(_there, buffers))],
            len(self.optimizer.state),
            [len(group["params"]) for group in self.optimizer.param_groups],
        )

    def _identities(self) -> list[Any]:
        optimizer = self.optimizer
        objects: list[Any] = [optimizer.state, optimizer.param_groups]
        for group in optimizer.param_groups:
            objects += group.values()
        return objects


def _mark(value: Any) -> Any:
    """A value to compare: a tensor by its address, anything else by what it is."""
    if isinstance(value, Tensor):
        return ("tensor", value.data_ptr())
    if isinstance(value, (tuple, list)):
        return [_mark(part) for part in value]
    return value
