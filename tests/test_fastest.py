"""Timing the ways to evaluate a level against one another, on that very level."""

from __future__ import annotations

import pytest
import torch
from timing import Clock, Way, level

from lasem_fast.backends import plain_torch
from lasem_fast.backends.fastest import fastest
from lasem_fast.backends.level_call import LevelCall
from lasem_fast.backends.operations import Skip
from lasem_fast.levels.plan import Level
from lasem_fast.search import dispatch


def _fastest(ways, *arguments, trusted=None):
    layer, x, rows, skip, _ = arguments
    call = LevelCall(layer, x, rows, skip)
    return fastest(ways, trusted, call, call.shape())


def test_a_later_way_has_to_be_clearly_faster(monkeypatch):
    clock = Clock(monkeypatch)
    ways = {"first": clock.way("first", 1.0), "second": clock.way("second", 0.95)}
    assert _fastest(ways, *level()).way == "first"


def test_a_way_that_does_not_take_the_level_is_left_out(monkeypatch):
    clock = Clock(monkeypatch)
    ways = {
        "refuses": Way(clock.way("refuses", 0.1).run, "no such layer"),
        "never": clock.way("never", 0.1, lambda layer, x, level, skip: None),
        "always": clock.way("always", 9.0),
    }
    found = _fastest(ways, *level())
    assert (found.way, found.milliseconds) == ("always", {})
    assert "refuses" not in clock.calls


def test_measuring_leaves_no_trace():
    layer, x, rows, *_ = level(requires_grad=True)
    skip = Skip(torch.randn(2, 4, 6, 6, 3, requires_grad=True), (0, 0, 1, 1))
    before = torch.get_rng_state()
    _fastest(dispatch._ON_CPU.ways, layer, x, rows, skip, None)
    assert torch.equal(torch.get_rng_state(), before)
    assert all(t.grad is None for t in (x, skip.data, *layer.weights, *layer.biases))


def _wrong_output(layer, x, level, skip):
    return 1.001 * plain_torch.run_level(layer, x, level, skip)


def _wrong_gradient(layer, x, level, skip):
    return plain_torch.run_level(layer, 0.5 * x + 0.5 * x.detach(), level, skip)


def _row_by_row(layer, x, level, skip):
    rows = []
    for parent, branch in zip(level.parents, level.positions, strict=True):
        one = layer._replace(weights=[layer.weights[branch]], biases=[layer.biases[branch]])
        rows.append(plain_torch.run_level(one, x[parent : parent + 1], Level((0,), (0,), 1), skip))
    return torch.cat(rows)


def _fails(layer, x, level, skip):
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
        "fast": clock.way("fast", 0.1, _row_by_row),
        "right": clock.way("right", 1.0),
    }
    assert _fastest(ways, *level(), trusted="right").way == "fast"
