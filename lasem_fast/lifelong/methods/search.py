"""LASEM: the configuration of every task is searched for while it is trained."""

from __future__ import annotations

from torch import Tensor

from lasem_fast.configs import Configuration
from lasem_fast.em import LASEM
from lasem_fast.lifelong.method import Optimizer, StepResult
from lasem_fast.lifelong.methods.on_net import OnNet
from lasem_fast.lifelong.task_data import Task


class Search(OnNet):
    """Training by EM over the configurations of ``em``'s space (Algorithm 1 of the paper)."""

    def __init__(self, em: LASEM) -> None:
        super().__init__(em.net)
        self.module = em
        self.labels = [em.space.label(row) for row in range(len(em.space))]

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
