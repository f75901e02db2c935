"""A network whose stages mix their shared and their specific branch by trained weights."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim import Optimizer

from lasem_fast._called_with import called_with
from lasem_fast.comparators.optimizer_state import load_plain, to_plain
from lasem_fast.configs import Configuration
from lasem_fast.net import TransferNet
from lasem_fast.networks import checks
from lasem_fast.networks.layers import may_write_input, plain_stage
from lasem_fast.networks.rollback import Rollback
from lasem_fast.networks.saved import all_or_nothing, packed, unpacked
from lasem_fast.networks.task_modules import TaskModules
from lasem_fast.transfer import Branch

SPECIFIC, SHARED = 0, 1  # the release's order inside a selection vector


class MixedNet(nn.Module):
    """A `TransferNet` with a selection per stage of every open task.

    Attributes:
        net: the branches and heads.
        selections: ``selections[task].weight`` is ``[d, 2]``, specific first; gone when the task
            has ended.
        rollback: what an open task did to the shared stages.
    """

    def __init__(self, net: TransferNet) -> None:
        super().__init__()
        self.net = net
        self.selections = TaskModules()
        self.rollback = Rollback()
        self._steppers: dict[str, Optimizer] = {}
        self._loaded: dict[str, Any] = {}  # states of optimisers that are yet to be made

    def add_task(self, task: str, head: nn.Module) -> None:
        """Adds a task to the net, its selection at 0: both branches alike."""
        self.net.add_task(task, head)
        self.selections[task] = _Selection(self.net)

    def stepper(self, task: str, make: Callable[[list[nn.Parameter]], Optimizer]) -> Optimizer:
        """The optimiser of a task's selection, made when first asked for."""
        if task not in self._steppers:
            made = make([self.selections[task].weight])
            if task in self._loaded:
                load_plain(made, self._loaded.pop(task))
            self._steppers[task] = made
        return self._steppers[task]

    def best_config(self, task: str) -> Configuration:
        """The kept configuration, or the larger selection of every stage; ties: specific."""
        kept = self.net.config(task)
        if kept is not None:
            return kept
        weight = self.selections[task].weight
        return tuple((weight[:, SHARED] > weight[:, SPECIFIC]).tolist())

    def forward(self, x: Tensor, task: str) -> Tensor:
        """The mixture's logits ``[N, K]`` for an open task."""
        shares = self.selections[task].weight.softmax(dim=1)
        h = x
        for (shared, specific), share in zip(self.net.branches(task), shares, strict=True):
            h = _mixed(shared, specific, share, h)
        return self.net.heads[task](h)

    def loss(self, x: Tensor, y: Tensor, task: str, tensors: Mapping[str, Tensor]) -> Tensor:
        """Cross-entropy of the mixture with ``tensors`` in the place of the parameters so named."""
        return F.cross_entropy(called_with(self, tensors, (x, task)), y)

    def auxiliary_loss(self, task: str) -> Tensor | float:
        """The mechanism's terms of all stages, each by how far the stage is shared (a constant)."""
        shares = self.selections[task].weight.detach().softmax(dim=1)[:, SHARED]
        terms = self.net.auxiliary_losses(task)
        return sum(s * t for s, t in zip(shares, terms, strict=True) if t is not None)

    def end_task(self, task: str, redraw_unclaimed: bool) -> Configuration:
        """Keeps the best configuration and takes back what the task did to what it does not share.

        With ``redraw_unclaimed``, shared stages that no task has kept are drawn anew.
        """
        checks.check_open_task(task, self.net)
        with all_or_nothing(self):
            config = self.best_config(task)
            self.rollback.end(task, config, self.net.shared)
            self.net.keep(task, config)
            del self.selections[task]
            self._steppers.pop(task, None)
            self._loaded.pop(task, None)
            for shared, kept in zip(self.net.shared, config, strict=True):
                if not kept:
                    shared.zero_grad()
            if redraw_unclaimed and self.rollback.is_idle:
                self.net.redraw_unclaimed()
        return config

    def weights(self, task: str) -> dict[str, nn.Parameter]:
        """What an open task trains beside its selection, by name in this module.

        In the order of the release: all shared stages, the adapters, the specific branches, the
        head.
        """
        parts = ("shared", "adapters", "specific", "heads")
        names = {id(p): name for name, p in self.named_parameters()}
        ordered = sorted(
            self.net.named_task_parameters(task),
            key=lambda named: next(i for i, part in enumerate(parts) if named[0].startswith(part)),
        )
        return {names[id(p)]: p for _, p in ordered if p.requires_grad}

    def load_state_dict(
        self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False
    ) -> Any:
        """As :meth:`torch.nn.Module.load_state_dict`; if it is refused, all is as before."""
        with all_or_nothing(self):
            return super().load_state_dict(state_dict, strict, assign)

    def get_extra_state(self) -> Tensor:
        """Which tasks are open, what the roll-back keeps, the optimisers of the selections."""
        made = {task: to_plain(stepper) for task, stepper in self._steppers.items()}
        return packed(
            {
                "open": list(self.selections),
                "rollback": self.rollback.structure(),
                "steppers": {**self._loaded, **made},
            }
        )

    def set_extra_state(self, state: Any) -> None:
        """Makes what a saved state has values for; the tasks themselves must be there."""
        state = unpacked(state, "open", "rollback", "steppers")
        missing = [task for task in state["open"] if task not in self.net.tasks]
        if missing:
            raise ValueError(
                f"state_dict: expected the tasks {list(self.net.tasks)} that this net has, got "
                f"{missing} as well; call add_task for them before load_state_dict"
            )
        for task in list(self.selections):
            if task not in state["open"]:
                del self.selections[task]
        for task in state["open"]:
            if task not in self.selections:
                self.selections[task] = _Selection(self.net)
        self.rollback.restore_structure(state["rollback"], self.net.shared)
        self._steppers, self._loaded = {}, state["steppers"]


class _Selection(nn.Module):
    """The selection ``[d, 2]`` of one task."""

    def __init__(self, net: TransferNet) -> None:
        super().__init__()
        like = next(net.parameters())
        self.weight = nn.Parameter(torch.zeros(net.depth, 2).to(like.detach()))


def _mixed(shared: Branch, specific: Branch, share: Tensor, h: Tensor) -> Tensor:
    """The weighted sum of both branches, ahead of the stage's pooling where that can be told."""
    ahead, behind = _parts(specific.module)
    out = torch.stack([_run(branch, ahead, h) for branch in (specific, shared)])
    h = torch.tensordot(share, out, dims=1)
    for layer in behind:
        h = layer(h)
    return h


def _parts(stage: nn.Module) -> tuple[int | None, list[nn.Module]]:
    """How many layers of a stage are mixed, and the layers behind; None: the stage as a whole."""
    plain = plain_stage(stage)
    if plain is None or not isinstance(stage, nn.Sequential):
        return None, []
    spatial = (*_layers_of(plain.after),)
    return len(stage) - len(spatial), list(spatial)


def _layers_of(after: tuple[nn.Module, ...]) -> Iterator[nn.Module]:
    """The layers from the first that is not elementwise on."""
    behind = False
    for layer in after:
        behind = behind or "Pool" in type(layer).__name__ or isinstance(layer, nn.Flatten)
        if behind:
            yield layer


def _run(branch: Branch, ahead: int | None, h: Tensor) -> Tensor:
    if ahead is None:
        return branch(h.clone() if may_write_input(branch.module) else h)
    return branch._replace(module=branch.module[:ahead])(h)
