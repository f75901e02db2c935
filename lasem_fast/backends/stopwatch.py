"""How long a piece of work takes on its device, the Python that starts it left out.

On a GPU the launches of a level take the host longer than the level takes the device. So the queue
is filled first, with a sleep that is long enough for all launches to be in it when the device
comes to the first of them, and the device's own clock is read before and behind.
"""

from __future__ import annotations

import time
from collections.abc import Callable

import torch

# of the device's clock, 1 to 2 GHz; doubled until the host is ahead
_FIRST_SLEEP = 2**21
_MOST_DOUBLINGS = 6

now = time.perf_counter


class HostWatch:
    """Wall-clock time of work that is done when its call returns."""

    def __call__(self, work: Callable[[], object]) -> float:
        """The seconds that ``work()`` takes."""
        start = now()
        work()
        return now() - start


class DeviceWatch:
    """Time on a CUDA device, between events behind a queue that was filled.

    Args:
        device: whose current stream the work is put on.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._sleep = _FIRST_SLEEP
        self._doublings = 0

    def __call__(self, work: Callable[[], object]) -> float:
        """The seconds that the device is busy with ``work()``.

        Work that waits for the device itself is timed with its waiting, after some tries.
        """
        with torch.cuda.device(self.device):
            while True:
                torch.cuda.synchronize()
                start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
                torch.cuda._sleep(self._sleep)
                start.record()
                work()
                ahead = not start.query()
                end.record()
                end.synchronize()
                if ahead or self._doublings == _MOST_DOUBLINGS:
                    return 1e-3 * start.elapsed_time(end)
                self._sleep *= 2
                self._doublings += 1


def watch(device: torch.device) -> Callable[[Callable[[], object]], float]:
    """What times work on a device."""
    return DeviceWatch(device) if device.type == "cuda" else HostWatch()
