"""A level operation that is the fastest of several, found by timing them once per shape."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from typing import NamedTuple
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from lasem_fast._choices import Choice, choices, machine
from lasem_fast.fold import Fold, RowsFirst, Stacks, folded
from lasem_fast.layers import plain_stage
from lasem_fast.operations import LevelOperation
from lasem_fast.transfer import Branch

# Rounds go on for this long, because a short level is easily disturbed, within these limits.
_SECONDS = 0.1
_FEWEST_ROUNDS, _MOST_ROUNDS = 3, 20
# A way that takes this much longer than the best in one round is not timed again.
_OUT_OF_REACH = 1.3
# What a way has to save to be taken before one that is listed earlier: the other levels are laid
# out for the earlier ones, and times repeat to a few percent only.
_WORTH_A_CHANGE = 0.1


class _Shape(NamedTuple):
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


class Fastest:
    """One level operation out of several that compute the same, for one type of device.

    The first time that a shape is met, every way that takes it is timed on that very level, forward
    and backward; the choice is remembered (see :mod:`lasem_fast._choices`). Where nothing can be
    timed (inside ``torch.compile``, while a CUDA graph is captured, or with choices pinned), the
    remembered way is taken, or else the first one.

    Args:
        ways: operations by name, the one to take unmeasured first.
        device: ``"cpu"`` or ``"cuda"``.
        trusted: name of a way that is right, if others have to prove that they are: it is run in
            float64 too, and a way that strays from that result, or fails, cannot win.
    """

    def __init__(
        self, ways: Mapping[str, LevelOperation], device: str, *, trusted: str | None = None
    ) -> None:
        self.ways = ways
        self.device = device
        self.trusted = trusted
        self._decided: dict[tuple[str, _Shape], str] = {}

    def __call__(self, branches: Sequence[Branch], h: Fold, rows: int) -> Fold | None:
        """The output; None for what none of the ways takes and on other devices."""
        if _tensors(h)[0].device.type != self.device:
            return None
        way = None
        if not torch.compiler.is_compiling():
            way = _chosen(self.ways, self.trusted, branches, h, rows, self._decided)
        if way is not None and (out := self.ways[way](branches, h, rows)) is not None:
            return out
        for name, other in self.ways.items():
            if name != way and (out := other(branches, h, rows)) is not None:
                return out
        return None


def _chosen(
    ways: Mapping[str, LevelOperation],
    trusted: str | None,
    branches: Sequence[Branch],
    h: Fold,
    rows: int,
    decided: dict[tuple[str, _Shape], str],
) -> str | None:
    """The way to try first; None for the order given. ``decided`` is what was found before."""
    stage = _stage(branches[0].module)
    if not stage:
        return None
    device = _tensors(h)[0].device
    shape = _shape(stage, branches, h, rows)
    key = machine(device), shape
    if key not in decided:
        choice = choices().of(key[0]).get(str(shape))
        outdated = choices().may_measure and choice is not None and choice.among != list(ways)
        if choice is None or choice.way not in ways or outdated:
            capturing = device.type == "cuda" and torch.cuda.is_current_stream_capturing()
            if capturing or not choices().may_measure:
                return None
            try:
                choice = _measure(ways, trusted, branches, h, rows, shape)
            except torch.OutOfMemoryError:  # the step itself may fit
                return None
            choices().remember(key[0], str(shape), choice)
        decided[key] = choice.way
    return decided[key]


_stages: WeakKeyDictionary[nn.Module, str] = WeakKeyDictionary()


def _stage(module: nn.Module) -> str:
    """A plain stage's layers as text; "" for any other stage, on which ways do not differ."""
    if module not in _stages:
        stage = plain_stage(module)
        layers = [] if stage is None else [*stage.before, stage.core, *stage.after]
        _stages[module] = " ".join(repr(layer) for layer in layers)
    return _stages[module]


def _shape(stage: str, branches: Sequence[Branch], h: Fold, rows: int) -> _Shape:
    first = _tensors(h)[0]
    device = first.device.type
    if isinstance(h, RowsFirst):
        samples, sample = first.shape[1], first.shape[2:]
    else:
        width = rows if isinstance(h, Tensor) else rows // len(h.parts)
        samples, sample = first.shape[0] // max(width, 1), first.shape[1:]
    return _Shape(
        stage=stage,
        rows=_power_of_two(rows),
        samples=_power_of_two(samples),
        sample=tuple(sample),
        dtype=first.dtype,
        autocast=torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else None,
        form=type(h),
        branches=len(branches),
        backward=torch.is_grad_enabled(),
        input_grad=any(t.requires_grad for t in _tensors(h)),
    )


def _measure(
    ways: Mapping[str, LevelOperation],
    trusted: str | None,
    branches: Sequence[Branch],
    h: Fold,
    rows: int,
    shape: _Shape,
) -> Choice:
    device = _tensors(h)[0].device
    devices = [device] if device.type == "cuda" else []
    with torch.random.fork_rng(devices=devices):
        # what a way needs only once (compilation, memory) is no part of its time
        results, refused = {}, {}
        for name in sorted(ways, key=lambda name: name != trusted):
            try:
                results[name] = _run(ways[name], branches, h, rows, shape.backward)
            except Exception as error:
                if trusted in (None, name) or isinstance(error, torch.OutOfMemoryError):
                    raise
                refused[name] = f"{type(error).__name__}: {str(error).partition(chr(10))[0]}"
        takers = [name for name in ways if results.get(name) is not None]
        if trusted in takers:
            wide = [_widened(branch) for branch in branches]
            exact = _run(ways[trusted], wide, _map(_double, h), rows, shape.backward)
            refused |= _strayed(results, exact, trusted, shape)
        del results
        seconds = {name: [] for name in takers if name not in refused}
        left = list(seconds) if len(seconds) > 1 else []
        begin = _now(device)
        for done in range(_MOST_ROUNDS):
            if done >= _FEWEST_ROUNDS and _now(device) - begin > _SECONDS:
                break
            for name in left:
                start = _now(device)
                _run(ways[name], branches, h, rows, shape.backward)
                seconds[name].append(_now(device) - start)
            best = min((min(seconds[name]) for name in left), default=0.0)
            left = [name for name in left if min(seconds[name]) <= _OUT_OF_REACH * best]
            if len(left) < 2:
                break
    times = {name: 1e3 * min(values) for name, values in seconds.items() if values}
    # nobody or only one takes it: then there is no choice, and that is remembered
    way = next(iter(seconds), trusted or next(iter(ways)))
    for name, time_of_other in times.items():
        if time_of_other < (1 - _WORTH_A_CHANGE) * times[way]:
            way = name
    return Choice(way, times, refused, list(ways))


def _strayed(
    results: Mapping[str, _Result | None], exact: _Result, trusted: str, shape: _Shape
) -> dict[str, str]:
    """The ways whose output or gradients are further from float64 than rounding explains.

    The output may be off by 4 times as much as the trusted way's. Gradients jump where a ReLU or a
    pool is within rounding of a tie, in every way at other places; that half of the digits are
    right tells this from a wrong kernel.
    """
    unit = torch.finfo(shape.autocast or shape.dtype).eps / 2
    bounds, truth = [], exact.tensors()
    for i, (got, right) in enumerate(zip(results[trusted].tensors(), truth, strict=True)):
        least = unit if i == 0 else unit**0.5
        bounds.append(max(4 * _distance(got, right), least))
    refused = {}
    for name, result in results.items():
        errors = [] if result is None else map(_distance, result.tensors(), truth)
        for i, (error, bound) in enumerate(zip(errors, bounds, strict=False)):
            if not error <= bound:
                what = "output" if i == 0 else f"gradient {i}"
                refused[name] = f"{what} off by {error:.2g}, allowed {bound:.2g}"
                break
    return refused


def _distance(got: Tensor, right: Tensor) -> float:
    """Relative to the size of ``right``."""
    return float((got.double() - right).norm() / right.norm().clamp_min(1e-300))


class _Result(NamedTuple):
    """A level's output, in the form that it came in, and its gradients."""

    output: Fold
    gradients: list[Tensor]

    def tensors(self) -> list[Tensor]:
        return [folded(self.output).detach(), *self.gradients]


def _run(
    way: LevelOperation, branches: Sequence[Branch], h: Fold, rows: int, backward: bool
) -> _Result | None:
    """A level's output and gradients, without a trace; None if the way does not take it."""
    branches = [Branch(b.module, {n: _leaf(t) for n, t in b.tensors.items()}) for b in branches]
    h = _map(_leaf, h)
    with torch.enable_grad() if backward else nullcontext():
        out = way(branches, h, rows)
    if out is None:
        return None
    outputs = [t for t in _tensors(out) if t.requires_grad]
    inputs = [*_tensors(h), *(t for b in branches for t in _weights(b))]
    inputs = [t for t in inputs if t.requires_grad]
    if not (backward and outputs and inputs):
        return _Result(out, [])
    ones = [torch.ones_like(t) for t in outputs]
    grads = torch.autograd.grad(outputs, inputs, ones, allow_unused=True)
    found = [torch.zeros_like(t) if g is None else g for t, g in zip(inputs, grads, strict=True)]
    return _Result(out, found)


def _widened(branch: Branch) -> Branch:
    """The branch with its weights in float64."""
    own = {n: p for n, p in branch.module.named_parameters() if n not in branch.tensors}
    return Branch(
        branch.module, {n: _double(t) for n, t in (*own.items(), *branch.tensors.items())}
    )


def _double(t: Tensor) -> Tensor:
    return t.detach().double().requires_grad_(t.requires_grad)


def _weights(branch: Branch) -> list[Tensor]:
    tensors = dict(branch.module.named_parameters()) | dict(branch.tensors)
    return [tensors[name] for name in sorted(tensors)]


def _leaf(t: Tensor) -> Tensor:
    return t.detach().requires_grad_(t.requires_grad)


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


def _now(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()
