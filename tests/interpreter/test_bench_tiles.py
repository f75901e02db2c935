"""The tile check of the benchmark, in the interpreter: right kernels pass, wrong results do not."""

from __future__ import annotations

import itertools
import json

import pytest
import torch

from bench import tiles

ARGUMENTS = ["--device", "cpu", "--dtypes", "fp32", "--channels", "3", "--size", "2", "--few"]
COUNT = itertools.count()


@pytest.fixture(scope="module")
def right(tmp_path_factory):
    """A results file of cases that passed."""
    out = tmp_path_factory.mktemp("tiles") / "tiles.jsonl"
    assert tiles.main([*ARGUMENTS, "--pools", "2", "--out", str(out)]) == 0
    return out


def test_right_kernels_pass_and_results_are_kept(right, monkeypatch, capsys):
    found = [json.loads(line) for line in right.read_text().splitlines()]
    assert [case["kernel"] for case in found] == ["forward", "dgrad", "wgrad"]
    names = {"y", "dx", "dweight0", "dweight1", "dbias0", "dbias1"}
    assert all(set(case["errors"]) == names and not case["failed"] for case in found)
    monkeypatch.setattr(tiles, "check", lambda case: pytest.fail("was run again"))
    assert tiles.main([*ARGUMENTS, "--pools", "2", "--out", str(right)]) == 0
    assert "3 cases, 0 failed" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("change", "why"),
    [
        (lambda found: found["dweight1"].mul_(1 + 1e-4), "dweight1 is off by"),
        (lambda found: found["y"][0, 0, 0, 0].fill_(torch.nan), "y is off by inf"),
        (lambda found: found["dx"][0, 0, 0, 0].fill_(next(COUNT)), "two runs differ"),
    ],
)
def test_wrong_results_fail(change, why, monkeypatch):
    ours = tiles._ours

    def wrong(*arguments):
        found = ours(*arguments)
        change(found)
        return found

    monkeypatch.setattr(tiles, "_ours", wrong)
    case = tiles.Case("dgrad", (16, 16, 16, 2, 2), "fp32", 1, 3, 2, 3, "cpu")
    errors, failed = tiles.check(case)
    assert why in failed and errors


def test_a_case_that_raises_does_not_end_the_run(monkeypatch, tmp_path, capsys):
    def broken(case):
        raise RuntimeError("no such instruction")

    monkeypatch.setattr(tiles, "check", broken)
    out = tmp_path / "tiles.jsonl"
    assert tiles.main([*ARGUMENTS, "--pools", "1", "--out", str(out)]) == 1
    assert "RuntimeError: no such instruction" in capsys.readouterr().out
    assert len(out.read_text().splitlines()) == 3


def test_every_tile_of_every_dtype_is_a_case():
    arguments = {"dtypes": ["bf16", "tf32", "fp32"], "pools": [1, 2, 3], "channels": [64, 72]}
    space = type(
        "Arguments", (), {**arguments, "few": False, "size": 20, "samples": 3, "device": "cuda"}
    )
    cases = list(tiles._cases(space))
    assert len({case.id for case in cases}) == len(cases)
    for kernel in ("forward", "dgrad", "wgrad"):
        there = {case.tile for case in cases if case.kernel == kernel and case.dtype == "bf16"}
        assert there == {tuple(tile) for tile in tiles._module(kernel).TENSOR_CORE_TILES}
        box = f"box_{kernel}"
        there = {case.tile for case in cases if case.kernel == box}
        assert there == {tuple(tile) for tile in tiles._module(box).TILES}
        assert {case.dtype for case in cases if case.kernel == box} == {"bf16"}
