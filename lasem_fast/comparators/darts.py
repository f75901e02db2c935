"""DARTS as a search for what to share: one relaxed choice between two branches per stage."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim import Optimizer

from lasem_fast._numbers import finite_number
from lasem_fast.comparators.darts_gradients import Batch, Difference, first_order, second_order
from lasem_fast.comparators.darts_net import MixedNet
from lasem_fast.comparators.task_net import check_mini_batch
from lasem_fast.configs import Configuration
from lasem_fast.lifelong.method import Phase, StepResult
from lasem_fast.lifelong.methods.on_net import OnNet
from lasem_fast.lifelong.task_data import Task
from lasem_fast.net import TransferNet
from lasem_fast.transfer import TransferMechanism


class DARTS(OnNet):
    """Differentiable choice between shared and specific branch, stage by stage.

    A stage's output is ``pool(a_0 act(specific(h)) + a_1 act(shared(h)))`` with a the softmax of
    the stage's selection, two numbers from 0 on. Every mini-batch is a step of the selections and
    then one of the weights, by two optimisers. Evaluation is of the network that takes the larger
    selection of every stage, specific on ties; that configuration is kept at the end of a task,
    with LASEM's roll-back. A stage that is not one weighted layer in an ``nn.Sequential`` is mixed
    as a whole, behind its pooling.

    The defaults are the release's: the selections' gradient comes from the training mini-batch
    itself. `selection_batch="valid"` draws, for every step, as many of the task's validation
    samples without replacement (PyTorch's random state), as Liu et al. have it; accuracies on them
    are then no longer of unseen samples. `difference` says how the second order is computed:

    - ``"release"``: see :func:`~lasem_fast.comparators.darts_gradients.second_order`. There the
      difference is taken around the unrolled weights, with a step per tensor, and the steps are
      paired with the selections by position: stage l's difference is divided by the step of the
      l-th tensor of shared weights and biases.
    - ``"paper"``: one central difference over all weights (their Eq. 7 and 8).

    A resumed run makes the same object, calls `add_task` for the same tasks, loads the module's
    state, and calls `begin_epoch` before the next step where `selection_batch` is ``"valid"``. The
    state of the selections' optimiser is in the module's.

    Args:
        stages: as in :class:`~lasem_fast.net.TransferNet`.
        transfer: as in `TransferNet`; the release has ``"hps"`` and ``"dfcnn"``.
        order: 1, or 2: the gradient one step of the weights ahead. The release has 2 for hps only.
        difference: ``"release"`` or ``"paper"``; of order 2.
        selection_batch: ``"train"`` or ``"valid"``.
        xi: size of the step ahead, at least 0. None: the weights' learning rate at the time. The
            release takes the one it began with, without decay.
        selection_optimizer: from a list with the selection's parameter to an optimiser, whose
            learning rate is its own matter; a new one for every task. None: one of the kind and
            with the settings of the weights' optimiser, whose learning rate it follows.
        redraw_unclaimed: as in :class:`~lasem_fast.em.LASEM`; True in the release.

    Raises:
        TypeError, ValueError: an argument is not as described.

    Attributes:
        module: the branches, heads and selections.
        labels: []; a selection is no posterior over configurations.

    Source: Liu, Simonyan, Yang, "DARTS: Differentiable Architecture Search", ICLR 2019; the release
    of LASEM for the mixture and its defaults.
    """

    def __init__(
        self,
        stages: Iterable[nn.Module],
        transfer: str | TransferMechanism = "hps",
        *,
        order: int = 1,
        difference: Difference = "release",
        selection_batch: str = "train",
        xi: float | None = None,
        selection_optimizer: Callable[[list[nn.Parameter]], Optimizer] | None = None,
        redraw_unclaimed: bool = True,
    ) -> None:
        _check_one_of(order, "order", (1, 2))
        _check_one_of(difference, "difference", ("release", "paper"))
        _check_one_of(selection_batch, "selection_batch", ("train", "valid"))
        if selection_optimizer is not None and not callable(selection_optimizer):
            raise TypeError(
                f"selection_optimizer: expected a function or None, got "
                f"{type(selection_optimizer).__name__}"
            )
        if not isinstance(redraw_unclaimed, bool):
            raise TypeError(
                f"redraw_unclaimed: expected True or False, got {type(redraw_unclaimed).__name__}"
            )
        self.order, self.difference, self.selection_batch = order, difference, selection_batch
        self.xi = None if xi is None else finite_number(xi, "xi", zero=True)
        self.redraw_unclaimed = redraw_unclaimed
        net = TransferNet(stages, transfer)
        tensors = sum(p.requires_grad for p in net.shared.parameters())
        if order == 2 and difference == "release" and tensors < net.depth:
            raise ValueError(
                f"difference: expected 'paper' for {net.depth} stages that share only {tensors} "
                f"trained tensors, because the release pairs each stage with one; got 'release'"
            )
        super().__init__(net)
        self.module = MixedNet(net)
        self.labels: list[str] = []
        self._make_optimizer = selection_optimizer
        self._valid: tuple[str, Batch] | None = None

    def add_task(self, task: Task, head: nn.Module) -> list[nn.Parameter]:
        """Adds a task; gives all branches of all stages, the adapters and the head."""
        self.module.add_task(task.name, head)
        return list(self.module.weights(task.name).values())

    def begin_epoch(self, task: Task, phase: Phase) -> None:
        """Remembers the task's validation samples, where selections are trained on them."""
        if self.selection_batch == "valid":
            self._valid = task.name, task.valid

    def step(self, x: Tensor, y: Tensor, task: str, optimizer: Optimizer) -> StepResult:
        """One step of the selections and one of the weights; an ended task trains what it kept.

        Raises:
            TypeError, ValueError: an argument is not as described.
        """
        check_mini_batch(x, y)
        net, ended = self.module.net, self.module.net.config(task) is not None
        batch = None if ended else self._selection_samples(x, y, task)
        before = self.module.rollback.before(task, ended, net.shared)
        self.module.rollback.begin(task, ended, before)
        if batch is not None:
            self._step_selection(task, (x, y), batch, optimizer)
        optimizer.zero_grad()
        if ended:
            loss = F.cross_entropy(net(x, task), y) + self._kept_auxiliary_loss(task)
        else:
            loss = self.module.loss(x, y, task, {}) + self.module.auxiliary_loss(task)
        loss.backward()
        optimizer.step()
        return StepResult(loss.detach())

    def _kept_auxiliary_loss(self, task: str) -> Tensor | float:
        terms = self.module.net.auxiliary_losses(task)
        config = self.module.net.config(task)
        return sum(t for t, shared in zip(terms, config, strict=True) if shared and t is not None)

    def _selection_samples(self, x: Tensor, y: Tensor, task: str) -> Batch:
        if self.selection_batch == "train":
            return x, y
        if self._valid is None or self._valid[0] != task:
            raise ValueError(
                f"selection_batch: expected begin_epoch to have been called for task {task!r}, "
                f"whose validation samples train the selections; got none"
            )
        inputs, targets = self._valid[1]
        rows = torch.randperm(len(inputs), device=inputs.device)[: len(x)]
        return inputs[rows].to(x.device), targets[rows].to(x.device)

    def _step_selection(self, task: str, train: Batch, batch: Batch, optimizer: Optimizer) -> None:
        selection = self.module.selections[task].weight
        stepper = self._stepper(task, optimizer)
        if self.order == 1:
            gradient = first_order(self.module, task, batch)
        else:
            xi = self._learning_rate(optimizer) if self.xi is None else self.xi
            gradient = second_order(self.module, task, train, batch, xi, self.difference)
        selection.grad = gradient
        stepper.step()
        selection.grad = None

    def _stepper(self, task: str, weights: Optimizer) -> Optimizer:
        """The optimiser of the task's selection."""
        if self._make_optimizer is not None:
            return self.module.stepper(task, self._make_optimizer)
        stepper = self.module.stepper(task, lambda params: _alike(weights, params))
        for group in stepper.param_groups:
            group["lr"] = self._learning_rate(weights)
        return stepper

    @staticmethod
    def _learning_rate(optimizer: Optimizer) -> float:
        return float(optimizer.param_groups[0]["lr"])

    def config(self, task: str) -> Configuration:
        """The configuration of the larger selections, or the one that was kept."""
        return self.module.best_config(task)

    def prior(self, task: str) -> list[float]:
        """[]: there is none over configurations."""
        self.module.net.config(task)
        return []

    def end_task(self, task: Task) -> Configuration:
        """Keeps the present configuration and rolls back what that does not share."""
        return self.module.end_task(task.name, self.redraw_unclaimed)


def _alike(optimizer: Optimizer, params: list[nn.Parameter]) -> Optimizer:
    """A new optimiser of the same kind and settings."""
    known = inspect.signature(type(optimizer)).parameters
    settings: dict[str, Any] = {n: v for n, v in optimizer.defaults.items() if n in known}
    return type(optimizer)(params, **settings)


def _check_one_of(value: Any, name: str, known: tuple[Any, ...]) -> None:
    if isinstance(value, bool) or value not in known:
        raise ValueError(f"{name}: expected one of {', '.join(map(repr, known))}, got {value!r}")
