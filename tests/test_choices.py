"""The choices in force: the environment variable, the switch, state dicts, the command."""

from __future__ import annotations

import json

import pytest
import torch
from timing import Clock, level, stage
from torch import nn

import lasem_fast as lf
from lasem_fast import lifelong
from lasem_fast.__main__ import main
from lasem_fast.backends import choices, measurements
from lasem_fast.networks.saved import unpacked

_PINNED = {"cpu": {"some level": "PyTorch"}}


def _set(monkeypatch, value):
    monkeypatch.setenv("LASEM_FAST_CHOICES", str(value))
    choices.process.cache_clear()


def _em():
    net = lf.TransferNet([stage()])
    net.add_task("a", nn.Sequential(nn.Flatten(), nn.Linear(27, 2)))
    return lf.LASEM(net)


def test_a_file_of_choices_is_in_force(unset, monkeypatch, tmp_path):
    file = tmp_path / "pinned.json"
    file.write_text(json.dumps(_PINNED))
    _set(monkeypatch, file)
    assert choices.in_force() == _PINNED
    assert not choices.process().measures


@pytest.mark.parametrize(
    ("content", "got"),
    [
        (None, r"got '.*pinned.json' \(No such file"),
        ("{", "which is no JSON"),
        ("[]", "which holds no"),
        ('{"gpu": {}}', "the devices 'cpu' and 'cuda', got 'gpu'"),
        ('{"cpu": 3}', "got something else for 'cpu'"),
        ('{"cpu": {"level": 3}}', "got something else for 'cpu'"),
    ],
)
def test_an_unusable_file_is_an_error_before_anything_is_made(
    unset, monkeypatch, tmp_path, content, got
):
    file = tmp_path / "pinned.json"
    if content is not None:
        file.write_text(content)
    _set(monkeypatch, file)
    for call in (_em, choices.in_force):
        with pytest.raises(ValueError, match=f"^LASEM_FAST_CHOICES: expected .*{got}"):
            call()
    with pytest.raises(SystemExit):
        main(["choices", "show"])
    assert main(["doctor"]) == 0


def test_a_misspelt_word_is_an_error(unset, monkeypatch):
    _set(monkeypatch, "mesure")
    with pytest.raises(ValueError, match=r"expected 'first', 'measure' or the path.*got 'mesure'"):
        _em()


@pytest.mark.parametrize(
    ("wrong", "error"),
    [
        (3, TypeError),
        (None, TypeError),
        ([], TypeError),
        ({"gpu": {}}, ValueError),
        ({"cpu": []}, ValueError),
        ({"cpu": {1: "PyTorch"}}, ValueError),
        ("no such file", ValueError),
    ],
)
def test_wrong_choices_are_refused_in_words(unset, wrong, error):
    choices.pin(_PINNED)
    with pytest.raises(error, match=r"^choices: expected .*, got "):
        choices.pin(wrong)
    assert choices.in_force() == _PINNED


def test_the_switch_takes_a_bool(unset):
    with pytest.raises(TypeError, match="on: expected a bool, got str"):
        choices.measure("yes")


def test_a_state_dict_brings_its_choices_into_force(unset):
    choices.pin(_PINNED)
    em = _em()
    saved = em.state_dict()
    choices.unpin()
    em.load_state_dict(saved)
    assert choices.in_force() == _PINNED
    choices.pin({"cpu": {"some level": "Winograd"}})
    em.load_state_dict(saved)
    assert choices.in_force() == {"cpu": {"some level": "Winograd"}}, "what was pinned goes first"


def test_a_state_dict_from_before_choices_were_saved_loads(unset):
    em = _em()
    state = unpacked(em.get_extra_state())
    del state["choices"]
    em.set_extra_state(state)
    assert choices.in_force() == {}


def test_a_resumed_run_takes_the_ways_of_the_saved_one(measuring, monkeypatch):
    """As it was, an unwritable cache on a busy machine gave 6 results in 6 runs."""
    measuring.parent.write_text("a file where the folder should be")
    clock = Clock(monkeypatch)
    clock.slow_and_fast()(*level())
    saved = _em().state_dict()
    _set(monkeypatch, "first")
    _em().load_state_dict(saved)
    clock.calls.clear()
    clock.slow_and_fast()(*level())
    assert clock.calls == ["fast"]


def test_a_run_records_the_choices_in_force(unset):
    choices.pin(_PINNED)
    x, y = torch.randn(4, 2, 6, 6), torch.tensor([0, 1, 1, 0])
    task = lifelong.Task("a", (x, y), (x, y), (x, y), n_classes=2)
    record = lifelong.train_sequence(
        lambda: lf.TransferNet([stage()]),
        lambda task: nn.Sequential(nn.Flatten(), nn.Linear(27, 2)),
        [task],
        epochs=1,
    )
    assert record.to_dict()["choices"] == _PINNED


def test_the_command_shows_pins_and_clears(measuring, monkeypatch, tmp_path, capsys):
    file = tmp_path / "pinned.json"
    assert main(["choices", "pin", str(file)]) == 1
    assert "measure first" in capsys.readouterr().err and not file.exists()
    clock = Clock(monkeypatch)
    clock.slow_and_fast()(*level())
    assert main(["choices", "show"]) == 0
    text = capsys.readouterr().out
    assert "measured" in text and "fast (slow 3e+03 ms, fast 1e+03 ms)" in text
    assert main(["choices", "pin", str(file)]) == 0
    assert json.loads(file.read_text()) == choices.in_force()
    assert main(["choices", "pin", str(file), "--threads", "7"]) == 1
    assert main(["choices", "clear"]) == 0
    assert "forgotten: 1 measurements" in capsys.readouterr().out
    assert measurements.read() == {}
    _set(monkeypatch, file)
    clock.calls.clear()
    clock.slow_and_fast()(*level())
    assert clock.calls == ["fast"]


def test_the_command_says_what_it_cannot_write(measuring, monkeypatch, tmp_path, capsys):
    Clock(monkeypatch).slow_and_fast()(*level())
    with pytest.raises(SystemExit):
        main(["choices", "pin", str(tmp_path / "absent" / "pinned.json")])
    told = capsys.readouterr().err
    assert "FILE: expected a place that can be written" in told
    assert "No such file or directory" in told
    with pytest.raises(SystemExit):
        main(["choices", "pin", "file", "--threads", "0"])
    assert "--threads: expected at least 1, got 0" in capsys.readouterr().err
