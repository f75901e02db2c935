"""Additive parameter decomposition: every task masks shared kernels and adds kernels of its own."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lasem_fast._called_with import called_with
from lasem_fast._numbers import finite_number
from lasem_fast.comparators.task_net import TaskNet, TaskNetMethod, listed_stages
from lasem_fast.lifelong.task_data import Task
from lasem_fast.networks.task_modules import TaskModules
from lasem_fast.transfer.mechanism import inner_name

_SD = 0.05
_MASKED = (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.Linear)


class APDNet(TaskNetMethod):
    """APD-Net as the LASEM authors' release has it.

    The weight of every convolution and linear layer is, for task t, ``shared * sigmoid(M_t) +
    tau_t`` with M_t and tau_t of the weight's full shape, drawn from a truncated normal
    distribution (sd 0.05); biases, and parameters of other layers, are shared as they are. All
    tasks train the shared weights. The loss is

        CE + sparsity mean_l(mean |tau_l|) + drift mean_i(||theta_i - theta_i'||^2 / (2 n_i)),

    where l runs over the weighted layers, i over the shared tensors (n_i numbers each, biases too),
    and theta_i' is the value at the end of the task before; the first task has no drift term.

    The release computes no drift term: it has the weight 100, but what it compares with comes out
    empty. So here it is off unless ``drift_active``. Of the paper, the release has neither the
    retroactive update of earlier tasks' M and tau, nor their clustering, nor masks per output
    channel; shared weights that drift do change what earlier tasks compute.

    A resumed run makes the same object, calls `add_task` for the same tasks and loads the module's
    state.

    Args:
        stages: any modules; they become the shared ones.
        sparsity: weight of the l1 term, at least 0.
        drift: weight of the drift term, at least 0.
        drift_active: whether there is a drift term.

    Raises:
        TypeError, ValueError: an argument is not as described.

    Source: Yoon, Kim, Yang, Hwang, "Scalable and Order-robust Continual Learning with Additive
    Parameter Decomposition", ICLR 2020; the release of LASEM for what is computed.
    """

    module: DecomposedNet

    def __init__(
        self,
        stages: Iterable[nn.Module],
        *,
        sparsity: float = 4e-4,
        drift: float = 100.0,
        drift_active: bool = False,
    ) -> None:
        if not isinstance(drift_active, bool):
            raise TypeError(
                f"drift_active: expected True or False, got {type(drift_active).__name__}"
            )
        self.sparsity = finite_number(sparsity, "sparsity", zero=True)
        self.drift = finite_number(drift, "drift", zero=True) if drift_active else 0.0
        super().__init__(DecomposedNet(stages, remembers=drift_active))

    def add_task(self, task: Task, head: nn.Module) -> list[nn.Parameter]:
        """Adds a task; gives the shared weights, the task's masks and additions, and the head's."""
        return self.module.add_task(task.name, head)

    def loss(self, x: Tensor, y: Tensor, task: str) -> Tensor:
        """Cross-entropy with the terms of the class's docstring."""
        net = self.module
        added = net.additions[task].parameters()
        terms = [tau.abs().mean() for tau in added]
        loss = F.cross_entropy(net(x, task), y)
        if terms:
            loss = loss + self.sparsity * torch.stack(terms).mean()
        if self.drift and (moved := net.drifts(task)):
            loss = loss + self.drift * torch.stack(moved).mean()
        return loss


class DecomposedNet(TaskNet):
    """Shared stages, and masks and additions per task.

    Attributes:
        shared: the stages.
        masks: ``masks[task]``: M of every weighted layer, in the order of the layers.
        additions: ``additions[task]``: tau likewise.
        previous: ``previous[task]``: the shared tensors as they were when the task before ended;
            empty for the first one and where nothing is to be remembered.
    """

    def __init__(self, stages: Iterable[nn.Module], *, remembers: bool) -> None:
        super().__init__()
        self.shared = nn.ModuleList(listed_stages(stages))
        self.masks = TaskModules()
        self.additions = TaskModules()
        self.previous = TaskModules()
        self.remembers = remembers

    def add_task(self, task: str, head: nn.Module) -> list[nn.Parameter]:
        """Adds a task; gives what is to be trained."""
        self.check_new_task(task, head)
        weights = [layer.weight for stage in self.shared for _, layer in _weighted(stage)]
        self.masks[task] = _drawn_like(weights)
        self.additions[task] = _drawn_like(weights)
        self.previous[task] = _Copies(self.shared.parameters() if self._looks_back() else [])
        self.enter(task, head)
        parts = (self.shared, self.masks[task], self.additions[task], head)
        return [p for part in parts for p in part.parameters() if p.requires_grad]

    def _looks_back(self) -> bool:
        return self.remembers and len(self.tasks) > 0

    def forward(self, x: Tensor, task: str) -> Tensor:
        """The head's output ``[N, K]`` of a task."""
        masks, additions = iter(self.masks[task]), iter(self.additions[task])
        h = x
        for stage in self.shared:
            tensors: dict[str, Any] = {
                inner_name(name, "weight"): layer.weight * next(masks).sigmoid() + next(additions)
                for name, layer in _weighted(stage)
            }
            h = called_with(stage, tensors, (h,))
        return self.heads[task](h)

    def drifts(self, task: str) -> list[Tensor]:
        """``||theta - theta'||^2 / (2 n)`` of every shared tensor; [] for the first task."""
        then = list(self.previous[task].buffers())
        now = list(self.shared.parameters())[: len(then)]
        return [(a - b).square().mean() / 2 for a, b in zip(now, then, strict=True)]

    def end(self, task: str) -> None:
        super().end(task)
        self.previous[task] = _Copies([])
        for waiting in [t for t in self.tasks if self.remembers and not self.has_ended(t)]:
            self.previous[waiting] = _Copies(self.shared.parameters())

    def restore_structure(self, state: dict[str, Any]) -> None:
        super().restore_structure(state)
        for number, (task, ended) in enumerate(self._ended.items()):
            needed = self.remembers and number > 0 and not ended
            self.previous[task] = _Copies(self.shared.parameters() if needed else [])


class _Copies(nn.Module):
    """Detached copies of tensors, as buffers."""

    def __init__(self, tensors: Iterable[Tensor]) -> None:
        super().__init__()
        for i, tensor in enumerate(tensors):
            self.register_buffer(str(i), tensor.detach().clone())


def _weighted(stage: nn.Module) -> list[tuple[str, nn.Module]]:
    """The layers whose weights are decomposed, with their names inside the stage."""
    return [(name, layer) for name, layer in stage.named_modules() if isinstance(layer, _MASKED)]


def _drawn_like(weights: list[Tensor]) -> nn.ParameterList:
    drawn = [torch.empty_like(weight.detach()) for weight in weights]
    for tensor in drawn:
        nn.init.trunc_normal_(tensor, std=_SD, a=-2 * _SD, b=2 * _SD)
    return nn.ParameterList(nn.Parameter(tensor) for tensor in drawn)
