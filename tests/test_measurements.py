"""The file that remembers measurements: many writers, nonsense in it, nowhere to put it."""

from __future__ import annotations

import json
import multiprocessing
import os
import pwd
import warnings

import pytest
import torch
from timing import Clock, level

from lasem_fast.backends import measurements
from lasem_fast.backends.measurements import Measurement

_FOUND = Measurement("fast", {"slow": 3.0, "fast": 1.0}, {"wrong": "off"}, ["slow", "fast"])


def test_what_is_added_is_read_and_cleared(measuring):
    measurements.add("machine", "level", _FOUND)
    measurements.add("machine", "another", _FOUND)
    assert measurements.read() == {"machine": {"level": _FOUND, "another": _FOUND}}
    assert measurements.clear() == 2
    assert measurements.read() == {} and measurements.clear() == 0


def test_concurrent_writers_lose_nothing(measuring):
    writers = [
        multiprocessing.get_context("fork").Process(target=_write_forty, args=(n,))
        for n in range(2)
    ]
    for writer in writers:
        writer.start()
    for writer in writers:
        writer.join()
    assert [writer.exitcode for writer in writers] == [0, 0]
    assert len(measurements.read()["machine"]) == 80


def _write_forty(writer: int) -> None:
    for i in range(40):
        measurements.add("machine", f"{writer}, {i}", _FOUND)


_FIELDS = {"way": "w", "milliseconds": {}, "refused": {}, "among": []}


@pytest.mark.parametrize(
    "content",
    [
        "", "[]", "{", "\0", '{"machine": 3}', '{"m": {"l": {"way": 1}}}', "[" * 100_000,
        *(
            json.dumps({"m": {"l": _FIELDS | {name: wrong}}})
            for name in _FIELDS for wrong in (3, None, [3], {"w": []}, {"w": "x", "v": True})
        ),
    ],
    ids=lambda content: content[:60],
)  # fmt: skip
def test_nonsense_is_measured_anew_with_one_warning(measuring, monkeypatch, content):
    measuring.parent.mkdir()
    measuring.write_text(content)
    clock = Clock(monkeypatch)
    operation = clock.slow_and_fast()
    with pytest.warns(UserWarning, match="measured anew"):
        operation(*level())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        operation(*level(side=8))
    assert clock.calls[-1] == "fast"
    (levels,) = measurements.read().values()
    assert {found.way for found in levels.values()} == {"fast"} and len(levels) == 2


def test_bytes_that_are_no_text_are_nonsense_too(measuring):
    measuring.parent.mkdir()
    measuring.write_bytes(b"\xff\xfe")
    with pytest.warns(UserWarning, match="cannot be understood"):
        assert measurements.read() == {}


def test_a_user_without_a_home_has_no_cache(measuring, monkeypatch, tmp_path):
    def no_entry(uid):
        raise KeyError(uid)

    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.delenv("HOME")
    monkeypatch.setattr(pwd, "getpwuid", no_entry)
    monkeypatch.chdir(tmp_path / "cache")
    clock = Clock(monkeypatch)
    operation = clock.slow_and_fast()
    operation(*level())
    assert clock.calls[-1] == "fast"
    assert os.listdir(tmp_path / "cache") == [] and measurements.clear() == 0


def test_a_machine_is_named_by_what_times_depend_on():
    name = measurements.machine(torch.device("cpu"))
    assert f"{torch.get_num_threads()} threads" in name and torch.__version__ in name
