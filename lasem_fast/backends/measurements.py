"""What was measured on this machine, kept in one JSON file of the user's cache folder.

Only a process that measures (see :mod:`lasem_fast.choices`) reads or writes it. Several may at the
same time: each addition is made under a lock, and the file is replaced as a whole.
"""

from __future__ import annotations

import json
import os
import platform
import warnings
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

import filelock
import platformdirs
import torch

from lasem_fast.backends import cpu_ops
from lasem_fast.version import __version__

_SECONDS_FOR_THE_LOCK = 10.0


class Measurement(NamedTuple):
    """What was found for one level.

    Attributes:
        way: the name of the fastest way.
        milliseconds: of every way that was timed; a way that dropped out was timed once.
        refused: why a way may not win, by its name.
        among: all ways that there were; where there are others now, it is measured anew.
    """

    way: str
    milliseconds: dict[str, float]
    refused: dict[str, str]
    among: list[str]


Measurements = dict[str, dict[str, Measurement]]
"""By machine (see :func:`machine`) and level, both in words."""


def read() -> Measurements:
    """All that was measured; what is no such file is left out, with a warning."""
    file = cache_file()
    if file is None:
        return {}
    try:
        text = file.read_text(encoding="utf-8")
    except (FileNotFoundError, NotADirectoryError):
        return {}
    except (OSError, ValueError) as error:
        _warn(file, str(error))
        return {}
    try:
        return _understood(json.loads(text))
    except (ValueError, RecursionError) as error:
        _warn(file, str(error))
        return {}


def add(machine: str, level: str, measurement: Measurement) -> None:
    """Keeps a measurement, if the cache folder can be written."""
    file = cache_file()
    if file is None:
        return
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        with _lock(file):
            found = read()
            found.setdefault(machine, {})[level] = measurement
            _write(file, found)
    except (OSError, NotImplementedError):  # NotImplementedError: no locks on this file system
        pass


def clear() -> int:
    """Forgets all measurements; returns how many there were.

    Raises:
        OSError: the file cannot be removed.
    """
    file = cache_file()
    if file is None or not file.exists():
        return 0
    with _lock(file):
        count = sum(map(len, read().values()))
        file.unlink(missing_ok=True)
    return count


def cache_file() -> Path | None:
    """Where measurements are kept; None for a user without a home folder."""
    try:
        folder = platformdirs.user_cache_path("lasem_fast", appauthor=False)
    except RuntimeError:
        return None
    # older versions of platformdirs leave "~" as it is where there is no home
    return folder / "measurements.json" if folder.is_absolute() else None


def machine(device: torch.device) -> str:
    """What the times of a device depend on, in words."""
    if device.type == "cuda":
        return _gpu(device.index or 0)
    return _cpu_with(cpu_ops.isa(), torch.get_num_threads())


def cpu_features() -> dict[str, Any]:
    """What PyTorch knows of this CPU, by feature; empty in versions that do not tell."""
    capabilities = getattr(torch.cpu, "get_capabilities", dict)
    return dict(capabilities())


@lru_cache
def _cpu_with(isa: str | None, threads: int) -> str:
    name = cpu_features().get("cpu_name") or platform.processor() or platform.machine()
    return f"{name}, {isa or 'no kernels'}, {threads} threads, {_versions()}"


@lru_cache
def _gpu(index: int) -> str:
    return f"{torch.cuda.get_device_name(index)}, {_versions()}"


def _versions() -> str:
    return f"torch {torch.__version__}, lasem_fast {__version__}"


def _understood(found: Any) -> Measurements:
    """The file's content; ValueError for anything that :func:`_write` has not written."""
    result: Measurements = {}
    for machine_name, levels in _items(found):
        result[machine_name] = {}
        for level, fields in _items(levels):
            if set(dict(_items(fields))) != set(Measurement._fields):
                raise ValueError(f"expected {list(Measurement._fields)} of {level!r}")
            measurement = Measurement(**fields)
            times, refused = _items(measurement.milliseconds), _items(measurement.refused)
            if not (
                isinstance(measurement.way, str)
                and all(type(ms) in (int, float) for _, ms in times)
                and all(isinstance(why, str) for _, why in refused)
                and isinstance(measurement.among, list)
                and all(isinstance(name, str) for name in measurement.among)
            ):
                raise ValueError(f"expected names and times of {level!r}")
            result[machine_name][level] = measurement
    return result


def _items(found: Any) -> list[tuple[str, Any]]:
    if not isinstance(found, dict):
        raise ValueError(f"expected a JSON object, got {type(found).__name__}")
    return list(found.items())


def _write(file: Path, measurements: Measurements) -> None:
    """Under the lock: nobody else writes the temporary file."""
    content = {
        name: {level: found._asdict() for level, found in levels.items()}
        for name, levels in measurements.items()
    }
    temporary = file.with_suffix(".new")
    temporary.write_text(json.dumps(content, indent=1), encoding="utf-8")
    os.replace(temporary, file)


def _lock(file: Path) -> filelock.BaseFileLock:
    return filelock.FileLock(file.with_suffix(".lock"), timeout=_SECONDS_FOR_THE_LOCK)


_warned: set[Path] = set()


def _warn(file: Path, reason: str) -> None:
    """Once per file and process."""
    if file in _warned:
        return
    _warned.add(file)
    warnings.warn(
        f"{file}: expected the measurements of lasem_fast, got what cannot be understood "
        f"({reason}); levels are measured anew",
        stacklevel=2,
    )
