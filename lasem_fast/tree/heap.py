"""Memory that malloc holds free: given back before it adds up."""

from __future__ import annotations

import ctypes
import os
import sys
from collections.abc import Callable

_STATM = "/proc/self/statm"
_PAGE = os.sysconf("SC_PAGE_SIZE") if hasattr(os, "sysconf") else 0


class Heap:
    """The C library's heap, as a budget sees it.

    glibc's aligned allocations do not fit into the holes that they leave, so that sub-trees run
    one after another would take fresh memory for each. Does nothing without glibc.

    Args:
        allowance: by how many bytes the process may grow before free memory is given back.
    """

    def __init__(self, allowance: float) -> None:
        self.allowance = allowance
        self._trim = _malloc_trim()
        self._resident = _resident() if self._trim else 0

    def keep_down(self) -> None:
        """Gives free memory back if the process has grown by more than the allowance."""
        if self._trim is None or _resident() - self._resident <= self.allowance:
            return
        self._trim(0)
        self._resident = _resident()


def _malloc_trim() -> Callable[[int], int] | None:
    if not (sys.platform.startswith("linux") and os.path.exists(_STATM)):
        return None
    return getattr(ctypes.CDLL(None), "malloc_trim", None)


def _resident() -> int:
    """Bytes of this process that are in memory."""
    with open(_STATM, "rb") as file:
        return int(file.read().split()[1]) * _PAGE
