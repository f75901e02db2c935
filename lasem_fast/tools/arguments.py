"""Types of command-line arguments, with messages that say what was expected."""

from __future__ import annotations

import argparse
import math
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

from lasem_fast._numbers import seed_number

_MOST_THREADS = 1024


def positive(text: str) -> int:
    """A whole number of at least 1."""
    value = _whole(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"expected at least 1, got {value}")
    if value >= 2**31:
        raise argparse.ArgumentTypeError(f"expected at most {2**31 - 1}, got {value}")
    return value


def threads(text: str) -> int:
    """A number of threads; far beyond any machine's cores the thread pool brings Python down."""
    value = positive(text)
    if value > _MOST_THREADS:
        raise argparse.ArgumentTypeError(f"expected at most {_MOST_THREADS} threads, got {value}")
    return value


def seed(text: str) -> int:
    """A whole number that PyTorch takes as a seed."""
    value = _whole(text)
    try:
        return seed_number(value, "")
    except ValueError as error:  # argparse names the option itself
        raise argparse.ArgumentTypeError(str(error).removeprefix(": ")) from None


def above_zero(text: str) -> float:
    """A finite number above 0."""
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not 0 < value < math.inf:
        raise argparse.ArgumentTypeError(f"expected a number above 0, got {text!r}")
    return value


def sizes(text: str) -> tuple[int, ...]:
    """Sizes of groups as in ``2,2,1``; () for ``none``."""
    return () if text == "none" else tuple(positive(part) for part in text.split(","))


def device(text: str) -> str:
    """A device that PyTorch can compute on here."""
    try:
        torch.ones((), device=torch.device(text)).item()
    except Exception as error:  # what it is depends on the device's type and PyTorch's build
        reason = str(error).partition("\n")[0]
        raise argparse.ArgumentTypeError(
            f"expected a device that PyTorch can use here, such as cpu or cuda, got {text!r} "
            f"({reason})"
        ) from error
    return text


@contextmanager
def writing(parser: argparse.ArgumentParser, option: str, place: Path) -> Iterator[None]:
    """What cannot be written is told with the option that names the place."""
    try:
        yield
    except OSError as error:
        at = "" if error.filename in (None, str(place)) else f" at {error.filename}"
        parser.error(
            f"{option}: expected a place that can be written, got {str(place)!r} "
            f"({error.strerror or error}{at})"
        )


def _whole(text: str) -> int:
    try:
        return int(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"expected a whole number, got {text!r}") from None
