"""The fastest of several ways to evaluate a level, found by timing them on that very level."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial

import torch
from torch import Tensor

from lasem_fast.backends import stopwatch
from lasem_fast.backends.level_call import LevelCall, Result, Shape
from lasem_fast.backends.measurements import Measurement
from lasem_fast.backends.operations import LevelOperation

# Rounds go on for this long, because a short level is easily disturbed, within these limits.
_SECONDS = 0.1
_FEWEST_ROUNDS, _MOST_ROUNDS = 3, 20
# A way that takes this much longer than the best in one round is not timed again.
_OUT_OF_REACH = 1.3
# What a way has to save to be taken before one that is listed earlier: the other levels are laid
# out for the earlier ones, and times repeat to a few percent only.
_WORTH_A_CHANGE = 0.1


def fastest(
    ways: Mapping[str, LevelOperation], trusted: str | None, call: LevelCall, shape: Shape
) -> Measurement:
    """Times every way that takes the level, forward and backward, and leaves no trace.

    On a GPU the device's time decides, not Python's: a captured step has no Python.

    Args:
        ways: operations by name; a later one has to be clearly faster.
        trusted: name of a way that is right, if others have to prove that they are; None: they are.
        call: the level.
        shape: of ``call``.
    """
    device = call.device
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        # what a way needs only once (compilation, memory) is no part of its time
        results, refused = {}, {}
        for name in sorted(ways, key=lambda name: name != trusted):
            try:
                results[name] = call.run(ways[name], shape.backward)
            except Exception as error:
                if trusted in (None, name) or isinstance(error, torch.OutOfMemoryError):
                    raise
                refused[name] = f"{type(error).__name__}: {str(error).partition(chr(10))[0]}"
        takers = [name for name in ways if results.get(name) is not None]
        if trusted in takers:
            exact = call.widened().run(ways[trusted], shape.backward)
            refused |= _strayed(results, exact, trusted, shape)
        del results
        seconds = {name: [] for name in takers if name not in refused}
        left = list(seconds) if len(seconds) > 1 else []
        timed, begin = stopwatch.watch(device), stopwatch.now()
        for done in range(_MOST_ROUNDS):
            if done >= _FEWEST_ROUNDS and stopwatch.now() - begin > _SECONDS:
                break
            for name in left:
                seconds[name].append(timed(partial(call.run, ways[name], shape.backward)))
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
    return Measurement(way, times, refused, list(ways))


def _strayed(
    results: Mapping[str, Result | None], exact: Result, trusted: str, shape: Shape
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
