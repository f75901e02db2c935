"""A level operation that is one of several which compute the same."""

from __future__ import annotations

import warnings
from collections.abc import Mapping

import torch
from torch import Tensor

from lasem_fast.backends import choices, measurements
from lasem_fast.backends.fastest import fastest
from lasem_fast.backends.level_call import LevelCall, Shape
from lasem_fast.backends.operations import Layer, LevelOperation, Skip
from lasem_fast.levels.plan import Level
from lasem_fast.levels.row_liveness import Liveness


class OneOf:
    """One level operation out of several that compute the same, for one type of device.

    Which one is a matter of :mod:`lasem_fast.choices`: what was pinned, else the fastest one where
    timing was asked for, else the rule. Where nothing can be timed (inside ``torch.compile``, while
    a CUDA graph is captured) and nothing was before, it is the rule.

    Args:
        ways: operations by name, the one that the rule takes first. Where they are timed, a later
            one has to be clearly faster.
        device: ``"cpu"`` or ``"cuda"``.
        trusted: name of a way that is right, if others have to prove that they are before they may
            win by their time: it is run in float64 too, and a way that strays from that result, or
            fails, cannot win.
    """

    def __init__(
        self, ways: Mapping[str, LevelOperation], device: str, *, trusted: str | None = None
    ) -> None:
        self.ways = ways
        self.device = device
        self.trusted = trusted
        self._rule = next(iter(ways.values()))
        self.carries = self._rule.carries
        self._version = -1
        self._known: dict[tuple[Shape, bool], str | None] = {}

    def why_not(self, layer: Layer, x: Tensor) -> str:
        """Why the rule's way does not take a layer; where it does not, none is looked for."""
        if x.device.type != self.device:
            return f"on {x.device}: these kernels are for {self.device}"
        return self._rule.why_not(layer, x)

    def __call__(
        self,
        layer: Layer,
        x: Tensor,
        level: Level,
        skip: Skip | None,
        liveness: Liveness | None,
        carry: bool = False,
    ) -> Tensor | tuple[Tensor, Tensor] | None:
        way = None
        if not torch.compiler.is_compiling() and not choices.process().leaves_all_to_the_rule:
            way = self._chosen(LevelCall(layer, x, level, skip))
        if way is not None:
            chosen = self.ways[way]
            out = chosen(layer, x, level, skip, liveness, carry and chosen.carries)
            if out is not None:
                return out
        return self._rule(layer, x, level, skip, liveness, carry)

    def _chosen(self, call: LevelCall) -> str | None:
        """The way that was pinned or is the fastest; None leaves it to the rule."""
        in_process = choices.process()
        if self._version != in_process.version:
            self._version = in_process.version
            self._known.clear()
        shape = call.shape()
        times = in_process.times
        if (shape, times) not in self._known:
            level = str(shape)
            way = self._fixed(level, in_process)
            if way is None and times:
                way = in_process.taken(self.device, level)
                if way not in self.ways:
                    if self.device == "cuda" and torch.cuda.is_current_stream_capturing():
                        return None
                    way = self._measured(call, shape)
                    if way is not None:
                        in_process.take(self.device, level, way)
            self._known[shape, times] = way
        return self._known[shape, times]

    def _fixed(self, level: str, in_process: choices.Choices) -> str | None:
        way = in_process.fixed(self.device, level)
        if way is None or way in self.ways:
            return way
        warnings.warn(
            f"choices: expected one of {list(self.ways)} for {level!r}, got {way!r}; the rule "
            f"decides in its place",
            stacklevel=2,
        )
        return None

    def _measured(self, call: LevelCall, shape: Shape) -> str | None:
        """The fastest way, as it was measured before or is now; None where that cannot be."""
        machine, level = measurements.machine(call.device), str(shape)
        found = measurements.read().get(machine, {}).get(level)
        if found is None or found.way not in self.ways or found.among != list(self.ways):
            try:
                found = fastest(self.ways, self.trusted, call, shape)
            except torch.OutOfMemoryError:  # the step itself may fit
                return None
            measurements.add(machine, level, found)
        return found.way
