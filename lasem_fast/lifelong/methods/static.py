"""One prescribed configuration for every task: the paper's static comparators."""

from __future__ import annotations

from typing import Any

import torch.nn.functional as F
from torch import Tensor

from lasem_fast.configs import Configuration, parse_config
from lasem_fast.lifelong.method import Optimizer, StepResult
from lasem_fast.lifelong.methods.on_net import OnNet
from lasem_fast.lifelong.task_data import Task
from lasem_fast.net import TransferNet


class Static(OnNet):
    """Training of one configuration by cross-entropy, without search or roll-back.

    Args:
        net: a new net without tasks.
        config: the configuration of all tasks: bits, a row number of the full space or a set of
            1-based shared stages.

    What sharing a stage adds to the loss (the auxiliary loss of ``tf``) belongs to it.
    """

    def __init__(self, net: TransferNet, config: Any) -> None:
        super().__init__(net)
        self.module = net
        self.labels: list[str] = []
        self._config = parse_config(config, net.depth)

    def step(self, x: Tensor, y: Tensor, task: str, optimizer: Optimizer) -> StepResult:
        return StepResult(trained(self.module, x, y, task, self._config, optimizer))

    def config(self, task: str) -> Configuration:
        return self._config

    def prior(self, task: str) -> list[float]:
        return []

    def end_task(self, task: Task) -> Configuration:
        self.module.keep(task.name, self._config)
        return self._config


def trained(
    net: TransferNet, x: Tensor, y: Tensor, task: str, config: Configuration, optimizer: Optimizer
) -> Tensor:
    """One plain training step of a configuration; its loss, detached."""
    optimizer.zero_grad()
    loss = F.cross_entropy(net(x, task, config=config), y)
    for shares, term in zip(config, net.auxiliary_losses(task), strict=True):
        if shares and term is not None:
            loss = loss + term
    loss.backward()
    optimizer.step()
    return loss.detach()
