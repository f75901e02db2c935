"""The kinds of comparison: how a case is drawn and what is done with it."""

from __future__ import annotations

from collections.abc import Callable
from random import Random
from typing import NamedTuple

import torch

from bench.cases import TASK

from . import cases, compare
from .cases import Case


class Kind(NamedTuple):
    """One kind of comparison.

    Attributes:
        draw: makes a case.
        check: compares a case on a backend; may return how many events agreed.
        backends: where it makes sense.
        every: of how many drawn cases one is looked at; the slow kinds are rarer.
    """

    draw: Callable[[Random], Case]
    check: Callable[[Case, str], int | None]
    backends: tuple[str, ...] = ("torch", "cpp", "auto")
    every: int = 1


def _rounded(precision: str) -> Callable[[Case, str], None]:
    return lambda case, backend: compare.check_rounded(case, backend, precision)


def _single(pick: Random) -> Case:
    return cases.draw(pick, dtype=torch.float32, tasks=(TASK,), max_depth=3, odd=False)


KINDS = {
    "history": Kind(cases.draw, compare.check),
    "reference": Kind(
        cases.draw_plain, lambda case, backend: compare.check_reference(case), ("reference",)
    ),
    "dropout": Kind(cases.draw_with_dropout, compare.check_without_dropout, every=3),
    "float32": Kind(_single, _rounded("fp32"), ("torch", "cpp")),
    "autocast": Kind(_single, _rounded("bf16"), ("torch", "cpp"), every=2),
    "compile": Kind(
        cases.draw_shallow,
        lambda case, backend: compare.check_compiled(case, backend, "aot_eager"),
        ("torch", "auto"),
        every=40,
    ),
}
