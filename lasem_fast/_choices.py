"""Remembers which of several ways to do one thing was the fastest on this machine.

What was measured is kept in a JSON file in the user's cache folder, so that a machine measures once
and later runs take the same ways, bit for bit. The environment variable ``LASEM_FAST_CHOICES``
changes that:

- ``first``: nothing is measured or read; the way that is listed first is taken;
- the path of a file: choices are read from it and stay as they are; what it does not hold is taken
  as with ``first``.
"""

from __future__ import annotations

import contextlib
import json
import os
import platform
import tempfile
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

import torch

from lasem_fast import _ops
from lasem_fast.version import __version__

_VARIABLE = "LASEM_FAST_CHOICES"


class Choice(NamedTuple):
    """What a measurement found.

    Attributes:
        way: the name of the fastest way.
        milliseconds: of every way that was timed; a way that dropped out was timed once.
        refused: why a way may not win, by its name.
        among: all ways that there were; where there are others now, the choice is made anew.
    """

    way: str
    milliseconds: dict[str, float]
    refused: dict[str, str]
    among: list[str]


class Choices:
    """The choices of one machine.

    Args:
        setting: the value of ``LASEM_FAST_CHOICES``, or "".
    """

    def __init__(self, setting: str = "") -> None:
        self.may_measure = not setting
        self._reads = setting != "first"
        self._file = Path(setting) if setting and self._reads else _cache_file()
        self._known: dict[str, dict[str, Choice]] = {}

    def of(self, machine: str) -> dict[str, Choice]:
        """The choices of a machine by subject."""
        if machine not in self._known:
            self._known[machine] = _read(self._file).get(machine, {}) if self._reads else {}
        return self._known[machine]

    def remember(self, machine: str, subject: str, choice: Choice) -> None:
        """Keeps a choice, in the file too if that can be written."""
        self.of(machine)[subject] = choice
        with contextlib.suppress(OSError):
            _merge(self._file, machine, subject, choice)


@lru_cache
def choices() -> Choices:
    """The choices in force in this process."""
    return Choices(os.environ.get(_VARIABLE, ""))


def machine(device: torch.device) -> str:
    """What the times of a device depend on, in words."""
    if device.type == "cuda":
        return _gpu(device.index or 0)
    return _cpu_with(_ops.isa(), torch.get_num_threads())


@lru_cache
def _cpu_with(isa: str | None, threads: int) -> str:
    return f"{_cpu()}, {isa or 'no kernels'}, {threads} threads, {_versions()}"


@lru_cache
def _gpu(index: int) -> str:
    return f"{torch.cuda.get_device_name(index)}, {_versions()}"


@lru_cache
def _cpu() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.processor() or platform.machine())


def _versions() -> str:
    return f"torch {torch.__version__}, lasem_fast {__version__}"


def _cache_file() -> Path:
    folder = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return Path(folder).expanduser() / "lasem_fast" / "choices.json"


def _read(file: Path) -> dict[str, dict[str, Choice]]:
    """The file's choices; none where there is no file or it cannot be understood."""
    try:
        found = json.loads(file.read_text())
        return {
            machine: {subject: Choice(**choice) for subject, choice in subjects.items()}
            for machine, subjects in found.items()
        }
    except (OSError, ValueError, TypeError, AttributeError):
        return {}


def _merge(file: Path, machine: str, subject: str, choice: Choice) -> None:
    """Adds a choice to what the file holds now; other processes may be adding theirs."""
    found: dict[str, Any] = {
        name: {s: c._asdict() for s, c in subjects.items()}
        for name, subjects in _read(file).items()
    }
    found.setdefault(machine, {})[subject] = choice._asdict()
    file.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile("w", dir=file.parent, delete=False) as temporary:
        json.dump(found, temporary, indent=1)
    os.replace(temporary.name, file)
