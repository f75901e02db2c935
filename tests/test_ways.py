"""The way that a level takes: by the rule, pinned, or measured and remembered."""

from __future__ import annotations

import json
import pickle

import pytest
import torch
from timing import Clock, Way, level, stage
from torch import nn

import lasem_fast as lf
from lasem_fast.backends import choices, measurements, plain_torch
from lasem_fast.backends.ways import OneOf
from lasem_fast.search import dispatch


def test_by_default_the_rule_decides_and_nothing_is_timed(unset, monkeypatch):
    clock = Clock(monkeypatch)
    operation = clock.slow_and_fast()
    arguments = level()
    for _ in range(2):
        operation(*arguments)
    assert clock.calls == ["slow", "slow"]
    assert not unset.exists() and choices.in_force() == {}


def test_what_the_rule_does_not_take_is_left(unset):
    arguments = level()
    layer, x, *_ = arguments
    others = {"all": plain_torch.TorchLevel()}
    not_these = OneOf({"rule": Way(plain_torch.run_level, "no such layer"), **others}, "cpu")
    assert not_these.why_not(layer, x) == "no such layer"
    not_this_size = OneOf({"rule": Way(lambda *arguments: None), **others}, "cpu")
    assert not_this_size.why_not(layer, x) == ""
    assert not_this_size(*arguments) is None


def test_the_fastest_way_is_taken_and_remembered(measuring, monkeypatch):
    clock = Clock(monkeypatch)
    operation, arguments = clock.slow_and_fast(), level()
    operation(*arguments)
    assert clock.calls[-1] == "fast"
    assert clock.calls.count("slow") == 2, "one round without the clock, one with it"
    clock.calls.clear()
    operation(*arguments)
    assert clock.calls == ["fast"]
    (levels,) = json.loads(measuring.read_text()).values()
    ((words, found),) = levels.items()
    assert "Conv2d(2, 3" in words and "4 rows from 2 of 4 samples 6x6x2 float32" in words
    assert found == {
        "way": "fast",
        "milliseconds": {"slow": 3000.0, "fast": 1000.0},
        "refused": {},
        "among": ["slow", "fast"],
    }
    assert choices.in_force() == {"cpu": {words: "fast"}}


def test_another_process_that_measures_reads_what_was_measured(measuring, monkeypatch):
    clock = Clock(monkeypatch)
    clock.slow_and_fast()(*level())
    choices.process.cache_clear()
    clock.calls.clear()
    clock.slow_and_fast()(*level())
    assert clock.calls == ["fast"]


def test_one_that_does_not_measure_leaves_it_alone(measuring, monkeypatch):
    clock = Clock(monkeypatch)
    clock.slow_and_fast()(*level())
    monkeypatch.setenv("LASEM_FAST_CHOICES", "first")
    choices.process.cache_clear()
    clock.calls.clear()
    clock.slow_and_fast()(*level())
    assert clock.calls == ["slow"]


def test_a_new_way_is_measured_against_the_remembered_ones(measuring, monkeypatch):
    clock = Clock(monkeypatch)
    clock.slow_and_fast()(*level())
    choices.process.cache_clear()
    clock.slow_and_fast(faster=0.1)(*level())
    assert clock.calls[-1] == "faster"


def test_neighbouring_batch_sizes_share_a_choice(measuring, monkeypatch):
    clock = Clock(monkeypatch)
    operation = clock.slow_and_fast()
    operation(*level(samples=8))
    clock.calls.clear()
    operation(*level(samples=5))
    assert clock.calls == ["fast"]


def test_without_a_cache_a_process_still_measures_once(measuring, monkeypatch):
    measuring.parent.write_text("a file where the folder should be")
    clock = Clock(monkeypatch)
    clock.slow_and_fast()(*level())
    clock.calls.clear()
    clock.slow_and_fast()(*level())
    assert clock.calls == ["fast"]


def test_pinned_ways_are_taken_and_the_rule_decides_the_rest(measuring, monkeypatch):
    clock = Clock(monkeypatch)
    operation = clock.slow_and_fast()
    operation(*level())
    pinned = choices.in_force()
    choices.measure(False)
    operation(*level())
    assert clock.calls[-1] == "slow"
    choices.pin(pinned)
    clock.calls.clear()
    operation(*level())
    assert clock.calls == ["fast"]
    operation(*level(side=8))
    assert clock.calls == ["fast", "slow"]
    choices.unpin()
    operation(*level())
    assert clock.calls == ["fast", "slow", "slow"]


def test_measuring_can_be_asked_for_in_a_process(unset, monkeypatch):
    clock = Clock(monkeypatch)
    operation = clock.slow_and_fast()
    operation(*level())
    choices.measure()
    operation(*level())
    assert clock.calls[-1] == "fast" and unset.exists()


def test_deterministic_algorithms_are_never_timed(measuring, monkeypatch):
    clock = Clock(monkeypatch)
    operation = clock.slow_and_fast()
    _deterministic(True)
    try:
        operation(*level())
        assert clock.calls == ["slow"] and not measuring.exists()
        _deterministic(False)
        operation(*level())
        clock.calls.clear()
        _deterministic(True)
        operation(*level())
        assert clock.calls == ["slow"], "what was measured before is not taken up either"
        choices.pin(choices.in_force())
        operation(*level())
        assert clock.calls == ["slow", "fast"]
    finally:
        _deterministic(False)


def _deterministic(on):
    """As ``torch.use_deterministic_algorithms``, which imports a compiler first."""
    torch.set_deterministic_debug_mode("error" if on else "default")


def test_a_pinned_way_that_does_not_exist_is_left_to_the_rule_with_a_warning(unset, monkeypatch):
    clock = Clock(monkeypatch)
    choices.measure()
    operation = clock.slow_and_fast()
    operation(*level())
    ((words, _),) = choices.in_force()["cpu"].items()
    choices.measure(False)
    choices.pin({"cpu": {words: "fsat"}})
    clock.calls.clear()
    with pytest.warns(UserWarning, match=r"expected one of \['slow', 'fast'\].*got 'fsat'"):
        operation(*level())
    operation(*level())  # a second warning would be an error
    assert clock.calls == ["slow", "slow"]


def test_another_device_is_left_alone(measuring):
    operation = OneOf(dispatch._ON_CPU.ways, "cuda")
    layer, x, *_ = level()
    assert operation.why_not(layer, x) == "on cpu: these kernels are for cuda"
    assert not measuring.exists()


def test_equal_seeds_give_equal_runs_whatever_the_stopwatch_says(unset, monkeypatch):
    """Three cold caches gave three results: what takes long is no part of the result any more."""
    monkeypatch.setattr(measurements, "read", lambda: pytest.fail("looked at measurements"))

    def run():
        torch.manual_seed(0)
        net = lf.TransferNet([stage(), nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.ReLU())])
        net.add_task("a", nn.Sequential(nn.Flatten(), nn.Linear(36, 2)))
        em = lf.LASEM(net)
        em(torch.randn(4, 2, 6, 6), torch.tensor([0, 1, 1, 0]), "a").loss.backward()
        return [p.grad for p in net.parameters()]

    assert all(map(torch.equal, run(), run()))


def test_a_lasem_can_be_pickled():
    net = lf.TransferNet([stage()])
    net.add_task("a", nn.Sequential(nn.Flatten(), nn.Linear(27, 2)))
    em = lf.LASEM(net)
    x, y = torch.randn(4, 2, 6, 6), torch.tensor([0, 1, 1, 0])
    again = pickle.loads(pickle.dumps(em))
    assert torch.equal(again(x, y, "a").loss, em(x, y, "a").loss)
