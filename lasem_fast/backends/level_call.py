"""One call of a level operation: its shape in words, and copies of it that leave no trace."""

from __future__ import annotations

from contextlib import nullcontext
from typing import NamedTuple

import torch
from torch import Tensor

from lasem_fast.backends.operations import Layer, LevelOperation, Skip
from lasem_fast.levels.plan import Level


class Shape(NamedTuple):
    """What the time of a level depends on; counts as powers of two, rounded up."""

    layer: str
    rows: int
    parents: int
    samples: int
    sample: tuple[int, ...]
    dtype: torch.dtype
    autocast: torch.dtype | None
    branches: int
    backward: bool
    input_grad: bool

    def __str__(self) -> str:
        size = "x".join(map(str, self.sample))
        autocast = f" autocast {_name(self.autocast)}" if self.autocast else ""
        passes = "forward" if not self.backward else "forward and backward"
        gradient = ", input gradient" if self.backward and self.input_grad else ""
        return (
            f"{self.branches} x {self.layer}, {self.rows} rows from {self.parents} of "
            f"{self.samples} samples {size} {_name(self.dtype)}{autocast}, {passes}{gradient}"
        )


class Result(NamedTuple):
    """A level's output and its gradients."""

    output: Tensor
    gradients: list[Tensor]

    def tensors(self) -> list[Tensor]:
        return [self.output.detach(), *self.gradients]


class LevelCall(NamedTuple):
    """The arguments of a :class:`~lasem_fast.backends.operations.LevelOperation`."""

    layer: Layer
    x: Tensor
    level: Level
    skip: Skip | None

    @property
    def device(self) -> torch.device:
        return self.x.device

    def shape(self) -> Shape:
        """What tells this call from others."""
        kind = self.x.device.type
        return Shape(
            layer=_words(self.layer, self.skip),
            rows=_power_of_two(len(self.level)),
            parents=_power_of_two(self.level.width),
            samples=_power_of_two(self.x.shape[1]),
            sample=tuple(self.x.shape[2:]),
            dtype=self.x.dtype,
            autocast=torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else None,
            branches=len(self.layer.weights),
            backward=torch.is_grad_enabled(),
            input_grad=self.x.requires_grad,
        )

    def widened(self) -> LevelCall:
        """The same in float64."""
        return self._with(_double)

    def run(self, way: LevelOperation, backward: bool) -> Result | None:
        """A level's output and gradients, without a trace; None if the way does not take it."""
        if way.why_not(self.layer, self.x):
            return None
        call = self._with(_leaf)
        with torch.enable_grad() if backward else nullcontext():
            out = way(call.layer, call.x, call.level, call.skip, None)
        if out is None:
            return None
        inputs = [call.x, *call.layer.weights, *call.layer.biases]
        if call.skip is not None:
            inputs.append(call.skip.data)
        inputs = [t for t in inputs if t.requires_grad]
        if not (backward and out.requires_grad and inputs):
            return Result(out, [])
        grads = torch.autograd.grad(out, inputs, torch.ones_like(out), allow_unused=True)
        found = [
            torch.zeros_like(t) if g is None else g for t, g in zip(inputs, grads, strict=True)
        ]
        return Result(out, found)

    def _with(self, f) -> LevelCall:
        layer = self.layer._replace(
            weights=[f(t) for t in self.layer.weights], biases=[f(t) for t in self.layer.biases]
        )
        skip = None if self.skip is None else self.skip._replace(data=f(self.skip.data))
        return LevelCall(layer, f(self.x), self.level, skip)


def _words(layer: Layer, skip: Skip | None) -> str:
    parts = ["Flatten()"] if layer.flatten else []
    parts.append(repr(layer.core))
    parts += ["ReLU()"] if layer.relu else []
    parts += ["+ skip"] if skip is not None else []
    parts += ["ReLU()"] if layer.relu_after else []
    pool = layer.pool
    if pool.size > 1:
        parts.append(f"MaxPool2d({pool.size}, padding={pool.padding}, ceil_mode={pool.ceil})")
    return " ".join(parts)


def _double(t: Tensor) -> Tensor:
    return t.detach().double().requires_grad_(t.requires_grad)


def _leaf(t: Tensor) -> Tensor:
    return t.detach().requires_grad_(t.requires_grad)


def _power_of_two(n: int) -> int:
    return 1 << max(n - 1, 0).bit_length()


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
