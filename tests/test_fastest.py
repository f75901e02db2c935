"""Timing the ways to evaluate a level against one another, on that very level."""

from __future__ import annotations

import pytest
import torch
from timing import Clock, level

from lasem_fast import _dispatch
from lasem_fast.backends import plain_torch
from lasem_fast.fastest import fastest
from lasem_fast.level_call import LevelCall


def _fastest(ways, *arguments, trusted=None):
    call = LevelCall(*arguments)
    return fastest(ways, trusted, call, call.shape())


def test_a_later_way_has_to_be_clearly_faster(monkeypatch):
    clock = Clock(monkeypatch)
    ways = {"first": clock.way("first", 1.0), "second": clock.way("second", 0.95)}
    assert _fastest(ways, *level()).way == "first"


def test_a_way_that_does_not_take_the_level_is_left_out(monkeypatch):
    clock = Clock(monkeypatch)
    ways = {
        "never": clock.way("never", 0.1, lambda branches, h, rows: None),
        "always": clock.way("always", 9.0),
    }
    found = _fastest(ways, *level())
    assert (found.way, found.milliseconds) == ("always", {})


def test_measuring_leaves_no_trace():
    branches, x, rows = level(requires_grad=True)
    before = torch.get_rng_state()
    _fastest(_dispatch._CPU_LEVELS, branches, x, rows)
    assert torch.equal(torch.get_rng_state(), before)
    assert x.grad is None
    assert all(p.grad is None for b in branches for p in b.module.parameters())


def _wrong_output(branches, h, rows):
    return 1.001 * plain_torch.wide_level(branches, h, rows)


def _wrong_gradient(branches, h, rows):
    return plain_torch.wide_level(branches, 0.5 * h + 0.5 * h.detach(), rows)


def _fails(branches, h, rows):
    raise RuntimeError("out of resources\nmore of it")


@pytest.mark.parametrize(
    ("operation", "why"),
    [
        (_wrong_output, "output off by 0.001"),
        (_wrong_gradient, "gradient 1 off by 0.5"),
        (_fails, "RuntimeError: out of resources"),
    ],
)
def test_a_way_that_strays_from_float64_cannot_win(monkeypatch, operation, why):
    clock = Clock(monkeypatch)
    ways = {"wrong": clock.way("wrong", 0.1, operation), "right": clock.way("right", 1.0)}
    found = _fastest(ways, *level(requires_grad=True), trusted="right")
    assert found.way == "right"
    assert found.refused["wrong"].startswith(why)


def test_a_way_that_is_right_wins_after_the_check(monkeypatch):
    clock = Clock(monkeypatch)
    ways = {
        "fast": clock.way("fast", 0.1, plain_torch.channels_last_level),
        "right": clock.way("right", 1.0),
    }
    assert _fastest(ways, *level(), trusted="right").way == "fast"
