"""Further streams of a CUDA graph, for launches that need not wait for those beside them.

The kernels of a small step fill a few multiprocessors each, so that two of them side by side take
no longer than one. Outside a graph the host decides how long launches take, and one stream is left.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import cache

import torch
from torch import Tensor


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
        self._side = _beside(self._main.device, self._main.cuda_stream, "gradients")
        self._side.wait_stream(self._main)
        with torch.cuda.stream(self._side):
            yield

    def join(self) -> None:
        """Lets all that comes next wait for what was launched aside."""
        if self._side is not None:
            self._main.wait_stream(self._side)


class EarlyCopies:
    """Copies of weights in a captured step, made beside all that came before them.

    They are made from the point on at which this was made, if nothing has changed the weights
    since. Memory is given out again in the order of the host, whatever stream reads it; so no copy
    is given back before all are.
    """

    def __init__(self, weights: Iterable[Tensor]) -> None:
        """
        Args:
            weights: whose changes in place are noticed; others are copied when they are asked for.
        """
        self._versions = {id(weight): (weight, weight._version) for weight in weights}
        self._stream = torch.cuda.current_stream()
        self._start = self._stream.record_event()
        self._copies: list[Tensor] = []

    @contextmanager
    def running(self) -> Iterator[None]:
        """A context in which :func:`early_copy` finds this, on the stream that is captured."""
        key = _key(self._stream)
        _running[key] = self
        try:
            yield
        finally:
            del _running[key]

    def made(self, weights: Sequence[Tensor], copy: Callable[[], Tensor]) -> Tensor:
        """``copy()`` of some weights."""
        if not all(self._is_unchanged(weight) for weight in weights):
            return copy()
        stream = _beside(self._stream.device, self._stream.cuda_stream, "copies")
        stream.wait_event(self._start)
        with torch.cuda.stream(stream):
            self._copies.append(copy())
        self._stream.wait_stream(stream)
        return self._copies[-1]

    def _is_unchanged(self, weight: Tensor) -> bool:
        whole = weight if weight._base is None else weight._base
        known, version = self._versions.get(id(whole), (None, 0))
        return known is whole and version == whole._version


def early_copy(x: Tensor, weights: Sequence[Tensor], copy: Callable[[], Tensor]) -> Tensor:
    """``copy()`` of some weights, as early as a captured step allows.

    Args:
        x: on the device.
        weights: that are read, or views of them.
        copy: makes the copy, with launches on the current stream.
    """
    stream = _captured_stream(x)
    early = None if stream is None else _running.get(_key(stream))
    return copy() if early is None else early.made(weights, copy)


_running: dict[tuple[torch.device, int], EarlyCopies] = {}


def _key(stream: torch.cuda.Stream) -> tuple[torch.device, int]:
    return stream.device, stream.cuda_stream


def _captured_stream(x: Tensor) -> torch.cuda.Stream | None:
    """The current stream, if it is captured."""
    if torch.compiler.is_compiling() or not x.is_cuda:
        return None
    if not torch.cuda.is_current_stream_capturing():
        return None
    return torch.cuda.current_stream(x.device)


@cache
def _beside(device: torch.device, stream: int, what: str) -> torch.cuda.Stream:
    # of every stream its own: captures in two threads must not meet
    return torch.cuda.Stream(device)
