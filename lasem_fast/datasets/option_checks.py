"""Options that several data sets have: what is accepted, and the messages."""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from types import ModuleType
from typing import Any

from lasem_fast._numbers import is_whole, seed_number, whole_number


def one_of(value: Any, option: str, known: Sequence[int]) -> int:
    """The value as an int, if it is one of these."""
    if not is_whole(value) or int(value) not in known:
        expected = ", ".join(map(str, known))
        raise ValueError(f"{option}: expected one of {expected}, got {value!r}")
    return int(value)


def flag(value: Any, option: str) -> bool:
    """The value, if it is True or False."""
    if not isinstance(value, bool):
        raise TypeError(f"{option}: expected True or False, got {value!r}")
    return value


def percentage(value: Any) -> int:
    """The value of the option ``percent``, a whole number from 1 to 100."""
    if whole_number(value, "percent") > 100:
        raise ValueError(f"percent: expected a whole number from 1 to 100, got {value!r}")
    return int(value)


def seeds(trial: Any, seed: Any = 0) -> tuple[int, int]:
    """The values of ``trial`` and ``seed``, whole numbers in 0..2^63 - 1 as elsewhere."""
    return seed_number(trial, "trial"), seed_number(seed, "seed")


def optional_module(module: str, project: str, title: str) -> ModuleType:
    """A module of the extra ``data``, imported.

    Raises:
        ModuleNotFoundError: it is not installed; says how to install it.
    """
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            f"{title} needs {project}: pip install lasem_fast[data]", name=error.name
        ) from error
