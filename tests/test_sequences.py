"""The search for a sequence that selective sharing wins: the rule, the file, a tiny run."""

import json
import re

import pytest
import torch

pytest.importorskip("sklearn")
pytest.importorskip("joblib")
pytest.importorskip("scipy")

from bench import candidates, sequences
from bench.candidates import Candidate
from lasem_fast.demo import data


@pytest.fixture(autouse=True)
def threads():
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def runs(lasem, everything, nothing):
    """Accuracies after the last task, by seed."""
    return {
        str(seed): {
            method: {"average_accuracy": value, "own_accuracy": value, "forgetting": 0.0,
                     "parameters": 1000}
            for method, value in zip(("lasem", "all", "none"), values, strict=True)
        }
        for seed, values in enumerate(zip(lasem, everything, nothing, strict=True))
    }  # fmt: skip


def test_the_list_is_the_one_that_is_written_down():
    rows = re.findall(
        r"^(digits|fashion) +(\d) x (\d+) +(every way|as is|late alike)", sequences.__doc__,
        re.MULTILINE,
    )  # fmt: skip
    listed = [Candidate(name, int(c), int(n), way) for name, c, n, way in rows]
    assert listed == list(candidates.CANDIDATES)
    assert len({candidate.name for candidate in listed}) == len(listed) == 11
    assert set().union(*candidates.WAYS.values()) == set(data.TRANSFORMS)
    assert f"{candidates.TASKS}\ntasks of the demo" in sequences.__doc__
    assert f"{candidates.EPOCHS} epochs" in sequences.__doc__


@pytest.mark.parametrize(
    ("lasem", "everything", "nothing", "verdict"),
    [
        ((0.9, 0.8), (0.8, 0.7001), (0.7, 0.6), "wins"),
        ((0.9, 0.8), (0.8, 0.7001), (0.9, 0.8), "undecided"),
        ((0.9, 0.8), (0.8, 0.7001), (1.0, 0.9001), "loses"),
        ((0.9, 0.8), (0.6, 0.7), (0.7, 0.6), "undecided"),
        ((0.9,), (0.1,), (0.1,), "undecided"),
    ],
)
def test_the_rule(lasem, everything, nothing, verdict):
    assert sequences.result(runs(lasem, everything, nothing))["verdict"] == verdict


def test_an_interval_by_hand():
    # differences 0.1, 0.2, 0.3: mean 0.2, s = 0.1, t(2, 97.5%) = 4.302653
    found = sequences.result(runs((0.5, 0.6, 0.7), (0.4, 0.4, 0.4), (0.5, 0.6, 0.7)))
    assert found["differences"]["all"]["mean"] == pytest.approx(0.2)
    assert found["differences"]["all"]["half"] == pytest.approx(4.302653 * 0.1 / 3**0.5, abs=1e-6)
    assert found["differences"]["none"] == {"mean": 0.0, "half": 0.0}
    assert found["verdict"] == "undecided"
    assert found["means"]["average_accuracy"] == pytest.approx(
        {"lasem": 0.6, "all": 0.4, "none": 0.6}
    )
    row = sequences.table({"a name": found}).splitlines()[2]
    assert row == (
        "| a name | 60.0 | 40.0 | 60.0 | +20.0 ±24.8 | +0.0 ±0.0 | 0.0 / 0.0 | 1k / 1k / 1k | 3 | "
        "undecided |"
    )


@pytest.fixture
def tiny(monkeypatch):
    """Two sequences of two tasks, one epoch."""
    listed = (Candidate("digits", 2, 4, "as is"), Candidate("digits", 2, 4, "late alike"))
    monkeypatch.setattr(candidates, "CANDIDATES", listed)
    monkeypatch.setattr(candidates, "TASKS", 2)
    monkeypatch.setattr(candidates, "EPOCHS", 1)
    return listed


def test_a_search_goes_on_with_its_file(tiny, tmp_path, capsys, monkeypatch):
    out, whole = tmp_path / "out.json", tmp_path / "whole.json"
    assert sequences.main(["--out", str(out), "--seeds", "1", "--only", tiny[1].name]) == 0
    first = json.loads(out.read_text())
    assert list(first["runs"]) == [tiny[1].name]
    assert first["machine"]["torch"] == first["settings"]["versions"]["torch"]

    begun, run = [], candidates.run

    def noted(candidate, seed, root):
        begun.append((candidate, seed))
        return run(candidate, seed, root)

    monkeypatch.setattr(candidates, "run", noted)
    capsys.readouterr()
    assert sequences.main(["--out", str(out), "--seeds", "2"]) == 0
    assert begun == [(tiny[0], 0), (tiny[0], 1), (tiny[1], 1)]
    found = json.loads(out.read_text())
    assert list(found["runs"]) == [tiny[0].name, tiny[1].name]
    assert found["runs"][tiny[1].name]["0"] == first["runs"][tiny[1].name]["0"]
    assert list(found["results"]) == [tiny[0].name, tiny[1].name]
    printed = capsys.readouterr().out
    assert "digits 2 x 4, as is" in printed and "no sequences of Fashion-MNIST" in printed

    assert sequences.main(["--out", str(whole), "--seeds", "2"]) == 0
    again = json.loads(whole.read_text())
    for name in found["runs"]:
        for seed in ("0", "1"):
            for result in (found, again):
                assert result["runs"][name][seed].pop("seconds") > 0
            assert found["runs"][name][seed] == again["runs"][name][seed]
            assert found["runs"][name][seed]["none"]["forgetting"] == 0
            assert len(found["runs"][name][seed]["lasem"]["kept"]) == 2


def test_other_settings_are_not_mixed_in(tiny, tmp_path, capsys, monkeypatch):
    out = tmp_path / "out.json"
    out.write_text("{}")
    for message in (
        "expected results of this search",
        "expected results with the present settings",
    ):
        with pytest.raises(SystemExit):
            sequences.main(["--out", str(out), "--seeds", "1"])
        assert message in capsys.readouterr().err
        monkeypatch.setattr(candidates, "EPOCHS", 2)
        out.write_text(json.dumps({"settings": {"epochs": 1}, "runs": {}}))


def test_what_had_ended_is_kept(tiny, tmp_path, monkeypatch, capsys):
    run = candidates.run

    def interrupted(candidate, seed, root):
        if candidate == tiny[1]:
            raise KeyboardInterrupt
        return run(candidate, seed, root)

    monkeypatch.setattr(candidates, "run", interrupted)
    out = tmp_path / "out.json"
    assert sequences.main(["--out", str(out), "--seeds", "1"]) == 130
    assert "the same command goes on" in capsys.readouterr().err
    assert list(json.loads(out.read_text())["runs"]) == [tiny[0].name]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--out", f"{__file__}/below"], "Not a directory"),
        (["--only", "digits 9 x 9, as is"], "invalid choice"),
        (["--root", "nowhere"], "no train-images-idx3-ubyte.gz or"),
    ],
)
def test_wrong_options(options, message, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(candidates, "run", None)
    with pytest.raises(SystemExit):
        sequences.main(["--out", str(tmp_path / "out.json"), *options])
    assert message in capsys.readouterr().err
