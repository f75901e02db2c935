"""A second stream of a CUDA graph, for launches that need not wait for those beside them.

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
        self._side = self._main = None
        self._forked = False
        if torch.compiler.is_compiling() or not x.is_cuda:
            return
        if torch.cuda.is_current_stream_capturing():
            self._main = torch.cuda.current_stream(x.device)
            self._side = _beside(self._main.device, self._main.cuda_stream)

    @contextmanager
    def aside(self) -> Iterator[None]:
        """A context in which launches go to the second stream."""
        if self._side is None:
            yield
            return
        self._side.wait_stream(self._main)
        self._forked = True
        with torch.cuda.stream(self._side):
            yield

    def join(self) -> None:
        """Lets all that comes next wait for what was launched aside."""
        if self._forked:
            self._main.wait_stream(self._side)


@cache
def _beside(device: torch.device, stream: int) -> torch.cuda.Stream:
    # of every stream its own: captures in two threads must not meet
    return torch.cuda.Stream(device)
