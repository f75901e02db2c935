"""The ablation of LASEM's search: every mini-batch follows one prescribed posterior."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from lasem_fast._numbers import finite_number
from lasem_fast.configs import ConfigSpace, Configuration
from lasem_fast.em import LASEM
from lasem_fast.lifelong.method import StepResult
from lasem_fast.lifelong.methods.on_net import OnNet
from lasem_fast.lifelong.task_data import Task
from lasem_fast.net import TransferNet
from lasem_fast.transfer import TransferMechanism


class FixedProbability(OnNet):
    """M-steps under a fixed posterior: P for one configuration, the rest in equal parts.

    Every mini-batch is an M-step (dropout on, one forward, no E-step) whose gradient is the sum of
    all configurations' gradients, weighted by P for ``config`` and by (1 - P) / (C - 1) for each of
    the C - 1 others. The end of a task keeps the most probable configuration (the lowest row on
    ties), with LASEM's roll-back. With P = 1 that is training of one configuration from the start.

    A resumed run makes the same object, calls `add_task` for the same tasks and loads the module's
    state.

    Args:
        stages: as in :class:`~lasem_fast.net.TransferNet`.
        transfer: as in `TransferNet`; the paper's ablation is on ``"dfcnn"``.
        config: the configuration that P is for: bits, a set of 1-based stages, or its row in the
            space.
        probability: P, from 0 to 1; 1 if there is no other configuration. The paper: 0.5 to 1.
        space: the configurations that have a probability; None: all 2^d.
        redraw_unclaimed: as in :class:`~lasem_fast.em.LASEM`; True in the release.
        backend: as in `LASEM`.

    Raises:
        TypeError, ValueError: an argument is not as described.

    Attributes:
        module: the `LASEM` that does the M-steps.
        labels: of the space's configurations.

    Source: LASEM (Lee, Behpour, Eaton, ICML 2021), section 4.3.
    """

    def __init__(
        self,
        stages: Iterable[nn.Module],
        transfer: str | TransferMechanism = "hps",
        *,
        config: Any,
        probability: float,
        space: ConfigSpace | None = None,
        redraw_unclaimed: bool = True,
        backend: str = "auto",
    ) -> None:
        net = TransferNet(stages, transfer)
        super().__init__(net)
        space = ConfigSpace(net.depth) if space is None else space
        self.module = LASEM(
            net, space, "mean", "uniform", backend, redraw_unclaimed=redraw_unclaimed
        )
        self.labels = [space.label(row) for row in range(len(space))]
        self.probabilities = _probabilities(probability, space.index(config), len(space))

    def step(self, x: Tensor, y: Tensor, task: str, optimizer: Optimizer) -> StepResult:
        """One M-step; a task that has ended trains the configuration that it kept."""
        optimizer.zero_grad()
        frozen = None
        if self.module.net.config(task) is None:
            frozen = self.probabilities.to(next(self.module.net.parameters()))
        step = self.module(x, y, task, posterior=frozen)
        step.loss.backward()
        optimizer.step()
        return StepResult(step.loss.detach(), step.posterior)

    def config(self, task: str) -> Configuration:
        """The most probable configuration, or the one that was kept."""
        kept = self.module.net.config(task)
        return self.module.space[int(self.probabilities.argmax())] if kept is None else kept

    def prior(self, task: str) -> list[float]:
        """The fixed probabilities ``[C]``."""
        self.module.net.config(task)
        return self.probabilities.tolist()

    def end_task(self, task: Task) -> Configuration:
        """Keeps the most probable configuration and rolls back what that does not share."""
        return self.module.end_task(task.name, self.config(task.name))


def _probabilities(probability: Any, row: int, n_configs: int) -> Tensor:
    """P at ``row`` and the rest in equal parts, float64 ``[C]``."""
    probability = finite_number(probability, "probability", zero=True)
    if probability > 1:
        raise ValueError(f"probability: expected a number from 0 to 1, got {probability!r}")
    if n_configs == 1 and probability != 1:
        raise ValueError(
            f"probability: expected 1, because the space has no other configuration, got "
            f"{probability!r}"
        )
    rest = (1 - probability) / max(1, n_configs - 1)
    probabilities = torch.full((n_configs,), rest, dtype=torch.float64)
    probabilities[row] = probability
    return probabilities
