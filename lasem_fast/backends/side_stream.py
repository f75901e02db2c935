"""Further streams of a CUDA graph, for launches that need not wait for those beside them.

The kernels of a small step fill a few multiprocessors each, so that two of them side by side take
no longer than one. Outside a graph the host decides how long launches take, and one stream is left.
"""

from __future__ import annotations

from collections.abc import Iterator
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
        self._main = captured_stream(x)
        self._side: torch.cuda.Stream | None = None

    @contextmanager
    def aside(self) -> Iterator[None]:
        """A context in which launches go to the second stream."""
        if self._main is None:
            yield
            return
        self._side = beside(self._main, "gradients")
        self._side.wait_stream(self._main)
        with torch.cuda.stream(self._side):
            yield

    def join(self) -> None:
        """Lets all that comes next wait for what was launched aside."""
        if self._side is not None:
            self._main.wait_stream(self._side)


def captured_stream(x: Tensor) -> torch.cuda.Stream | None:
    """The current stream of a tensor's device, if it is captured."""
    if torch.compiler.is_compiling() or not x.is_cuda:
        return None
    if not torch.cuda.is_current_stream_capturing():
        return None
    return torch.cuda.current_stream(x.device)


def beside(stream: torch.cuda.Stream, what: str) -> torch.cuda.Stream:
    """A stream beside another one, always the same."""
    return _beside(*key_of(stream), what)


def key_of(stream: torch.cuda.Stream) -> tuple[torch.device, int]:
    """What tells a stream from all others."""
    return stream.device, stream.cuda_stream


@cache
def _beside(device: torch.device, stream: int, what: str) -> torch.cuda.Stream:
    # of every stream its own: captures in two threads must not meet
    return torch.cuda.Stream(device)
