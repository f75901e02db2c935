"""Numbers that are passed as arguments: what counts as one, and the messages."""

from __future__ import annotations

import math
from numbers import Real
from typing import Any


def is_whole(value: Any) -> bool:
    """Whether a value indexes like an int, as NumPy integers and 0-d integer tensors do."""
    if isinstance(value, bool) or getattr(value, "ndim", 0) != 0:
        return False
    if not hasattr(value, "__index__"):  # not every torch.compile (2.11) traces that as an error
        return False
    try:
        value.__index__()
    except (TypeError, RuntimeError):
        return False
    return "bool" not in str(getattr(value, "dtype", ""))


def whole_number(value: Any, argument: str, least: int = 1) -> int:
    """The value as an int.

    Raises:
        TypeError, ValueError: it is no whole number, or smaller than ``least``.
    """
    expected = f"{argument}: expected a whole number of at least {least}, got"
    if not is_whole(value):
        raise TypeError(f"{expected} {type(value).__name__} {value!r}")
    if int(value) < least:
        raise ValueError(f"{expected} {int(value)}")
    if int(value) >= 2**31:
        raise ValueError(f"{argument}: expected a whole number below 2^31, got {int(value)}")
    return int(value)


def seed_number(value: Any, argument: str) -> int:
    """The value as an int that every generator of random numbers takes as a seed.

    Raises:
        TypeError, ValueError: it is no whole number, or none in 0..2^63 - 1.
    """
    if not is_whole(value):
        raise TypeError(
            f"{argument}: expected a whole number, got {type(value).__name__} {value!r}"
        )
    if not 0 <= int(value) < 2**63:
        raise ValueError(f"{argument}: expected a number in 0..2^63 - 1, got {int(value)}")
    return int(value)


def finite_number(value: Any, argument: str, *, zero: bool = False) -> float:
    """The value as a float above 0, or with ``zero`` of at least 0.

    Raises:
        TypeError, ValueError: it is no number, not finite, or too small.
    """
    expected = f"{argument}: expected a finite number {'of at least' if zero else 'above'} 0, got"
    if isinstance(value, bool) or not isinstance(value, Real):
        raise TypeError(f"{expected} {type(value).__name__} {value!r}")
    try:
        number = float(value)
    except OverflowError:  # an int may be larger than any float
        number = math.inf
    if not (0 < number < math.inf or (zero and number == 0)):
        raise ValueError(f"{expected} {value!r}")
    return number


def flag(value: Any, argument: str) -> bool:
    """The value as a bool, as NumPy's are too.

    Raises:
        TypeError: it is neither True nor False.
    """
    kind = str(getattr(value, "dtype", type(value).__name__))
    if kind not in ("bool", "bool_") or getattr(value, "ndim", 0) != 0:
        raise TypeError(f"{argument}: expected True or False, got {type(value).__name__} {value!r}")
    return bool(value)
