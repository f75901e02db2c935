"""Progressive neural networks: a column per task, which reads from the frozen ones before it."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn

from lasem_fast._numbers import finite_number
from lasem_fast.comparators.task_net import TaskNet, TaskNetMethod, listed_stages, plain_parts
from lasem_fast.configs import Configuration
from lasem_fast.initialisers import release_
from lasem_fast.lifelong.task_data import Task
from lasem_fast.networks.task_modules import TaskModules
from lasem_fast.transfer import HardParameterSharing
from lasem_fast.transfer.mechanism import copy_of

_SD = 0.05


class ProgNN(TaskNetMethod):
    """Progressive neural networks, with the lateral connections of the LASEM authors' release.

    Layer l >= 1 of the column of a task with t earlier ones adds to its convolution's output,
    before the activation,

        sum over the earlier columns k of  V_k * relu(U_k * (alpha_k h_k) + b_k),

    where h_k is what leaves layer l - 1 of column k for the same input, pooling included; alpha_k
    is a trained scalar; U_k is a 1 x 1 convolution to int(C_in / (scale (t + 1))) channels, at
    least 1; V_k has the layer's own kernel, stride and padding and no bias. For a linear layer U_k
    and V_k are linear. The first layer and the head have no lateral connections. A column is frozen
    when its task ends, so that the outputs of ended tasks never change.

    alpha, U, V are drawn from the release's truncated normal distribution (sd 0.05), b_k is 0.2.

    A resumed run makes the same object, calls `add_task` for the same tasks and loads the module's
    state; which columns are frozen comes with it.

    Args:
        stages: each one convolution or linear layer between layers without parameters. They become
            the first column.
        scale: by how much the lateral connections are narrowed, above 0. The release has 1 and 2.
        init: draws the weights of each further column's stages in place, for example
            :func:`lasem_fast.initialisers.release_`; None: the layers' own rule. As in
            `TransferNet`, parameters that are frozen beside trained ones in the stages as given
            stay so in further columns, unless the layers' own rule draws them.

    Raises:
        TypeError, ValueError: an argument is not as described.

    Source: Rusu et al., "Progressive Neural Networks", arXiv 1606.04671 (2016); the release of
    LASEM for the form of the lateral connections.
    """

    module: ProgressiveNet

    def __init__(
        self,
        stages: Iterable[nn.Module],
        *,
        scale: float = 1.0,
        init: Callable[[nn.Module], object] | None = None,
    ) -> None:
        super().__init__(ProgressiveNet(stages, finite_number(scale, "scale"), init))

    def add_task(self, task: Task, head: nn.Module) -> list[nn.Parameter]:
        """Adds a column; gives its weights, those of its lateral connections and the head's."""
        return self.module.add_column(task.name, head)

    def end_task(self, task: Task) -> Configuration | None:
        """Freezes the task's column and head."""
        self.module.end(task.name)
        return None


class ProgressiveNet(TaskNet):
    """The columns.

    Attributes:
        columns: ``columns[task]`` holds the stages of a task and their lateral connections.
    """

    def __init__(
        self, stages: Iterable[nn.Module], scale: float, init: Callable[[nn.Module], object] | None
    ) -> None:
        super().__init__()
        self._drawing = HardParameterSharing(init)
        self.scale = scale
        self.columns = TaskModules()
        self.given = nn.ModuleList(listed_stages(stages))  # until they are the first column's
        self._trained: list[dict[str, bool]] = []  # of the stages as given: what is not frozen
        for i, stage in enumerate(self.given):
            plain_parts(stage, i, "ProgNN")

    def add_column(self, task: str, head: nn.Module) -> list[nn.Parameter]:
        """Adds a task, with its column; gives what is to be trained."""
        self.check_new_task(task, head)
        before = len(self.tasks)
        if before:
            stages = [self._new_stage(i) for i in range(len(self._trained))]
        else:
            stages, self.given = list(self.given), nn.ModuleList()
            self._trained = [
                {name: p.requires_grad for name, p in stage.named_parameters()} for stage in stages
            ]
        laterals = [
            [_Lateral(stage, i, before, self.scale) for _ in range(before if i else 0)]
            for i, stage in enumerate(stages)
        ]
        column = _Column(stages, laterals)
        self.columns[task] = column.train(self.training)
        self.enter(task, head)
        return [p for part in (column, head) for p in part.parameters() if p.requires_grad]

    def _new_stage(self, i: int) -> nn.Module:
        """A stage with new weights; frozen in it is what was so as given, not what has ended."""
        like = copy_of(self.columns[self.tasks[0]].stages[i])
        for name, parameter in like.named_parameters():
            parameter.requires_grad_(self._trained[i].get(name, parameter.requires_grad))
        return self._drawing.new_specific(like)

    def forward(self, x: Tensor, task: str) -> Tensor:
        """The head's output ``[N, K]`` of a task."""
        below: list[list[Tensor]] = []
        for name in self.tasks:
            below.append(self.columns[name](x, below))
            if name == task:
                break
        return self.heads[task](below[-1][-1])

    def train(self, mode: bool = True) -> ProgressiveNet:
        """As in any module; the columns of ended tasks stay in evaluation mode."""
        super().train(mode)
        for task, ended in self._ended.items():
            if ended:
                self.columns[task].eval()
        return self

    def end(self, task: str) -> None:
        super().end(task)
        self._freeze(task)

    def restore_structure(self, state: dict[str, Any]) -> None:
        super().restore_structure(state)
        for task, ended in self._ended.items():
            if ended:
                self._freeze(task)

    def _freeze(self, task: str) -> None:
        for part in (self.columns[task], self.heads[task]):
            part.zero_grad()
            part.requires_grad_(False)
        self.columns[task].eval()


class _Column(nn.Module):
    """The stages of one task, and from each earlier column a lateral connection into each."""

    def __init__(self, stages: list[nn.Module], laterals: list[list[_Lateral]]) -> None:
        super().__init__()
        self.stages = nn.ModuleList(stages)
        self.laterals = nn.ModuleList(nn.ModuleList(into) for into in laterals)

    def forward(self, x: Tensor, below: list[list[Tensor]]) -> list[Tensor]:
        """What leaves each stage; ``below`` is the same of every earlier column."""
        outputs: list[Tensor] = []
        h = x
        for i, (stage, laterals) in enumerate(zip(self.stages, self.laterals, strict=True)):
            plain = plain_parts(stage, i, "ProgNN")
            h = plain.core(_through(plain.before, h))
            for lateral, column in zip(laterals, below if i else [], strict=True):
                h = h + lateral(_through(plain.before, column[i - 1]))
            h = _through(plain.after, h)
            outputs.append(h)
        return outputs


class _Lateral(nn.Module):
    """``V * relu(U * (alpha h) + b)``."""

    def __init__(self, stage: nn.Module, position: int, before: int, scale: float) -> None:
        super().__init__()
        core = plain_parts(stage, position, "ProgNN").core
        linear = isinstance(core, nn.Linear)
        inputs = core.in_features if linear else core.in_channels
        width = max(1, int(inputs / (scale * (before + 1))))
        self.alpha = nn.Parameter(torch.empty(1))
        nn.init.trunc_normal_(self.alpha, std=_SD, a=-2 * _SD, b=2 * _SD)
        if linear:
            self.narrow: nn.Module = nn.Linear(inputs, width)
            self.widen: nn.Module = nn.Linear(width, core.out_features, bias=False)
        else:
            self.narrow = type(core)(inputs, width, 1)
            self.widen = type(core)(
                width, core.out_channels, core.kernel_size, core.stride, core.padding,
                core.dilation, bias=False, padding_mode=core.padding_mode,
            )  # fmt: skip
        release_(self)
        self.to(core.weight)

    def forward(self, h: Tensor) -> Tensor:
        return self.widen(self.narrow(self.alpha * h).relu())


def _through(layers: Iterable[nn.Module], h: Tensor) -> Tensor:
    for layer in layers:
        h = layer(h)
    return h
