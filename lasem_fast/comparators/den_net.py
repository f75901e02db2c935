"""A network whose layers gain units from task to task; every task uses those that it has seen."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from lasem_fast.comparators.task_net import TaskNet, listed_stages, plain_parts
from lasem_fast.comparators.units import Units
from lasem_fast.networks import checks
from lasem_fast.transfer import HardParameterSharing
from lasem_fast.transfer.mechanism import inner_name


class GrowingNet(TaskNet):
    """Stages that all tasks share, each with as many units as all tasks need.

    Attributes:
        stages: the stages, at their present width.
        units: number of units of every stage.
        stamps: of every task that has ended, how many units of each stage there were then; it uses
            these and no later ones.
        before: how many there were when the open task began, the first that has not ended; heads of
            tasks that wait for its end have as many.
        draw: sets new weights of a layer in place.
        phase: of the open task's training.
        selected: units of every stage that the open task trains while it retrains.
        is_new_phase: whether no step has been made in the phase.
        loss_sum, batches: of the present epoch.
    """

    loss_sum: Tensor
    batches: Tensor

    def __init__(
        self, stages: Iterable[nn.Module], init: Callable[[nn.Module], object] | None
    ) -> None:
        super().__init__()
        self.draw = HardParameterSharing(init).init
        self.stages = nn.ModuleList(listed_stages(stages))
        self._plain = [plain_parts(stage, i, "DEN") for i, stage in enumerate(self.stages)]
        self.layers = _units_of([plain.core for plain in self._plain])
        self.units = [layer.weight.shape[0] for layer in self.layers]
        self._given = self.units[-1]
        self.stamps: dict[str, list[int]] = {}
        self.before: list[int] = list(self.units)
        self.previous = _Copies([])
        self._entry_rests: dict[str, int] = {}
        self.phase = ""
        self.selected: list[list[int]] = []
        self.is_new_phase = False
        self.register_buffer("loss_sum", torch.zeros(()))
        self.register_buffer("batches", torch.zeros(()))

    def add_task(self, task: str, head: nn.Module) -> list[nn.Parameter]:
        """Adds a task with a head for the net as it was given; the head is widened to its units."""
        self.check_new_task(task, head)
        linear = _first_weighted(head)
        width = linear.in_features if isinstance(linear, nn.Linear) else 0
        if width == 0 or width % self._given:
            raise ValueError(
                f"head: expected its first layer with parameters to be an nn.Linear that takes "
                f"the last stage's {self._given} units, in the head itself or one nn.Sequential, "
                f"got {checks.name_of(head)}"
            )
        begins = self.current is None
        units = self.units if begins else self.before
        entry = Units(linear, width // self._given)
        if units[-1] != self._given:
            entry.widen(linear.out_features, units[-1], self.draw)
        self._entry_rests[task] = entry.rest
        self.enter(task, head)
        if begins:
            self._begin()
        return [p for part in (self.stages, head) for p in part.parameters() if p.requires_grad]

    def _begin(self) -> None:
        """Makes ready to train the task whose predecessors have all ended."""
        first = self.current == self.tasks[0]
        self.before = list(self.units)
        self.previous = _Copies([] if first else self.layers)
        self.set_phase("first" if first else "select")

    def units_of(self, task: str) -> list[int]:
        """How many units of each stage a task uses."""
        return self.stamps.get(task, self.units if task == self.current else self.before)

    def set_phase(self, phase: str) -> None:
        """Begins a phase of the open task's training."""
        self.phase, self.is_new_phase = phase, True

    def forward(self, x: Tensor, task: str) -> Tensor:
        """The head's output ``[N, K]`` of a task, from the units that it knows."""
        h, inputs = x, None
        for i, units in enumerate(self.units_of(task)):
            h = self._stage(i, h, units, inputs)
            inputs = units
        return self.heads[task](h)

    def _stage(self, i: int, h: Tensor, units: int, inputs: int | None) -> Tensor:
        layer, plain = self.layers[i], self._plain[i]
        if units == self.units[i] and (inputs is None or inputs == self.units[i - 1]):
            return self.stages[i](h)
        weight = layer.form(layer.weight[:units, :inputs])
        tensors = {inner_name(plain.name, "weight"): weight}
        if plain.core.bias is not None:
            tensors[inner_name(plain.name, "bias")] = plain.core.bias[:units]
        return functional_call(self.stages[i], tensors, (h,))

    def entry(self, task: str) -> Units:
        """The first layer of a task's head."""
        return Units(_first_weighted(self.heads[task]), self._entry_rests[task])

    def previous_values(self) -> list[tuple[Tensor, Tensor | None]]:
        """Weight ``[out, in, rest]`` and bias of every stage from before the open task."""
        return self.previous.pairs()

    def end(self, task: str) -> None:
        super().end(task)
        self.stamps[task] = list(self.units)
        self.previous = _Copies([])
        self.phase, self.selected = "", []
        for waiting in [t for t in self.tasks if not self.has_ended(t)]:
            entry = self.entry(waiting)
            if self.before[-1] != self.units[-1]:
                entry.widen(entry.layer.out_features, self.units[-1], self.draw)
        if self.current is not None:
            self._begin()

    def structure(self) -> dict[str, Any]:
        return {
            **super().structure(),
            "units": self.units,
            "stamps": self.stamps,
            "before": self.before,
            "phase": self.phase,
            "selected": self.selected,
            "is_new_phase": self.is_new_phase,
        }

    def restore_structure(self, state: dict[str, Any]) -> None:
        super().restore_structure(state)
        for name in ("units", "stamps", "before", "phase", "selected", "is_new_phase"):
            setattr(self, name, copy.deepcopy(state[name]))
        self._resize(self.before)
        needs_previous = bool(self.phase) and self.phase != "first"
        self.previous = _Copies(self.layers if needs_previous else [])
        self._resize(self.units)
        for task in self.tasks:
            entry = self.entry(task)
            entry.resize(entry.layer.out_features, self.units_of(task)[-1])

    def _resize(self, units: list[int]) -> None:
        inputs = [self.layers[0].weight.shape[1], *units]
        for layer, outputs, below in zip(self.layers, units, inputs, strict=False):
            layer.resize(outputs, below)


class _Copies(nn.Module):
    """Copies of layers' weights and biases, as buffers."""

    def __init__(self, layers: Iterable[Units]) -> None:
        super().__init__()
        self._count = 0
        for i, layer in enumerate(layers):
            bias = layer.layer.bias
            self.register_buffer(f"weight{i}", layer.weight.detach().clone())
            self.register_buffer(f"bias{i}", None if bias is None else bias.detach().clone())
            self._count += 1

    def pairs(self) -> list[tuple[Tensor, Tensor | None]]:
        """Weight and bias of every layer."""
        return [(self._buffers[f"weight{i}"], self._buffers[f"bias{i}"])
                for i in range(self._count)]  # fmt: skip


def _first_weighted(head: nn.Module) -> nn.Module | None:
    """The first layer with parameters of a head that is a layer or an nn.Sequential of layers."""
    layers = list(head) if isinstance(head, nn.Sequential) else [head]
    return next((layer for layer in layers if any(True for _ in layer.parameters())), None)


def _units_of(cores: list[nn.Module]) -> list[Units]:
    """The layers as units; every layer takes the units of the one below."""
    layers: list[Units] = []
    for i, core in enumerate(cores):
        linear = isinstance(core, nn.Linear)
        inputs = core.in_features if linear else core.in_channels
        below = layers[-1].weight.shape[0] if layers else inputs
        places = inputs // below
        if places * below != inputs or (places > 1 and not linear):
            raise ValueError(
                f"stages[{i}]: expected a layer that takes the {below} units of the stage before, "
                f"each of them with as many features, got {inputs} inputs"
            )
        layers.append(Units(core, places if linear else core.weight[0, 0].numel()))
    return layers
