"""What each open task did to the shared weights, so that the end of a task can take it back.

While one task at a time is trained this is one snapshot: the shared weights before the task. When
mini-batches of several tasks alternate, the change that each of them made is kept apart, and only a
task's own change is taken back.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from lasem_fast.configs import Configuration
from lasem_fast.task_modules import TaskModules


class _Values(nn.Module):
    """Copies of the tensors of the shared stages, as buffers ``[stage][tensor]``."""

    def __init__(self, values: list[list[Tensor]]) -> None:
        super().__init__()
        self.lengths = [len(stage) for stage in values]
        for i, stage in enumerate(values):
            for j, value in enumerate(stage):
                self.register_buffer(f"s{i}_{j}", value)

    def __getitem__(self, stage: int) -> list[Tensor]:
        return [getattr(self, f"s{stage}_{j}") for j in range(self.lengths[stage])]


class Rollback(nn.Module):
    """Keeps the shared weights' last settled values and the changes of the open tasks.

    Invariant: shared = settled + the open tasks' changes + what the active task did since `anchor`.
    """

    def __init__(self) -> None:
        super().__init__()
        self.active: str | None = None
        self.settled: _Values | None = None
        self.anchor: _Values | None = None
        self.changes = TaskModules()

    @property
    def is_idle(self) -> bool:
        """Whether no open task has made a step."""
        return self.settled is None

    def begin(self, task: str, ended: bool, shared: nn.ModuleList) -> None:
        """Says whose step comes next; must be called before the optimiser changes anything."""
        if task == self.active:
            return
        if self.settled is None:
            if not ended:
                self.settled = _Values(_copies(shared))
                self.active = task
            return
        self._attribute(shared)
        self.anchor = _Values(_copies(shared))
        self.active = task
        if not ended and task not in self.changes:
            self.changes[task] = _Values([[torch.zeros_like(t) for t in s] for s in _all(shared)])

    def _attribute(self, shared: nn.ModuleList) -> None:
        """Adds what the active task did since `anchor` to that task's change."""
        anchor = self.settled if self.anchor is None else self.anchor
        change = [
            [now - then for now, then in zip(stage, anchor[i], strict=True)]
            for i, stage in enumerate(_all(shared))
        ]
        if self.anchor is None:
            self.changes[self.active] = _Values(change)
            return
        # A task that has ended keeps what it learns when it comes back.
        target = self.changes[self.active] if self.active in self.changes else self.settled
        for i, stage in enumerate(change):
            for kept, new in zip(target[i], stage, strict=True):
                kept += new

    @torch.no_grad()
    def end(self, task: str, config: Configuration, shared: nn.ModuleList) -> None:
        """Takes back what a task did to the shared weights of the stages that it does not share."""
        if task != self.active and task not in self.changes:
            return  # it made no step
        if self.anchor is not None:
            self._attribute(shared)
        if any(other != task for other in self.changes):
            self._take_back(self.changes[task], config, shared)
            del self.changes[task]
            self.anchor = _Values(_copies(shared))
            self.active = None
        else:
            self._restore(config, shared)
            self._forget()

    def _restore(self, config: Configuration, shared: nn.ModuleList) -> None:
        """With no other task open: exactly the settled values."""
        for i, stage in enumerate(_all(shared)):
            if not config[i]:
                for value, settled in zip(stage, self.settled[i], strict=True):
                    value.copy_(settled)

    def _take_back(self, change: _Values, config: Configuration, shared: nn.ModuleList) -> None:
        for i, stage in enumerate(_all(shared)):
            for value, settled, own in zip(stage, self.settled[i], change[i], strict=True):
                if config[i]:
                    settled += own
                else:
                    value -= own

    def _forget(self) -> None:
        self.active = self.settled = self.anchor = None
        self.changes = TaskModules()

    def structure(self) -> dict[str, Any]:
        """Which copies exist; their values are in the buffers."""
        return {
            "active": self.active,
            "settled": self.settled is not None,
            "anchor": self.anchor is not None,
            "changes": list(self.changes),
        }

    def restore_structure(self, state: dict[str, Any], shared: nn.ModuleList) -> None:
        """Makes the buffers that a saved state has values for."""
        self._forget()
        self.active = state["active"]
        self.settled = _Values(_copies(shared)) if state["settled"] else None
        self.anchor = _Values(_copies(shared)) if state["anchor"] else None
        for task in state["changes"]:
            self.changes[task] = _Values(_copies(shared))


def _all(shared: nn.ModuleList) -> list[list[Tensor]]:
    return [[t.detach() for t in (*s.parameters(), *s.buffers())] for s in shared]


def _copies(shared: nn.ModuleList) -> list[list[Tensor]]:
    return [[t.clone() for t in stage] for stage in _all(shared)]
