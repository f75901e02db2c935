"""Further streams of a CUDA graph, for launches that need not wait for those beside them.

The kernels of a small step fill a few multiprocessors each, so that two of them side by side take
no longer than one. Outside a graph the host decides how long launches take, and one stream is left.

Memory is given out again in the order of the host, whatever stream reads it. So what another stream
reads is held until the main one has waited for it, and copies of weights until the step's end.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from typing import Any

import torch
from torch import Tensor


class StepStreams:
    """A training step under capture, whose weights are known to stay as they are for a while.

    Their copies are made from its beginning on, and a level's sums for their gradients may last
    until the next level's launches have been made.

    Attributes:
        is_sound: whether nobody wrote to a gradient, or took another for it, while it was summed.
    """

    def __init__(self, weights: Iterable[Tensor], defers: bool = True) -> None:
        """
        Args:
            weights: of the net; a change of one in place is noticed.
            defers: whether sums may last longer.
        """
        self.is_sound = True
        self._versions = {id(weight): (weight, weight._version) for weight in weights}
        self._defers = defers
        self._stream = torch.cuda.current_stream()
        self._start = self._stream.record_event()
        self._copies: list[Tensor] = []
        self._sums: list[tuple[torch.cuda.Event, Any]] = []
        self._gradients: list[tuple[Tensor, int]] = []

    @contextmanager
    def running(self) -> Iterator[None]:
        """A context for forward and backward; at its end all sums are there."""
        key = self._stream.device, self._stream.cuda_stream
        _steps[key] = self
        try:
            yield
            self._wait_for_sums()
            self.is_sound = all(_is_untouched(*pair) for pair in self._gradients)
        finally:
            del _steps[key]

    def copied(self, weights: Sequence[Tensor], copy: Callable[[], Tensor]) -> Tensor:
        """``copy()`` of some weights, made beside all that came before if nothing changed them."""
        if not all(self._knows(_whole(weight)) for weight in weights):
            return copy()
        stream = _beside(self._stream.device, self._stream.cuda_stream, "copies")
        stream.wait_event(self._start)
        with torch.cuda.stream(stream):
            self._copies.append(copy())
        self._stream.wait_stream(stream)
        return self._copies[-1]

    def may_defer(self, parameters: Sequence[Tensor]) -> bool:
        """Whether nobody should look at these gradients before the backward has ended."""
        return self._defers and all(
            self._knows(p) and p.requires_grad and p.grad is None
            and not p._backward_hooks and not p._post_accumulate_grad_hooks
            for p in parameters
        )  # fmt: skip

    def defer(
        self, stream: torch.cuda.Stream, pairs: Iterable[tuple[Tensor, Tensor]], reads: Any
    ) -> None:
        """Waits for what ``stream`` sums only after the next level's launches.

        Args:
            stream: on which all that was asked for has been launched.
            pairs: parameters and their gradients.
            reads: what is read meanwhile.
        """
        # not the tensors: the weights take over those that nobody else holds
        self._gradients += [(weight, gradient.data_ptr()) for weight, gradient in pairs]
        self._wait_for_sums()
        self._sums.append((stream.record_event(), reads))

    def _wait_for_sums(self) -> None:
        while self._sums:
            event, _ = self._sums.pop()
            self._stream.wait_event(event)

    def _knows(self, weight: Tensor) -> bool:
        known, version = self._versions.get(id(weight), (None, 0))
        return known is weight and version == weight._version


class SideStream:
    """Launches beside those of the current stream, while it is captured; else among them.

    What is launched inside :meth:`aside` begins after all that was launched before, and what is
    launched behind :meth:`join` after it.
    """

    def __init__(self, x: Tensor) -> None:
        """
        Args:
            x: on the device.
        """
        self._main = _captured_stream(x)
        self._side: torch.cuda.Stream | None = None

    @contextmanager
    def aside(self) -> Iterator[None]:
        """A context in which launches go to the second stream."""
        if self._main is None:
            yield
            return
        self._side = _beside(self._main.device, self._main.cuda_stream, "sums")
        self._side.wait_stream(self._main)
        with torch.cuda.stream(self._side):
            yield

    def join(
        self, parameters: Sequence[Tensor] = (), gradients: Sequence[Tensor] = (), reads: Any = None
    ) -> None:
        """Lets all that comes next wait for what was launched aside.

        Args:
            parameters, gradients: what was launched aside; where nobody looks at the gradients
                before the backward has ended, the next level's launches need not wait.
            reads: all tensors that are read aside.
        """
        if self._side is None:
            return
        step = _steps.get((self._main.device, self._main.cuda_stream))
        if step is not None and step.may_defer(parameters):
            step.defer(self._side, zip(parameters, gradients, strict=True), reads)
        else:
            self._main.wait_stream(self._side)


def early_copy(x: Tensor, weights: Sequence[Tensor], copy: Callable[[], Tensor]) -> Tensor:
    """``copy()`` of some weights, as early as a captured step allows.

    Args:
        x: on the device.
        weights: that are read, or whole views of them.
        copy: makes the copy, with launches on the current stream.
    """
    stream = _captured_stream(x)
    step = None if stream is None else _steps.get((stream.device, stream.cuda_stream))
    return copy() if step is None else step.copied(weights, copy)


# Under capture, by device and stream: the backward runs in a thread of its own.
_steps: dict[tuple[torch.device, int], StepStreams] = {}


def _captured_stream(x: Tensor) -> torch.cuda.Stream | None:
    """The current stream, if it is captured."""
    if torch.compiler.is_compiling() or not x.is_cuda:
        return None
    if not torch.cuda.is_current_stream_capturing():
        return None
    return torch.cuda.current_stream(x.device)


def _is_untouched(weight: Tensor, address: int) -> bool:
    grad = weight.grad
    return grad is not None and grad.data_ptr() == address and grad._version == 0


def _whole(weight: Tensor) -> Tensor:
    return weight if weight._base is None else weight._base


@cache
def _beside(device: torch.device, stream: int, what: str) -> torch.cuda.Stream:
    # of every stream its own: captures in two threads must not meet
    return torch.cuda.Stream(device)
