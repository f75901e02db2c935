"""LASEM: the configuration of every task is searched for while it is trained."""

from __future__ import annotations

from torch import Tensor, nn

from lasem_fast.configs import Configuration
from lasem_fast.em import LASEM
from lasem_fast.lifelong.method import Optimizer, Phase, StepResult
from lasem_fast.lifelong.task_data import Task


class Search:
    """Training by EM over the configurations of ``em``'s space (Algorithm 1 of the paper)."""

    def __init__(self, em: LASEM) -> None:
        self.module = em
        self.labels = [em.space.label(row) for row in range(len(em.space))]

    def add_task(self, task: Task, head: nn.Module) -> list[nn.Parameter]:
        self.module.net.add_task(task.name, head)
        return self.module.net.task_parameters(task.name)

    def begin_epoch(self, task: Task, phase: Phase) -> None:
        """Nothing: every epoch is like the one before."""

    def step(self, x: Tensor, y: Tensor, task: str, optimizer: Optimizer) -> StepResult:
        optimizer.zero_grad()
        found = self.module(x, y, task=task)
        found.loss.backward()
        optimizer.step()
        return StepResult(found.loss.detach(), found.posterior.detach())

    def config(self, task: str) -> Configuration:
        return self.module.best_config(task)

    def prior(self, task: str) -> list[float]:
        return self.module.prior(task).tolist()

    def end_task(self, task: Task) -> Configuration:
        return self.module.end_task(task.name)

    def logits(self, x: Tensor, task: str) -> Tensor:
        return self.module.net(x, task, config=self.config(task))

    def kept_parameters(self) -> int:
        net = self.module.net
        kept = {p for task in net.tasks for p in net.task_parameters(task)}
        return sum(p.numel() for p in kept)
