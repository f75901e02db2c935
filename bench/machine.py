"""What a results file says about where it comes from: the machine without its name or paths."""

from __future__ import annotations

import os
import platform
from pathlib import Path
from typing import Any

import torch

import lasem_fast

_MALLOC = ("MALLOC_MMAP_MAX_", "MALLOC_TRIM_THRESHOLD_", "MALLOC_TOP_PAD_")


def describe(device: str) -> dict[str, Any]:
    """CPU model, cores, memory, device, allocator and versions."""
    return {
        "cpu": _cpu_model(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "memory_gib": _memory_gib(),
        "device": torch.cuda.get_device_name() if device == "cuda" else _cpu_model(),
        "simd": torch.backends.cpu.get_cpu_capability(),
        # With these set freed memory is kept: no page faults, which flatters large mini-batches.
        "malloc": "raised thresholds" if any(os.environ.get(n) for n in _MALLOC) else "default",
        "python": platform.python_version(),
        "torch": torch.__version__,
        "lasem_fast": lasem_fast.__version__,
    }


def load_average() -> float | None:
    """Processes that wanted a core in the last minute; above 0 others disturb the times."""
    return os.getloadavg()[0] if hasattr(os, "getloadavg") else None


def _cpu_model() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()


def _memory_gib() -> float | None:
    try:
        return round(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / 2**30, 1)
    except (ValueError, OSError):
        return None
