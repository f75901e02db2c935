"""Dynamically expandable networks: retrain what is needed, add units, split those that drift."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from itertools import accumulate
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim import Optimizer

from lasem_fast._numbers import finite_number, whole_number
from lasem_fast.comparators.den_growth import expand, remove_useless, select_units, split
from lasem_fast.comparators.den_net import GrowingNet
from lasem_fast.comparators.den_training import Weights, penalty, shrink_weights, trained
from lasem_fast.comparators.task_net import TaskNetMethod, check_mini_batch
from lasem_fast.configs import Configuration
from lasem_fast.lifelong.method import Phase, StepResult
from lasem_fast.lifelong.task_data import Task
from lasem_fast.networks.saved import all_or_nothing

PHASES = ("select", "retrain", "expand", "drift", "settle")


class DEN(TaskNetMethod):
    """Dynamically expandable network (DEN), for stages of one convolution or linear layer each.

    Units are a convolution's channels and a linear layer's outputs; what the paper calls the top
    layer is the first layer of a task's head. The first task trains all weights with an l1 penalty
    (Eq. 2). The epochs of every later task are cut into five phases by ``phases``, each of at least
    one epoch:

    1. *select*: the head alone, its first layer with l1 (Eq. 3). Then the units from which the
       head can be reached over weights other than 0 are selected (Algorithm 2).
    2. *retrain*: the weights between selected units, their biases, and the head, with l2 (Eq. 4).
    3. *expand*: only if the mean loss of the last epoch is above ``loss_threshold``: every stage
       gets ``expansion`` new units; their weights alone, in and out, are trained with l1 and group
       lasso on each unit's incoming weights (Eq. 5). Then new units without incoming weights are
       removed. Otherwise these epochs go to the next phase.
    4. *drift*: all weights, held to their values before the task (Eq. 6). Then old units whose
       incoming weights have moved by more than ``split_threshold`` are split: see
       :func:`~lasem_fast.comparators.den_growth.split`.
    5. *settle*: Eq. 6 again.

    A task is evaluated with the units that there were when it ended (the paper's timestamps). Old
    units that are retrained and not split do change what earlier tasks compute.

    The l1 and group lasso penalties are proximal steps behind the optimiser's, so that weights
    become 0. ``shrinkage="objective"`` takes the learning rate times the penalty's weight, which
    minimises the paper's objectives; ``"per_step"`` takes the weight itself, as the code of DEN's
    authors does. With the first and a weight of 1e-6, hardly any weight becomes 0; ``zero`` says
    from which size on a weight counts as a connection.

    The optimiser's state is cleared at the beginning of every phase. What a phase does not train
    keeps its values bit for bit, whatever the optimiser.

    A resumed run makes the same object, calls `add_task` for the same tasks (the net has then its
    first width), loads the module's state, which brings widths and phase, and then the optimiser's.
    Parameters stay the same objects when they change shape, in `begin_epoch` and `end_task`.

    LASEM's authors have not released their DEN. Theirs are the defaults of the penalties' weights,
    ``loss_threshold`` and ``expansion``; what their two sparsity thresholds (0.98, 0.01) mean is
    not known. ``split_threshold`` and a limit on splits are from the code of DEN's authors, which
    takes, of the units above the threshold, those that moved least. The phases' lengths are ours.

    Args:
        stages: each one convolution or linear layer between layers without parameters.
        expansion: new units per stage; the paper's k. LASEM: 16 for CIFAR-100, 32 for Office-Home.
        l1: weight of Eq. 2, 3 and 5, at least 0.
        l2: weight of half the squares in Eq. 4, at least 0.
        group_lasso: weight of Eq. 5's groups, at least 0.
        regularization: weight of half the squares in Eq. 6, at least 0.
        loss_threshold: tau, at least 0.
        split_threshold: sigma, at least 0.
        max_splits: how many units per stage a task may split; None: ``expansion``.
        zero: at least 0.
        phases: lengths of the five phases, any unit, above 0.
        shrinkage: ``"objective"`` or ``"per_step"``.
        init: draws new units' weights in place, for example
            :func:`lasem_fast.initialisers.release_`; None: the layers' own rule.

    Raises:
        TypeError, ValueError: an argument is not as described.

    Source: Yoon, Yang, Lee, Hwang, "Lifelong Learning with Dynamically Expandable Networks", ICLR
    2018.
    """

    module: GrowingNet
    grows = True
    least_epochs = len(PHASES)

    def __init__(
        self,
        stages: Iterable[nn.Module],
        *,
        expansion: int = 16,
        l1: float = 1e-6,
        l2: float = 0.01,
        group_lasso: float = 0.8,
        regularization: float = 0.5,
        loss_threshold: float = 0.01,
        split_threshold: float = 0.05,
        max_splits: int | None = None,
        zero: float = 0.0,
        phases: Sequence[float] = (0.1, 0.4, 0.2, 0.1, 0.2),
        shrinkage: str = "objective",
        init: Callable[[nn.Module], object] | None = None,
    ) -> None:
        def number(value: Any, name: str) -> float:
            return finite_number(value, name, zero=True)

        self.expansion = whole_number(expansion, "expansion")
        self.weights = Weights(
            number(l1, "l1"), number(l2, "l2"), number(group_lasso, "group_lasso"),
            number(regularization, "regularization"),
        )  # fmt: skip
        self.loss_threshold = number(loss_threshold, "loss_threshold")
        self.split_threshold = number(split_threshold, "split_threshold")
        self.max_splits = self.expansion
        if max_splits is not None:
            self.max_splits = whole_number(max_splits, "max_splits", least=0)
        self.zero = number(zero, "zero")
        self.phases = _checked_phases(phases)
        if shrinkage not in ("objective", "per_step"):
            raise ValueError(f"shrinkage: expected 'objective' or 'per_step', got {shrinkage!r}")
        self.shrinkage = shrinkage
        super().__init__(GrowingNet(stages, init))

    def add_task(self, task: Task, head: nn.Module) -> list[nn.Parameter]:
        """Adds a task; gives the weights of all stages and the head's.

        The head is one for the net as it was given: a linear layer, or an ``nn.Sequential`` whose
        first layer with parameters is one. It is widened to the net's present units. A task that is
        added while another is open waits for that one's end.
        """
        return self.module.add_task(task.name, head)

    def begin_epoch(self, task: Task, phase: Phase) -> None:
        """Begins the phases that are due.

        Raises:
            ValueError: a task after the first has less than five epochs.
        """
        net = self.module
        net.check_current(task.name)
        if net.phase != "first":
            if phase.epochs < len(PHASES):
                raise ValueError(
                    f"epochs: expected at least {len(PHASES)}, one for each of DEN's phases, got "
                    f"{phase.epochs}"
                )
            due = sum(phase.epoch > end for end in self._ends(phase.epochs))
            while PHASES.index(net.phase) < due:
                self._advance(task.name)
        net.loss_sum.zero_()
        net.batches.zero_()

    def _ends(self, epochs: int) -> list[int]:
        """The last epoch of each phase but the last; every phase has one at least."""
        share = sum(self.phases)
        ends: list[int] = []
        for i, length in enumerate(accumulate(self.phases[:-1])):
            least = ends[-1] + 1 if ends else 1
            most = epochs - (len(PHASES) - 1 - i)
            ends.append(min(max(round(epochs * length / share), least), most))
        return ends

    def _advance(self, task: str) -> None:
        """Ends the present phase and begins the next."""
        net = self.module
        following = PHASES[PHASES.index(net.phase) + 1]
        if net.phase == "select":
            net.selected = select_units(net, task, self.zero)
        elif net.phase == "retrain":
            if float(net.loss_sum / net.batches.clamp(min=1)) > self.loss_threshold:
                expand(net, task, self.expansion)
            else:
                following = "drift"
        elif net.phase == "expand":
            remove_useless(net, task, self.zero)
        elif net.phase == "drift":
            split(net, task, self.split_threshold, self.max_splits)
        net.set_phase(following)

    def step(self, x: Tensor, y: Tensor, task: str, optimizer: Optimizer) -> StepResult:
        """One mini-batch of the present phase; the loss that it gives is the cross-entropy.

        Raises:
            TypeError, ValueError: an argument is not as described, or the task has ended.
        """
        net = self.module
        net.check_current(task)
        check_mini_batch(x, y)
        if net.is_new_phase:
            optimizer.state.clear()
            net.is_new_phase = False
        optimizer.zero_grad()
        mask = trained(net, task)
        loss = F.cross_entropy(net(x, task), y)
        (loss + penalty(net, self.weights, mask)).backward()
        held = _hold(net, mask)
        optimizer.step()
        with torch.no_grad():
            for p, where, value in held:
                p.copy_(value if where is None else torch.where(where, p, value))
        objective = self.shrinkage == "objective"
        scale = float(optimizer.param_groups[0]["lr"]) if objective else 1.0
        shrink_weights(net, task, self.weights, mask, scale)
        with torch.no_grad():
            net.loss_sum += loss.detach()
            net.batches += 1
        return StepResult(loss.detach())

    def end_task(self, task: Task) -> Configuration | None:
        """Ends a task; new units that are useless are removed if it ends while the net expands."""
        net = self.module
        net.check_current(task.name)
        with all_or_nothing(net):  # heads of tasks that wait are widened by an initialiser
            if net.phase == "expand":
                remove_useless(net, task.name, self.zero)
            net.end(task.name)
        return None


def _hold(net: GrowingNet, mask: dict) -> list[tuple[nn.Parameter, Tensor | None, Tensor]]:
    """What is to be put back behind the optimiser's step; frees gradients of what it is to skip."""
    held = []
    for p in net.parameters():
        if p not in mask:
            p.grad = None
        elif mask[p] is not None:
            held.append((p, mask[p], p.detach().clone()))
    return held


def _checked_phases(phases: Any) -> tuple[float, ...]:
    listed = isinstance(phases, Sequence) and not isinstance(phases, (str, bytes))
    if not listed or len(phases) != len(PHASES):
        raise ValueError(
            f"phases: expected {len(PHASES)} lengths, of {', '.join(PHASES)}, got {phases!r}"
        )
    return tuple(finite_number(length, "phases") for length in phases)
