"""Drawn nets and histories against the reference, on every backend; see tests/zoo.

``LASEM_FAST_ZOO_EXAMPLES=500`` draws more of each kind; ``python -m tests.zoo`` goes on after what
it finds, and prints the figures.
"""

from __future__ import annotations

import os
import random

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from zoo import compare
from zoo.compare import Disagreement
from zoo.kinds import KINDS

import lasem_fast as lf
from lasem_fast.networks import rollback
from lasem_fast.search import dispatch

_EXAMPLES = int(os.environ.get("LASEM_FAST_ZOO_EXAMPLES", "0"))
# what `make test` has time for
_QUICK = {"history": 30, "reference": 10, "dropout": 8, "float32": 5, "autocast": 4, "compile": 1}
_PAIRS = [(name, backend) for name, kind in KINDS.items() for backend in kind.backends]


@pytest.mark.filterwarnings("ignore")  # PyTorch's, about layers as they were drawn
@pytest.mark.parametrize(("name", "backend"), _PAIRS)
def test_every_backend_is_the_reference(name, backend):
    if (state := lf.backends().get(backend, "available")) != "available":
        pytest.skip(f"{backend}: {state}")
    kind = KINDS[name]

    @settings(max_examples=_EXAMPLES // kind.every or _QUICK[name])
    @given(st.randoms(use_true_random=False))
    def compared(pick: random.Random) -> None:
        torch.manual_seed(0)
        kind.check(kind.draw(pick), backend)

    compared()


def _disagreements(examples: int, backend: str = "torch") -> list[str]:
    found = []
    for seed in range(examples):
        case = KINDS["history"].draw(random.Random(seed))
        try:
            compare.check(case, backend)
        except Disagreement as error:
            found.append(str(error))
    return found


@pytest.mark.filterwarnings("ignore")
def test_a_wrong_level_is_found(monkeypatch):
    right = dispatch.plain_torch.wide_level
    monkeypatch.setattr(
        dispatch.plain_torch,
        "wide_level",
        lambda branches, *rest: right(branches[::-1], *rest),
    )
    assert any("off by" in found for found in _disagreements(10))


@pytest.mark.filterwarnings("ignore")
def test_a_wrong_roll_back_is_found(monkeypatch):
    monkeypatch.setattr(rollback.Rollback, "end", lambda *_: None)
    assert any("shared stage" in found for found in _disagreements(30))
