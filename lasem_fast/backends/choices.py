"""Which of several kernels a level takes: a fixed rule, unless ways are pinned or timing asked for.

Every way computes the same level and rounds differently, so equal runs need equal ways. Without
being asked nothing is timed, and a level takes the way that a rule of its shape names:

- on the CPU (``"cpp"``) the C++ kernel, by the Winograd tile that takes the fewest products;
- on a CUDA device (``"triton"``) the Triton kernel, but PyTorch for large products of 32 bits;
- PyTorch for every stage that these do not take, on other devices and inside ``torch.compile``.

As with cuDNN's benchmark switch, timing has to be asked for: by :func:`measure`, or by the
environment variable ``LASEM_FAST_CHOICES``, which is read when it is first needed:

- not set, or ``first``: the rule;
- ``measure``: the first time a shape is met, every way that takes it is timed on that very level;
  on a GPU a way has to agree with float64 too before it may win. What was found is kept in the
  user's cache folder and taken again by later processes that measure;
- the path of a file (``python -m lasem_fast choices pin FILE`` writes one): the ways that it names
  are taken, and the rule for all else.

Under ``torch.use_deterministic_algorithms(True)`` nothing is timed and no measurement is taken up;
pinned ways and the rule decide. The kernels themselves are deterministic: on one machine their
results depend on the number of threads and on nothing else.

A state dict of a :class:`~lasem_fast.LASEM` holds the choices in force; loading it brings them into
force for the whole process, so that a resumed run takes the same ways.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch

_VARIABLE = "LASEM_FAST_CHOICES"
_FORM = '{device: {level: way}} of text, as in {"cpu": {"2 x Conv2d(...) ...": "PyTorch"}}'

Ways = dict[str, dict[str, str]]
"""By type of device and level in words: the name of the way to take."""


def in_force() -> Ways:
    """The choices in force in this process, ``{device: {level: way}}``; empty: the rule decides.

    JSON-able: what :func:`pin` takes. While ways are measured, those that were taken so far.

    Raises:
        ValueError: ``LASEM_FAST_CHOICES`` is not as described.
    """
    return process().all()


def pin(choices: Mapping[str, Mapping[str, str]] | str | os.PathLike[str]) -> None:
    """From now on takes these ways in this process, in place of rule and measurements.

    Levels pinned before keep their way unless ``choices`` names another. A way that does not exist
    here, say in another version, is left to the rule, with a warning.

    Args:
        choices: what :func:`in_force` gave, or the path of a JSON file of it.

    Raises:
        TypeError, ValueError: not as described; nothing has changed.
    """
    if isinstance(choices, str | os.PathLike):
        choices = _read(choices, "choices")
    process().pin(checked(choices, "choices"))


def unpin() -> None:
    """Forgets the ways that were pinned or came with a state dict."""
    process().unpin()


def measure(on: bool = True) -> None:
    """Times ways from now on in this process (True), or goes back to the rule (False).

    Raises:
        TypeError: ``on`` is not a bool.
    """
    if not isinstance(on, bool):
        raise TypeError(f"on: expected a bool, got {type(on).__name__}")
    process().measure(on)


class Choices:
    """The choices in force in a process.

    Args:
        setting: the value of ``LASEM_FAST_CHOICES``, or "".

    Raises:
        ValueError: ``setting`` is neither a known word nor the path of a file of choices.

    Attributes:
        measures: whether timing was asked for.
        version: grows with every change, except by :meth:`take`.
    """

    def __init__(self, setting: str = "") -> None:
        self.measures = setting == "measure"
        self.version = 0
        self._pinned: Ways = {}
        self._restored: Ways = {}  # from state dicts; what was pinned goes first
        self._taken: Ways = {}
        if setting not in ("", "first", "measure"):
            self._pinned = checked(_read(setting, _VARIABLE), _VARIABLE)

    @property
    def leaves_all_to_the_rule(self) -> bool:
        return not (self.measures or self._pinned or self._restored)

    @property
    def times(self) -> bool:
        """Whether ways may be timed now."""
        return self.measures and not torch.are_deterministic_algorithms_enabled()

    def fixed(self, device: str, level: str) -> str | None:
        """The way that a level is to take whatever was measured."""
        for ways in (self._pinned, self._restored):
            way = ways.get(device, {}).get(level)
            if way is not None:
                return way
        return None

    def taken(self, device: str, level: str) -> str | None:
        """The measured way that this process has taken for a level."""
        return self._taken.get(device, {}).get(level)

    def take(self, device: str, level: str, way: str) -> None:
        """Notes that a measured way is taken from now on."""
        self._taken.setdefault(device, {})[level] = way

    def all(self) -> Ways:
        return _merged(_merged(self._taken, self._restored), self._pinned)

    def pin(self, choices: Ways) -> None:
        self._pinned = _merged(self._pinned, choices)
        self.version += 1

    def restore(self, choices: Ways) -> None:
        self._restored = _merged(self._restored, choices)
        self.version += 1

    @contextmanager
    def unless_refused(self) -> Iterator[None]:
        """Takes back what a state dict has restored if the block raises."""
        before = self._restored
        try:
            yield
        except BaseException:
            self._restored = before
            self.version += 1
            raise

    def unpin(self) -> None:
        self._pinned, self._restored = {}, {}
        self.version += 1

    def measure(self, on: bool) -> None:
        self.measures = on
        self._taken = {}
        self.version += 1

    def __str__(self) -> str:
        pinned = sum(map(len, _merged(self._restored, self._pinned).values()))
        rule = "measured" if self.measures else "by the rule, nothing is timed"
        return f"{pinned} levels pinned, the others {rule}" if pinned else rule


@lru_cache
def process() -> Choices:
    """The choices of this process; ``ValueError`` if ``LASEM_FAST_CHOICES`` is not as described."""
    return Choices(os.environ.get(_VARIABLE, ""))


def checked(choices: Any, name: str) -> Ways:
    """A copy of ``choices``; what is not of that form is an error that calls them ``name``."""
    if not isinstance(choices, Mapping):
        raise TypeError(f"{name}: expected {_FORM}, got {type(choices).__name__}")
    for device, levels in choices.items():
        if device not in ("cpu", "cuda"):
            raise ValueError(f"{name}: expected the devices 'cpu' and 'cuda', got {device!r}")
        if not isinstance(levels, Mapping) or not all(
            isinstance(text, str) for pair in levels.items() for text in pair
        ):
            raise ValueError(f"{name}: expected {_FORM}, got something else for {device!r}")
    return {device: dict(levels) for device, levels in choices.items() if levels}


def _read(file: str | os.PathLike[str], name: str) -> Any:
    expected = f"{name}: expected the path of a file of choices"
    if name == _VARIABLE:
        expected = f"{name}: expected 'first', 'measure' or the path of a file of choices"
    try:
        content = json.loads(Path(file).read_text(encoding="utf-8"))
    except OSError as error:
        raise ValueError(f"{expected}, got {str(file)!r} ({error.strerror or error})") from error
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{expected}, got {str(file)!r}, which is no JSON ({error})") from error
    if not isinstance(content, dict):
        raise ValueError(f"{expected}, got {str(file)!r}, which holds no {_FORM}")
    return content


def _merged(first: Ways, second: Ways) -> Ways:
    """Both; where both name a way, the second's."""
    return {
        device: first.get(device, {}) | second.get(device, {})
        for device in sorted({*first, *second})
    }
