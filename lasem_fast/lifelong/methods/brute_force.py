"""Task-wise brute-force search: every configuration is trained, the best by validation is kept."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from lasem_fast.configs import ConfigSpace, Configuration
from lasem_fast.lifelong.method import Optimizer, StepResult
from lasem_fast.lifelong.methods.on_net import OnNet
from lasem_fast.lifelong.methods.static import trained
from lasem_fast.lifelong.task_data import Task
from lasem_fast.net import TransferNet
from lasem_fast.transfer import Branch, HardParameterSharing


class BruteForce(OnNet):
    """The best of all configurations, task after task; 1 + (T - 1) C trainings for T tasks.

    The first task is trained once: with nothing shared under hard parameter sharing, with all
    shared where the shared branch is generated. From the second task on every configuration of the
    space is tried from the same state. What the second task shares is taken over from the first:
    then the first task gets the same configuration, its weights as they are. Shared stages that
    a configuration does not use stay as they are, so there is nothing to roll back.

    Args:
        net: a new net without tasks.
        space: what to try; None: all 2^d configurations.

    Source: the paper's section 5; the procedure of the authors' release.
    """

    def __init__(self, net: TransferNet, space: ConfigSpace | None = None) -> None:
        if space is not None and space.depth != net.depth:
            raise ValueError(
                f"space: expected configurations of the net's {net.depth} stages, got depth "
                f"{space.depth}"
            )
        super().__init__(net)
        self.module = net
        self.labels: list[str] = []
        self.space = ConfigSpace(net.depth) if space is None else space
        self._plain = isinstance(net.mechanism, HardParameterSharing)
        self._first = self.space.bottom(0) if self._plain else self.space.all
        self._trial: Configuration = self._first  # of the task under way

    def candidates(self, task: Task) -> Sequence[Configuration]:
        return [self._first] if task.name == self.module.tasks[0] else self.space.configs

    def try_out(self, task: Task, config: Configuration) -> list[nn.Parameter]:
        first = self.module.tasks[0]
        self._trial = config
        if task.name != first and self.module.config(first) is None:
            self._convert(first, config)
        return self._used_by(task.name)

    @torch.no_grad()
    def _convert(self, first: str, config: Configuration) -> None:
        """Gives the first task this configuration; its outputs stay as they are."""
        net = self.module
        for stage, (shared, specific) in enumerate(net.branches(first)):
            if self._plain and config[stage]:
                net.shared[stage].load_state_dict(net.specific[first][stage].state_dict())
            elif not self._plain and not config[stage]:
                _copy(shared, specific.module)
        net.keep(first, config)

    def step(self, x: Tensor, y: Tensor, task: str, optimizer: Optimizer) -> StepResult:
        return StepResult(trained(self.module, x, y, task, self._trial, optimizer))

    def config(self, task: str) -> Configuration:
        kept = self.module.config(task)
        if kept is not None:
            return kept
        return self._first if task == self.module.tasks[0] else self._trial

    def prior(self, task: str) -> list[float]:
        return []

    def end_task(self, task: Task) -> Configuration:
        """Keeps the configuration on trial; the first task's is open until the second is tried."""
        if task.name != self.module.tasks[0]:
            self.module.keep(task.name, self._trial)
        return self.config(task.name)

    def kept_parameters(self) -> int:
        kept = {p for task in self.module.tasks for p in self._used_by(task)}
        return sum(p.numel() for p in kept)

    def _used_by(self, task: str) -> list[nn.Parameter]:
        """What the task's configuration goes through, each parameter once."""
        net = self.module
        modules: list[nn.Module | None] = [net.heads[task]]
        for stage, shares in enumerate(self.config(task)):
            if shares:
                modules += [net.shared[stage], net.adapters[task][stage]]
            else:
                modules.append(net.specific[task][stage])
        used = [p for module in modules if module is not None for p in module.parameters()]
        return list(dict.fromkeys(used))


def _copy(branch: Branch, to: nn.Module) -> None:
    """Writes the weights in force of a branch into a plain module of the same form."""
    for name, parameter in to.named_parameters():
        value = branch.tensors.get(name)
        parameter.copy_(branch.module.get_parameter(name) if value is None else value)
