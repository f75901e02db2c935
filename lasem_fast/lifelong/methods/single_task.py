"""A net of its own for every task: nothing is transferred, nothing forgotten."""

from __future__ import annotations

from collections.abc import Callable

import torch.nn.functional as F
from torch import Tensor, nn

from lasem_fast.lifelong.method import Optimizer, Phase, StepResult
from lasem_fast.lifelong.task_data import Task
from lasem_fast.net import TransferNet
from lasem_fast.networks.task_modules import TaskModules


class SingleTask:
    """Single-task learning: the plain stages of a new net, and a head, for every task.

    Args:
        make_net: gives a new net without tasks; called once per task.
    """

    def __init__(self, make_net: Callable[[], TransferNet]) -> None:
        self.module = TaskModules()
        self.labels: list[str] = []
        self._make_net = make_net

    def add_task(self, task: Task, head: nn.Module) -> list[nn.Parameter]:
        net = self._make_net()
        net.add_task(task.name, head)
        # the specific branches are the plain stages, whatever the mechanism makes of shared ones
        self.module[task.name] = nn.Sequential(*net.specific[task.name], head)
        return list(self.module[task.name].parameters())

    def begin_epoch(self, task: Task, phase: Phase) -> None:
        """Nothing: every epoch is like the one before."""

    def step(self, x: Tensor, y: Tensor, task: str, optimizer: Optimizer) -> StepResult:
        optimizer.zero_grad()
        loss = F.cross_entropy(self.module[task](x), y)
        loss.backward()
        optimizer.step()
        return StepResult(loss.detach())

    def config(self, task: str) -> None:
        return None

    def prior(self, task: str) -> list[float]:
        return []

    def end_task(self, task: Task) -> None:
        self.module[task.name].zero_grad()

    def logits(self, x: Tensor, task: str) -> Tensor:
        return self.module[task](x)

    def kept_parameters(self) -> int:
        return sum(p.numel() for p in self.module.parameters())
