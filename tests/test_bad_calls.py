"""Bad calls over the whole public surface; see tests/fuzz.

``python -m tests.fuzz --calls 10000`` makes many more and prints the figures.
"""

from __future__ import annotations

import pytest
import torch
from fuzz import judge

import lasem_fast as lf
from lasem_fast import configs


def test_bad_calls_are_refused_in_words_and_change_nothing():
    report = judge.many(300)
    assert not report.bad, "\n".join([report.figures(), *map(str, report.bad)])


@pytest.fixture
def worlds_of_its_own(monkeypatch):
    monkeypatch.setattr(judge, "_WORLDS", judge.world.Worlds(3))


@pytest.mark.usefixtures("worlds_of_its_own")
def test_a_raw_message_is_found(monkeypatch):
    monkeypatch.setattr(configs.ConfigSpace, "label", lambda self, row: {}[str(row)])
    outcomes = {v.outcome for v in judge.many(20, only=["ConfigSpace.label"]).bad}
    assert outcomes == {"raw"}


@pytest.mark.usefixtures("worlds_of_its_own")
@pytest.mark.parametrize(
    "change",
    [
        lambda em: next(em.net.parameters()).data.add_(1),
        lambda em: em.net.zero_grad() or setattr(next(em.net.parameters()), "grad", None),
        lambda em: torch.rand(1),
        lambda em: em.net.train(not em.net.training),
        lambda em: em.net.add_module("another", torch.nn.Identity()),
        lambda em: em.net.heads["a"][1].weight.requires_grad_(False),
    ],
)
def test_a_change_on_refusal_is_found(monkeypatch, change):
    right = lf.LASEM.best_config

    def changing(self, task):
        try:
            return right(self, task)
        except (TypeError, ValueError):
            change(self)
            raise

    monkeypatch.setattr(lf.LASEM, "best_config", changing)
    outcomes = [v.outcome for v in judge.many(15, only=["em.best_config"]).verdicts]
    assert "changed" in outcomes


@pytest.mark.usefixtures("worlds_of_its_own")
def test_a_mistake_that_nobody_notices_is_found(monkeypatch):
    monkeypatch.setattr(lf.LASEM, "best_config", lambda self, task: (True, True))
    assert {v.outcome for v in judge.many(20, only=["em.best_config"]).bad} == {"accepted"}
