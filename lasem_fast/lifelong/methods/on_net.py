"""What the methods on a `TransferNet` have in common."""

from __future__ import annotations

from torch import Tensor, nn

from lasem_fast.configs import Configuration
from lasem_fast.lifelong.method import Phase
from lasem_fast.lifelong.task_data import Task
from lasem_fast.net import TransferNet


class OnNet:
    """A method that trains configurations of one net, of which every task keeps one at its end.

    Args:
        net: a new net without tasks; ``module`` is or holds it.
    """

    def __init__(self, net: TransferNet) -> None:
        self.net = net

    def add_task(self, task: Task, head: nn.Module) -> list[nn.Parameter]:
        """Adds a task; gives all branches of all stages, the adapters and the head."""
        self.net.add_task(task.name, head)
        return self.net.task_parameters(task.name)

    def begin_epoch(self, task: Task, phase: Phase) -> None:
        """Nothing: every epoch is like the one before."""

    def config(self, task: str) -> Configuration:
        """The configuration that is best now or was kept."""
        raise NotImplementedError(f"{type(self).__name__} does not define config")

    def logits(self, x: Tensor, task: str) -> Tensor:
        """Outputs ``[N, n_classes]`` of the task's configuration."""
        return self.net(x, task, config=self.config(task))

    def kept_parameters(self) -> int:
        """Of all tasks, each parameter once: what their configurations use, or all while open."""
        kept = {p for task in self.net.tasks for p in self.net.task_parameters(task)}
        return sum(p.numel() for p in kept)
