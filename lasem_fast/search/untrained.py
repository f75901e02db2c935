"""Notices an optimiser that lacks a task's own parameters, without being given the optimiser."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Sequence
from itertools import compress
from operator import is_
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from lasem_fast.networks.layers import parameters_in

if TYPE_CHECKING:
    from lasem_fast.net import TransferNet

# So many times something else has to move first: optimisers that take turns are no mistake.
_PATIENCE = 3
_SAMPLE = 16  # values of each parameter


class Untrained:
    """Watches each task's first steps, by the counts of in-place changes that tensors keep.

    Between two calls of one task, an optimiser's step changes every parameter that it holds, with
    a learning rate of 0 too. If the rest of the task's network has moved a few times and its head
    or its own branches have never, nothing trains them. Accumulated gradients move nothing; frozen
    parameters are not looked at; nor is what happens while other tasks are trained.

    Args:
        bits: bool ``[C, d]``, the configurations that are searched.
    """

    def __init__(self, bits: Tensor) -> None:
        # a branch that no configuration takes is trained by nothing, and need not be
        self._shared = bits.any(dim=0).tolist()
        self._specific = (~bits).any(dim=0).tolist()
        self._settled: set[str] = set()
        self._last: tuple[str, dict[str, int]] | None = None
        self._there: tuple[str, list[nn.Parameter], list[tuple[bool, int]]] | None = None
        self._moved: dict[str, set[str]] = {}
        self._moves: dict[str, int] = {}
        self._samples: dict[str, dict[str, list[Tensor]]] = {}

    def look(self, net: TransferNet, task: str, layers: Sequence[nn.Module]) -> None:
        """To be called before each step of a task.

        Args:
            net: the net.
            task: its task.
            layers: all modules inside of what the task may use.

        Warns:
            UserWarning: once per task, if parts of it stay as they were.
        """
        if task in self._settled:
            self._last = self._there = None
            return
        if self._is_as_before(task, layers):
            return
        parts = _trainable(net, task, self._shared, self._specific)
        changes = {part: sum(p._version for p in own) for part, own in parts.items()}
        if task not in self._samples:
            self._samples[task] = {part: _sample(own) for part, own in parts.items()}
        last, self._last = self._last, (task, changes)
        if last is None or last[0] != task or last[1].keys() != changes.keys():
            return
        moved = {part for part, count in changes.items() if count != last[1][part]}
        if not moved:
            return
        ever = self._moved.setdefault(task, set())
        ever |= moved
        self._moves[task] = self._moves.get(task, 0) + 1
        still = [part for part in changes if part not in ever and part != "shared stages"]
        if still and self._moves[task] < _PATIENCE:
            return
        self._settled.add(task)
        samples = self._samples.pop(task)
        # fused optimisers do not count what they change
        still = [p for p in still if all(map(torch.equal, samples[p], _sample(parts[p])))]
        if still:
            have = "has" if still == ["head"] else "have"
            warnings.warn(
                f"optimizer: expected one that trains task {task!r}, but after "
                f"{self._moves[task]} steps its {' and '.join(still)} {have} never changed; make "
                f"it of net.task_parameters({task!r}), add what net.add_task returns to it, or "
                f"freeze them with requires_grad_(False)",
                UserWarning,
                stacklevel=6,  # look, two of the LASEM, two of nn.Module, the loop
            )

    def forget_parameters(self) -> None:
        """Holds no parameter any more, so that what has been dropped is free."""
        self._there = None

    def _is_as_before(self, task: str, layers: Sequence[nn.Module]) -> bool:
        """Whether the task's last call was the last one, and nothing was changed since."""
        before = self._there
        own = [p for layer in layers for p in layer._parameters.values() if p is not None]
        now = [(p.requires_grad, 0 if p.is_inference() else p._version) for p in own]
        self._there = task, own, now
        if before is None or before[0] != task or before[2] != now:
            return False
        return all(map(is_, before[1], own))


def _sample(parameters: list[nn.Parameter]) -> list[Tensor]:
    """Copies of some values of each."""
    return [p.detach().flatten()[:_SAMPLE].clone() for p in parameters]


def _trainable(
    net: TransferNet, task: str, shared: Sequence[bool], specific: Sequence[bool]
) -> dict[str, list[nn.Parameter]]:
    """The trainable parameters of each part of a task's network, of the stages that use it."""
    parts: dict[str, Iterable[nn.Module | None]] = {
        "shared stages": compress(net.shared, shared),
        "head": [net.heads[task]],
        "specific branches": compress(net.specific[task], specific),
        "adapters": compress(net.adapters[task], shared),
    }
    found = {}
    for part, modules in parts.items():
        own = parameters_in(*[module for module in modules if module is not None])
        trainable = [p for p in own if p.requires_grad and not p.is_inference()]
        if trainable:
            found[part] = trainable
    return found
