"""Choosing between ways to evaluate a level: timed once, remembered, pinned."""

from __future__ import annotations

import json
import pickle

import pytest
import torch
from torch import nn

import lasem_fast as lf
from lasem_fast import _choices, _dispatch, fastest
from lasem_fast.backends import plain_torch
from lasem_fast.fold import RowsFirst
from lasem_fast.transfer import Branch


@pytest.fixture
def measuring(tmp_path, monkeypatch):
    """Choices are measured and kept in a file of the test's own."""
    monkeypatch.delenv("LASEM_FAST_CHOICES")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    _choices.choices.cache_clear()
    yield tmp_path / "lasem_fast" / "choices.json"
    _choices.choices.cache_clear()


def _stage():
    return nn.Sequential(nn.Conv2d(2, 3, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2))


def _branches():
    return [Branch(_stage()), Branch(_stage())]


class _Clock:
    """Time that only the ways below let pass."""

    def __init__(self, monkeypatch):
        self.now, self.calls = 0.0, []
        monkeypatch.setattr(fastest, "_now", lambda device: self.now)

    def way(self, name, seconds, operation=plain_torch.wide_level):
        def timed(branches, h, rows):
            self.calls.append(name)
            self.now += seconds
            return operation(branches, h, rows)

        return timed


def test_the_fastest_way_is_taken_and_remembered(measuring, monkeypatch):
    clock = _Clock(monkeypatch)
    ways = {"slow": clock.way("slow", 3.0), "fast": clock.way("fast", 1.0)}
    operation, branches, x = fastest.Fastest(ways, "cpu"), _branches(), torch.randn(8, 2, 6, 6)
    operation(branches, x, 2)
    assert clock.calls[-1] == "fast"
    assert clock.calls.count("slow") == 2, "one round without the clock, one with it"
    clock.calls.clear()
    operation(branches, x, 2)
    assert clock.calls == ["fast"]
    (subjects,) = json.loads(measuring.read_text()).values()
    ((subject, choice),) = subjects.items()
    assert "Conv2d(2, 3" in subject and "2 rows of 4 samples 2x6x6 float32" in subject
    assert choice == {
        "way": "fast",
        "milliseconds": {"slow": 3000.0, "fast": 1000.0},
        "refused": {},
        "among": ["slow", "fast"],
    }


def test_another_process_reads_what_was_measured(measuring, monkeypatch):
    clock = _Clock(monkeypatch)
    ways = {"slow": clock.way("slow", 3.0), "fast": clock.way("fast", 1.0)}
    fastest.Fastest(ways, "cpu")(_branches(), torch.randn(8, 2, 6, 6), 2)
    _choices.choices.cache_clear()
    clock.calls.clear()
    fastest.Fastest(ways, "cpu")(_branches(), torch.randn(8, 2, 6, 6), 2)
    assert clock.calls == ["fast"]


def test_a_new_way_is_measured_against_the_remembered_ones(measuring, monkeypatch):
    clock = _Clock(monkeypatch)
    ways = {"slow": clock.way("slow", 3.0), "fast": clock.way("fast", 1.0)}
    fastest.Fastest(ways, "cpu")(_branches(), torch.randn(8, 2, 6, 6), 2)
    ways["faster"] = clock.way("faster", 0.1)
    fastest.Fastest(ways, "cpu")(_branches(), torch.randn(8, 2, 6, 6), 2)
    assert clock.calls[-1] == "faster"


def test_a_later_way_has_to_be_clearly_faster(measuring, monkeypatch):
    clock = _Clock(monkeypatch)
    ways = {"first": clock.way("first", 1.0), "second": clock.way("second", 0.95)}
    fastest.Fastest(ways, "cpu")(_branches(), torch.randn(8, 2, 6, 6), 2)
    assert clock.calls[-1] == "first"


def test_a_way_that_does_not_take_the_level_is_left_out(measuring, monkeypatch):
    clock = _Clock(monkeypatch)
    ways = {
        "never": clock.way("never", 0.1, lambda branches, h, rows: None),
        "always": clock.way("always", 9.0),
    }
    x = torch.randn(8, 2, 6, 6)
    branches = _branches()
    out = fastest.Fastest(ways, "cpu")(branches, x, 2)
    assert torch.equal(out, plain_torch.wide_level(branches, x, 2))
    assert fastest.Fastest({"never": ways["never"]}, "cpu")(branches, x, 2) is None


def test_measuring_leaves_no_trace(measuring):
    branches = _branches()
    x = torch.randn(8, 2, 6, 6, requires_grad=True)
    before = torch.get_rng_state()
    out = fastest.Fastest(_dispatch._CPU_LEVELS, "cpu")(branches, x, 2)
    assert torch.equal(torch.get_rng_state(), before)
    assert x.grad is None
    assert all(p.grad is None for b in branches for p in b.module.parameters())
    data = out.data if isinstance(out, RowsFirst) else out
    data.sum().backward()
    assert x.grad is not None


def test_neighbouring_batch_sizes_share_a_choice(measuring, monkeypatch):
    clock = _Clock(monkeypatch)
    ways = {"slow": clock.way("slow", 3.0), "fast": clock.way("fast", 1.0)}
    operation, branches = fastest.Fastest(ways, "cpu"), _branches()
    operation(branches, torch.randn(8 * 2, 2, 6, 6), 2)
    clock.calls.clear()
    operation(branches, torch.randn(5 * 2, 2, 6, 6), 2)
    assert clock.calls == ["fast"]


def test_pinned_choices_are_read_and_never_measured(measuring, monkeypatch):
    clock = _Clock(monkeypatch)
    ways = {"slow": clock.way("slow", 3.0), "fast": clock.way("fast", 1.0)}
    x = torch.randn(8, 2, 6, 6)
    fastest.Fastest(ways, "cpu")(_branches(), x, 2)
    pinned = measuring.rename(measuring.with_name("pinned.json"))
    text = pinned.read_text()
    monkeypatch.setenv("LASEM_FAST_CHOICES", str(pinned))
    _choices.choices.cache_clear()
    clock.calls.clear()
    operation = fastest.Fastest(ways, "cpu")
    operation(_branches(), x, 2)
    assert clock.calls == ["fast"]
    operation(_branches(), torch.randn(8, 2, 8, 8), 2)
    assert clock.calls == ["fast", "slow"], "what the file does not hold takes the first way"
    assert pinned.read_text() == text and not measuring.exists()


@pytest.mark.parametrize("content", ["", "[]", "{", '{"machine": 3}', '{"m": {"s": {"way": 1}}}'])
def test_a_file_that_cannot_be_understood_is_measured_anew(measuring, monkeypatch, content):
    measuring.parent.mkdir()
    measuring.write_text(content)
    clock = _Clock(monkeypatch)
    ways = {"slow": clock.way("slow", 3.0), "fast": clock.way("fast", 1.0)}
    fastest.Fastest(ways, "cpu")(_branches(), torch.randn(8, 2, 6, 6), 2)
    assert clock.calls[-1] == "fast"
    assert "fast" in measuring.read_text()


def test_a_folder_that_cannot_be_written_is_no_error(measuring, monkeypatch):
    measuring.parent.write_text("a file where the folder should be")
    clock = _Clock(monkeypatch)
    ways = {"slow": clock.way("slow", 3.0), "fast": clock.way("fast", 1.0)}
    operation = fastest.Fastest(ways, "cpu")
    for _ in range(2):
        clock.calls.clear()
        operation(_branches(), torch.randn(8, 2, 6, 6), 2)
    assert clock.calls == ["fast"]


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
def test_a_way_that_strays_from_float64_cannot_win(measuring, monkeypatch, operation, why):
    clock = _Clock(monkeypatch)
    ways = {"wrong": clock.way("wrong", 0.1, operation), "right": clock.way("right", 1.0)}
    branches, x = _branches(), torch.randn(8, 2, 6, 6, requires_grad=True)
    chosen = fastest.Fastest(ways, "cpu", trusted="right")
    chosen(branches, x, 2)
    assert clock.calls[-1] == "right"
    ((choice,),) = (subjects.values() for subjects in json.loads(measuring.read_text()).values())
    assert choice["refused"]["wrong"].startswith(why)
    clock.calls.clear()
    chosen(branches, x, 2)
    assert clock.calls == ["right"]


def test_a_way_that_is_right_wins_after_the_check(measuring, monkeypatch):
    clock = _Clock(monkeypatch)
    ways = {
        "fast": clock.way("fast", 0.1, plain_torch.channels_last_level),
        "right": clock.way("right", 1.0),
    }
    fastest.Fastest(ways, "cpu", trusted="right")(_branches(), torch.randn(8, 2, 6, 6), 2)
    assert clock.calls[-1] == "fast"


def test_another_device_is_left_alone(measuring):
    operation = fastest.Fastest(_dispatch._CPU_LEVELS, "cuda")
    assert operation(_branches(), torch.randn(8, 2, 6, 6), 2) is None
    assert not measuring.exists()


def test_a_lasem_can_be_pickled():
    net = lf.TransferNet([_stage()])
    net.add_task("a", nn.Sequential(nn.Flatten(), nn.Linear(27, 2)))
    em = lf.LASEM(net)
    x, y = torch.randn(4, 2, 6, 6), torch.tensor([0, 1, 1, 0])
    again = pickle.loads(pickle.dumps(em))
    assert torch.equal(again(x, y, "a").loss, em(x, y, "a").loss)
