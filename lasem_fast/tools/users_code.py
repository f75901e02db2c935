"""Errors that happen in a user's own file, told in one line that says where."""

from __future__ import annotations

import sysconfig
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

import lasem_fast

_PACKAGE = Path(lasem_fast.__file__).resolve().parent
_NOT_THE_USERS = tuple(
    Path(folder).resolve()
    for folder in (
        _PACKAGE,
        Path(torch.__file__).parent,
        sysconfig.get_path("stdlib"),
        sysconfig.get_path("purelib"),
        sysconfig.get_path("platlib"),
    )
)


class UsersError(Exception):
    """What a tool cannot go on after; its text is the message."""


@contextmanager
def told_in_one_line(net: str) -> Iterator[None]:
    """Errors about the net that a user named become a `UsersError` of one line.

    An error with a place in a file of the user's gets that place. What arguments are refused with
    is told as it is, what PyTorch fails with by its type too. Anything else that this package
    raises is a defect of the tool and stays as it is.
    """
    try:
        yield
    except Exception as error:
        message = str(error).strip().partition("\n")[0]
        if isinstance(error, torch.OutOfMemoryError) or "can't allocate memory" in message:
            raise UsersError(f"NET: {net} needs more memory than there is here") from error
        told = ": ".join(filter(None, (type(error).__name__, message)))
        place = _place(error)
        if place:
            raise UsersError(f"NET: {net} failed in {place}: {told}") from error
        if isinstance(error, (ValueError, TypeError, RuntimeError)):
            raise UsersError(message or told) from error
        if _of_this_package(traceback.extract_tb(error.__traceback__)[-1].filename):
            raise
        raise UsersError(f"NET: {net} cannot be run: {told}") from error


def _place(error: BaseException) -> str:
    """File, line and function of the user's code nearest to the error, or ""."""
    if isinstance(error, SyntaxError) and _is_users(error.filename or ""):
        return f"{_short(error.filename)}, line {error.lineno}"
    causes = []
    while error is not None and error not in causes:
        causes.append(error)
        error = error.__cause__
    for cause in reversed(causes):
        for frame in reversed(traceback.extract_tb(cause.__traceback__)):
            if _is_users(frame.filename):
                inside = "" if frame.name == "<module>" else f", in {frame.name}"
                return f"{_short(frame.filename)}, line {frame.lineno}{inside}"
    return ""


def _is_users(filename: str) -> bool:
    path = Path(filename).resolve()
    return path.is_file() and not any(map(path.is_relative_to, _NOT_THE_USERS))


def _of_this_package(filename: str) -> bool:
    return Path(filename).resolve().is_relative_to(_PACKAGE)


def _short(filename: str) -> str:
    path = Path(filename).resolve()
    return str(path.relative_to(Path.cwd())) if path.is_relative_to(Path.cwd()) else str(path)
