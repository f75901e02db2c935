"""Wall-clock time of a run, split into what it is spent on."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager

import torch


class Clock:
    """Seconds of training steps (``train``), of evaluation and of all else (``rest``).

    Args:
        seconds: the times before, of a run that is resumed; changed in place.
        device: where the run trains.
    """

    def __init__(self, seconds: dict[str, float], device: torch.device) -> None:
        self.seconds = seconds
        for phase in ("train", "evaluate", "rest"):
            seconds.setdefault(phase, 0.0)
        self._device = device
        self._before = sum(seconds.values())
        self._start = time.perf_counter()

    @contextmanager
    def time(self, phase: str) -> Iterator[None]:
        """Adds the time of the block to a phase."""
        start = time.perf_counter()
        yield
        # Without it a phase would pay for kernels that the one before it has launched.
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
        self.seconds[phase] += time.perf_counter() - start

    def settle(self) -> None:
        """Brings ``rest`` up to now."""
        total = self._before + time.perf_counter() - self._start
        self.seconds["rest"] = total - self.seconds["train"] - self.seconds["evaluate"]
