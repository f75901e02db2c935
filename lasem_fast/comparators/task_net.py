"""What the comparators' networks have in common: tasks in order, a head for each, which ended."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim import Optimizer

from lasem_fast.configs import Configuration
from lasem_fast.lifelong.method import Phase, StepResult
from lasem_fast.lifelong.task_data import Task
from lasem_fast.networks import checks
from lasem_fast.networks.layers import PlainStage, plain_stage
from lasem_fast.networks.saved import all_or_nothing, packed, unpacked
from lasem_fast.networks.task_modules import TaskModules


class TaskNet(nn.Module):
    """A network with one head per task.

    Saved with it is which tasks have ended. A state is loaded into a net to which the same tasks
    have been added, in the same order; if it is refused, the net is as before.

    Attributes:
        heads: ``heads[task]`` maps the last stage's output to ``[N, K]``.
    """

    def __init__(self) -> None:
        super().__init__()
        self.heads = TaskModules()
        self._ended: dict[str, bool] = {}

    @property
    def tasks(self) -> tuple[str, ...]:
        """Names of all tasks, in the order in which they were added."""
        return tuple(self._ended)

    @property
    def current(self) -> str | None:
        """The first task that has not ended, which is trained; those behind it wait."""
        return next((task for task, ended in self._ended.items() if not ended), None)

    def check_new_task(self, task: str, head: nn.Module) -> None:
        """Raises TypeError or ValueError for a name that is not new or a head that is no module."""
        checks.check_new_task(task, self._ended)
        checks.check_head(head, self)

    def enter(self, task: str, head: nn.Module) -> None:
        """Adds a checked task."""
        self.heads[task] = head
        self._ended[task] = False

    def has_ended(self, task: str) -> bool:
        """Whether a task has ended."""
        checks.check_task(task, self._ended)
        return self._ended[task]

    def check_current(self, task: str) -> None:
        """Raises ValueError unless the task is the first one that has not ended."""
        if self.has_ended(task):
            raise ValueError(f"task: expected one that has not ended, got {task!r}, which has")
        before = list(self.tasks[: self.tasks.index(task)])
        if still := [name for name in before if not self._ended[name]]:
            raise ValueError(
                f"task: expected one whose predecessors have ended, got {task!r} while {still} are "
                f"open; call end_task for them, or load a state in which they had ended"
            )

    def end(self, task: str) -> None:
        """Marks a task as ended."""
        self.check_current(task)
        self._ended[task] = True

    def load_state_dict(
        self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False
    ) -> Any:
        """As :meth:`torch.nn.Module.load_state_dict`; if it is refused, the net is as before."""
        with all_or_nothing(self):
            return super().load_state_dict(state_dict, strict, assign)

    def structure(self) -> dict[str, Any]:
        """What has to be known before values can be loaded, JSON-able."""
        return {"ended": self._ended}

    def restore_structure(self, state: dict[str, Any]) -> None:
        """Brings the net to the structure that a state was saved with."""
        self._ended = dict(state["ended"])

    def get_extra_state(self) -> Tensor:
        """The structure, in a tensor."""
        return packed(self.structure())

    def set_extra_state(self, state: Any) -> None:
        """Restores the structure; the tasks themselves must be there."""
        state = unpacked(state, "ended")
        if list(state["ended"]) != list(self._ended):
            raise ValueError(
                f"state_dict: expected the tasks {list(self._ended)} that this net has, got "
                f"{list(state['ended'])}; call add_task for the same ones before load_state_dict"
            )
        self.restore_structure(state)


class TaskNetMethod:
    """A :class:`~lasem_fast.lifelong.method.Method` without configurations, on a `TaskNet`.

    One mini-batch is one step of the run's optimiser on :meth:`loss`.

    Attributes:
        module: the network, with all state of training.
        labels: [].
    """

    def __init__(self, module: TaskNet) -> None:
        self.module = module
        self.labels: list[str] = []

    def begin_epoch(self, task: Task, phase: Phase) -> None:
        """Nothing changes from one epoch to the next."""

    def loss(self, x: Tensor, y: Tensor, task: str) -> Tensor:
        """What a step minimises, a scalar: cross-entropy."""
        return F.cross_entropy(self.module(x, task), y)

    def step(self, x: Tensor, y: Tensor, task: str, optimizer: Optimizer) -> StepResult:
        """One mini-batch.

        Raises:
            TypeError, ValueError: an argument is not as described, or the task has ended.
        """
        self.module.check_current(task)
        check_mini_batch(x, y)
        optimizer.zero_grad()
        loss = self.loss(x, y, task)
        loss.backward()
        optimizer.step()
        return StepResult(loss.detach())

    def config(self, task: str) -> Configuration | None:
        """None: there are no configurations."""
        self.module.has_ended(task)
        return None

    def prior(self, task: str) -> list[float]:
        """[]: there are no configurations."""
        self.module.has_ended(task)
        return []

    def end_task(self, task: Task) -> Configuration | None:
        """Ends a task."""
        self.module.end(task.name)
        return None

    def logits(self, x: Tensor, task: str) -> Tensor:
        """Outputs ``[N, n_classes]`` of a task, in the module's present mode."""
        self.module.has_ended(task)
        checks.check_batch(x)
        return self.module(x, task)

    def kept_parameters(self) -> int:
        """All weights: every task needs the ones before it, or what all share."""
        return sum(p.numel() for p in self.module.parameters())


def check_mini_batch(x: Tensor, y: Tensor) -> None:
    """Raises TypeError or ValueError for what is no mini-batch with a target per sample."""
    checks.check_batch(x)
    checks.check_target(y, x)


def listed_stages(stages: Iterable[nn.Module]) -> list[nn.Module]:
    """The stages as a list, checked as `TransferNet` checks them."""
    if isinstance(stages, Iterable) and getattr(stages, "ndim", 1) > 0:
        stages = list(stages)
    checks.check_stages(stages)
    return stages


def plain_parts(stage: nn.Module, position: int, method: str) -> PlainStage:
    """The parts of a stage that is one weighted layer between layers without parameters.

    Raises:
        ValueError: the stage is anything else.
    """
    plain = plain_stage(stage)
    if plain is None:
        raise ValueError(
            f"stages[{position}]: expected one convolution (groups=1) or linear layer between "
            f"activations, pooling, dropout and flattening, in one nn.Sequential, because {method} "
            f"works on that layer's units; got {checks.name_of(stage)}"
        )
    return plain
