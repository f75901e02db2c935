"""What a training run over a sequence of tasks asks of a method."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple, Protocol

import torch
from torch import Tensor, nn

from lasem_fast.configs import Configuration
from lasem_fast.lifelong.task_data import Task
from lasem_fast.net import TransferNet

Optimizer = torch.optim.Optimizer


class Phase(NamedTuple):
    """Where a task's training stands; ``epoch`` counts from 1 to ``epochs``."""

    epoch: int
    epochs: int


class StepResult(NamedTuple):
    """Of one mini-batch: the loss, detached, and the posterior ``[C]`` where there is one."""

    loss: Tensor
    posterior: Tensor | None = None


class Method(Protocol):
    """One way to train a network on tasks that come one after the other.

    The run makes the object once, then for every task: `add_task`, for every epoch `begin_epoch`
    and `step` for every mini-batch, accuracies from `logits` in evaluation mode in between, and
    `end_task`. `module` holds all weights and all state of training that a resumed run needs
    (``state_dict``), except the optimiser that the run made.

    A run that is resumed makes the object anew, calls `add_task` for every task that had begun,
    with other random numbers, then ``module.load_state_dict``, and restores ``requires_grad`` and
    the train or eval mode of all inside ``module``, the optimiser and PyTorch's random state. It
    does not call `end_task` for tasks that had ended.

    Attributes:
        module: what is moved to a device, put into train or eval mode, saved and loaded.
        labels: of the configurations that a posterior is over; [] where there is none.

    A method whose network changes size while a task is trained may say so by ``grows = True``: a
    prediction of its time then goes through the epochs of some tasks, with a mini-batch in each.
    One that cannot train a later task in fewer epochs may say in how many by ``least_epochs = 5``:
    a sequence of several tasks with fewer is then refused before anything is trained.
    """

    module: nn.Module
    labels: list[str]

    def add_task(self, task: Task, head: nn.Module) -> list[nn.Parameter]:
        """Makes room for a task; gives what the run's optimiser is to train, made anew per task."""

    def begin_epoch(self, task: Task, phase: Phase) -> None:
        """Told before every epoch; a method that trains in phases changes its own here."""

    def step(self, x: Tensor, y: Tensor, task: str, optimizer: Optimizer) -> StepResult:
        """One mini-batch: forward, backward and the optimiser's step."""

    def config(self, task: str) -> Configuration | None:
        """The configuration that is best now or was kept; None for a method without."""

    def prior(self, task: str) -> list[float]:
        """Probabilities ``[C]`` of the configurations so far; [] for a method without."""

    def end_task(self, task: Task) -> Configuration | None:
        """Ends a task: chooses, rolls back and drops, as the method has it."""

    def logits(self, x: Tensor, task: str) -> Tensor:
        """Outputs ``[N, n_classes]`` as they stand now."""

    def kept_parameters(self) -> int:
        """How many numbers have to be kept to solve all tasks so far, heads included."""


class TryingMethod(Method, Protocol):
    """A method that trains a task once in each of several configurations and keeps the best.

    For every task the run asks for `candidates` after `add_task`. Every candidate is trained in a
    trial of its own: from the state before the task, by `try_out` and then as any method. The one
    with the highest best-epoch validation accuracy, the first on ties, is adopted: the weights that
    its trial ended with. Trials may run in other processes, and a run may be resumed in between.
    """

    def candidates(self, task: Task) -> Sequence[Configuration]:
        """What to try for a task that has been added, at least one."""

    def try_out(self, task: Task, config: Configuration) -> list[nn.Parameter]:
        """Makes ready to train the task in a configuration; gives what the optimiser trains."""


MethodFactory = Callable[[Callable[[], TransferNet]], Method]
"""Makes a method, given a function that gives a new net without tasks, on the run's device.

The function may be called any number of times, also later. A factory may have a ``name``, which the
record bears; otherwise it bears the ``__name__``.
"""
