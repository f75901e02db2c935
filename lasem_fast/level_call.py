"""One call of a level operation: its shape in words, and copies of it that leave no trace."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from typing import NamedTuple
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from lasem_fast.fold import Fold, RowsFirst, Stacks, folded
from lasem_fast.layers import plain_stage
from lasem_fast.operations import LevelOperation
from lasem_fast.transfer import Branch


class Shape(NamedTuple):
    """What the time of a level depends on beside its stage; counts as powers of two, rounded up."""

    stage: str
    rows: int
    samples: int
    sample: tuple[int, ...]
    dtype: torch.dtype
    autocast: torch.dtype | None
    form: type
    branches: int
    backward: bool
    input_grad: bool

    def __str__(self) -> str:
        size = "x".join(map(str, self.sample))
        autocast = f" autocast {_name(self.autocast)}" if self.autocast else ""
        passes = "forward" if not self.backward else "forward and backward"
        gradient = ", input gradient" if self.backward and self.input_grad else ""
        return (
            f"{self.branches} x {self.stage}, {self.rows} rows of {self.samples} samples {size} "
            f"{_name(self.dtype)}{autocast} as {self.form.__name__}, {passes}{gradient}"
        )


class Result(NamedTuple):
    """A level's output, in the form that it came in, and its gradients."""

    output: Fold
    gradients: list[Tensor]

    def tensors(self) -> list[Tensor]:
        return [folded(self.output).detach(), *self.gradients]


class LevelCall(NamedTuple):
    """The arguments of a :data:`~lasem_fast.operations.LevelOperation`."""

    branches: Sequence[Branch]
    h: Fold
    rows: int

    @property
    def device(self) -> torch.device:
        return device_of(self.h)

    def shape(self) -> Shape | None:
        """None for a stage that is not plain, on which ways do not differ."""
        stage = _stage(self.branches[0].module)
        if not stage:
            return None
        first = _tensors(self.h)[0]
        device = first.device.type
        if isinstance(self.h, RowsFirst):
            samples, sample = first.shape[1], first.shape[2:]
        else:
            width = self.rows if isinstance(self.h, Tensor) else self.rows // len(self.h.parts)
            samples, sample = first.shape[0] // max(width, 1), first.shape[1:]
        return Shape(
            stage=stage,
            rows=_power_of_two(self.rows),
            samples=_power_of_two(samples),
            sample=tuple(sample),
            dtype=first.dtype,
            autocast=torch.get_autocast_dtype(device)
            if torch.is_autocast_enabled(device)
            else None,
            form=type(self.h),
            branches=len(self.branches),
            backward=torch.is_grad_enabled(),
            input_grad=any(t.requires_grad for t in _tensors(self.h)),
        )

    def widened(self) -> LevelCall:
        """The same in float64."""
        branches = [Branch(b.module, _map_values(_double, b)) for b in self.branches]
        return LevelCall(branches, _map(_double, self.h), self.rows)

    def run(self, way: LevelOperation, backward: bool) -> Result | None:
        """A level's output and gradients, without a trace; None if the way does not take it."""
        branches = [
            Branch(b.module, {n: _leaf(t) for n, t in b.tensors.items()}) for b in self.branches
        ]
        h = _map(_leaf, self.h)
        with torch.enable_grad() if backward else nullcontext():
            out = way(branches, h, self.rows)
        if out is None:
            return None
        outputs = [t for t in _tensors(out) if t.requires_grad]
        inputs = [*_tensors(h), *(t for b in branches for t in _weights(b))]
        inputs = [t for t in inputs if t.requires_grad]
        if not (backward and outputs and inputs):
            return Result(out, [])
        ones = [torch.ones_like(t) for t in outputs]
        grads = torch.autograd.grad(outputs, inputs, ones, allow_unused=True)
        found = [
            torch.zeros_like(t) if g is None else g for t, g in zip(inputs, grads, strict=True)
        ]
        return Result(out, found)


def device_of(h: Fold) -> torch.device:
    """Where a level's input lies."""
    return _tensors(h)[0].device


_stages: WeakKeyDictionary[nn.Module, str] = WeakKeyDictionary()


def _stage(module: nn.Module) -> str:
    """A plain stage's layers as text; "" for any other stage."""
    if module not in _stages:
        stage = plain_stage(module)
        layers = [] if stage is None else [*stage.before, stage.core, *stage.after]
        _stages[module] = " ".join(repr(layer) for layer in layers)
    return _stages[module]


def _map_values(f: Callable[[Tensor], Tensor], branch: Branch) -> dict[str, Tensor]:
    """A branch's weights by name, those of its module too."""
    own = {n: p for n, p in branch.module.named_parameters() if n not in branch.tensors}
    return {n: f(t) for n, t in (*own.items(), *branch.tensors.items())}


def _double(t: Tensor) -> Tensor:
    return t.detach().double().requires_grad_(t.requires_grad)


def _leaf(t: Tensor) -> Tensor:
    return t.detach().requires_grad_(t.requires_grad)


def _weights(branch: Branch) -> list[Tensor]:
    tensors = dict(branch.module.named_parameters()) | dict(branch.tensors)
    return [tensors[name] for name in sorted(tensors)]


def _tensors(h: Fold) -> list[Tensor]:
    if isinstance(h, Tensor):
        return [h]
    return [h.data] if isinstance(h, RowsFirst) else h.parts


def _map(f: Callable[[Tensor], Tensor], h: Fold) -> Fold:
    if isinstance(h, Tensor):
        return f(h)
    return RowsFirst(f(h.data)) if isinstance(h, RowsFirst) else Stacks([*map(f, h.parts)], h.level)


def _power_of_two(n: int) -> int:
    return 1 << max(n - 1, 0).bit_length()


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
