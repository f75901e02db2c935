"""Results of functions of shapes, which are kept from one step to the next."""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from typing import Any, TypeVar

# Shapes for which a function's results are kept.
_KEPT = 2**12

_Function = TypeVar("_Function", bound=Callable[..., Any])
_functions: list[Any] = []


def kept(function: _Function) -> _Function:
    """The function, which remembers what it has found out."""
    keeping = lru_cache(_KEPT)(function)
    _functions.append(keeping)
    return keeping


def forget() -> None:
    """Forgets all of that, for whoever changes what it depends on."""
    for function in _functions:
        function.cache_clear()
