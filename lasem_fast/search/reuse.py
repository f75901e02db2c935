"""Posteriors that several mini-batches of a task follow before the next E-step."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from lasem_fast.networks.saved import lasting
from lasem_fast.networks.task_modules import TaskModules, UnderWay


class Posteriors(UnderWay, TaskModules):
    """The posterior of each task's last E-step, and for how many mini-batches it is still good."""

    def __init__(self) -> None:
        super().__init__()
        self.left: dict[str, int] = {}

    def again(self, task: str) -> Tensor | None:
        """The posterior ``[C]`` that the next mini-batch follows; None where it infers its own."""
        return self[task].posterior if self.left.get(task, 0) > 0 else None

    def used(self, task: str) -> None:
        """Counts a mini-batch that followed the posterior."""
        self.left[task] -= 1

    def keep(self, task: str, posterior: Tensor, mini_batches: int) -> None:
        """Keeps a new posterior for the next mini-batches."""
        with lasting():
            kept = nn.Module()
            kept.register_buffer("posterior", posterior.detach().clone())
        self[task] = kept
        self.left[task] = mini_batches

    def forget(self, task: str) -> None:
        """Drops what is kept for a task."""
        if task in self:
            del self[task]
        self.left.pop(task, None)

    def forget_all(self) -> None:
        """Drops everything: every task's next mini-batch infers a posterior of its own."""
        for task in list(self):
            self.forget(task)

    def structure(self) -> dict[str, Any]:
        """Which posteriors are kept; their values are in the buffers."""
        return {task: [self.left[task], str(self[task].posterior.dtype)] for task in self}

    def restore_structure(self, state: dict[str, Any], like: Tensor) -> None:
        """Makes the buffers that a saved state has values for; ``like`` is ``[C, d]``."""
        self.forget_all()
        for task, (left, dtype) in state.items():
            dtype = getattr(torch, dtype.removeprefix("torch."))
            uniform = torch.full((len(like),), 1 / len(like), dtype=dtype, device=like.device)
            self.keep(task, uniform, left)
