"""The demo: net, timing, plots; a run is reproducible, nothing is lost, errors say what to do."""

import io
import json
import shutil
import sys
import time
from functools import partial

import pytest
import torch

pytest.importorskip("sklearn")
pytest.importorskip("matplotlib")
pytest.importorskip("rich")
pytest.importorskip("joblib")

import joblib

from lasem_fast.__main__ import COMMANDS, main
from lasem_fast.demo import data, model, plots, results, timing, training
from lasem_fast.lifelong import RunRecord, TaskRecord
from lasem_fast.net import TransferNet


@pytest.fixture(scope="module")
def digits():
    return data.digits(seed=0)


@pytest.fixture(autouse=True)
def threads():
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


# The network, the timing, the plots


@pytest.mark.parametrize("side", [8, 28])
def test_head_fits_the_last_stage(side):
    net = TransferNet(model.make_stages(side))
    net.add_task("t", model.make_head(3, side))
    assert net.depth == model.DEPTH
    assert net(torch.zeros(2, 1, side, side), "t", config=0).shape == (2, 3)


def test_timing_of_the_three_steps(digits):
    (task,) = data.make_tasks(digits, 1, seed=0)
    state = torch.get_rng_state()
    times = timing.time_steps(
        lambda: TransferNet(model.make_stages(8)), lambda t: model.make_head(t.n_classes, 8), task,
        batch_size=4, backend="torch", rounds=2,
    )  # fmt: skip
    assert times["backend"] == "torch"
    assert times["batch_size"] == 4
    assert set(times["milliseconds"]) == {"em", "naive", "plain"}
    assert min(times["milliseconds"].values()) > 0
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("n_tasks", [1, 6])
def test_plots_of_any_number_of_tasks(tmp_path, n_tasks):
    labels = ["{1,2}", "{1}", "{2}", "{}"]
    rows = [[0.25] * 4, [0.0, 1.0, 0.0, 0.0]]
    tasks = [
        TaskRecord(f"t{i}", "", [True, False], "{1}", posterior=rows, prior=rows[1])
        for i in range(n_tasks)
    ]
    record = RunRecord("lasem", 0, 2, 8, labels, tasks, share_frequency=[1.0, 0.0])
    plots.plot_posterior(record, tmp_path / "a.png")
    plots.plot_share_frequency(record, tmp_path / "b.png")
    for name in ("a.png", "b.png"):
        assert (tmp_path / name).read_bytes().startswith(b"\x89PNG")


# The command


def test_results_follow_from_the_seeds_whatever_the_workers(tmp_path, capsys):
    found = []
    for workers in ("1", "2"):
        out = tmp_path / workers
        options = ["--quick", "--tasks", "2", "--seed", "3", "--seeds", "2", "--workers", workers]
        assert main(["demo", *options, "--out", str(out)]) == 0
        for picture in results.PICTURES:
            assert (out / picture).read_bytes().startswith(b"\x89PNG")
        assert not (out / "unfinished.json").exists()
        result = json.loads((out / "run.json").read_text())
        timing = result.pop("timing")
        assert set(timing["milliseconds"]) == {"em", "naive", "plain"}
        assert timing["workers"] == int(workers)
        for of_seed in result["runs"].values():
            for record in of_seed.values():
                assert record.pop("seconds")["train"] > 0
        found.append(result)
        printed = " ".join(capsys.readouterr().out.split())
        for task in result["runs"]["3"]["lasem"]["tasks"]:
            assert task["label"] in printed
        for text in ("6 of 6 runs", "the first seed (3)", "mean and range over 2 seeds",
                     "nothing shared", "of 2 seeds", "the naive loop"):  # fmt: skip
            assert text in printed
        assert ("2 runs at a time" in printed) == (workers == "2")
    assert found[0] == found[1]
    assert found[0]["config"]["tasks"] == 2
    assert found[0]["config"]["seeds"] == [3, 4]
    assert list(found[0]["runs"]) == ["3", "4"]
    assert all(list(of_seed) == ["lasem", "all", "none"] for of_seed in found[0]["runs"].values())
    assert found[0]["comparison"]["none"]["forgetting"]["values"] == {"3": 0.0, "4": 0.0}


def test_a_seed_is_the_same_run_alone_and_among_others(tmp_path):
    runs = []
    for name, options in (("alone", ["--seed", "1"]), ("both", ["--seeds", "2"])):
        options += ["--tasks", "1", "--epochs", "1", "--workers", "1"]
        assert main(["demo", "--quick", *options, "--out", str(tmp_path / name)]) == 0
        runs.append(json.loads((tmp_path / name / "run.json").read_text())["runs"]["1"])
    for record in (*runs[0].values(), *runs[1].values()):
        del record["seconds"]
    assert runs[0] == runs[1]


def test_as_many_workers_as_there_are_seeds_and_cpus(tmp_path, monkeypatch):
    asked = []

    def run_all(settings, seeds, workers, *told):
        asked.append(workers)
        raise KeyboardInterrupt

    monkeypatch.setattr(training, "run_all", run_all)
    monkeypatch.setattr(joblib, "cpu_count", lambda: 4)
    given = (
        [], ["--seeds", "2"], ["--seeds", "8"], ["--threads", "2"], ["--threads", "8"],
        ["--workers", "7"], ["--workers", "20"], ["--quick"],
    )  # fmt: skip
    for options in given:
        assert main(["demo", *options, "--out", str(tmp_path)]) == 130
    assert asked == [3, 2, 4, 2, 1, 7, 9, 1]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--data", "fashion-mnist"], "needs --root"),
        (["--data", "fashion-mnist", "--root", "nowhere"], "no train-images-idx3-ubyte.gz or"),
        (["--tasks", "211"], "n_tasks must be in [1, 210]"),
        (["--backend", "abacus"], "abacus"),
        (["--device", "abacus"], "abacus"),
        (["--device", "meta"], "expected a device that PyTorch can use here"),
        (["--epochs", "0"], "argument --epochs: expected at least 1, got 0"),
        (
            ["--threads", "1000000"],
            "argument --threads: expected at most 1024 threads, got 1000000",
        ),
        (["--epochs", "many"], "argument --epochs: expected a whole number, got 'many'"),
        (["--seeds", "0"], "argument --seeds: expected at least 1, got 0"),
        (["--workers", "0"], "argument --workers: expected at least 1, got 0"),
        (["--seed", str(2**63 - 1), "--seeds", "2"], "--seeds: expected seeds below 2^63, got"),
        (["--seed", "-1"], "argument --seed: expected a number in 0..2^63 - 1, got -1"),
        (["--root", "here"], "--root: expected only together with --data fashion-mnist"),
        (["--out", __file__], "--out: expected a folder that can be written, got"),
        (["--out", f"{__file__}/below"], "--out: expected a folder that can be written, got"),
    ],
)
def test_wrong_options_end_with_a_message_before_training(options, message, capsys, monkeypatch):
    monkeypatch.setattr(training, "train_sequence", None)
    with pytest.raises(SystemExit) as end:
        main(["demo", *options])
    assert end.value.code == 2
    assert message in capsys.readouterr().err


SHORT = ["demo", "--tasks", "1", "--epochs", "1", "--seeds", "1"]


def test_a_terminal_of_ascii_is_no_reason_to_fail(tmp_path, monkeypatch):
    for name in ("stdout", "stderr"):
        monkeypatch.setattr(sys, name, io.TextIOWrapper(io.BytesIO(), encoding="ascii"))
    assert main([*SHORT, "--out", str(tmp_path)]) == 0
    sys.stdout.flush()
    printed = sys.stdout.buffer.getvalue().decode("ascii")
    assert "nothing shared" in printed and "posterior.png" in printed


def test_a_folder_that_is_gone_in_the_end_loses_nothing(tmp_path, monkeypatch, capsys):
    out, other = tmp_path / "out", tmp_path / "other"

    def time_steps(*args, **options):
        runs = json.loads((out / "unfinished.json").read_text())["runs"]
        assert list(runs["0"]) == ["lasem", "all", "none"]
        shutil.rmtree(out)
        out.touch()
        return timing_of(*args, **{**options, "rounds": 1})

    timing_of = timing.time_steps
    monkeypatch.setattr(timing, "time_steps", time_steps)
    monkeypatch.setattr(results.tempfile, "mkdtemp", lambda prefix: other.mkdir() or str(other))
    assert main([*SHORT, "--out", str(out)]) == 1
    printed = " ".join(capsys.readouterr().out.split())
    assert "cannot be written" in printed and "share_frequency.png in" in printed
    assert json.loads((other / "run.json").read_text())["comparison"]
    assert {path.name for path in other.iterdir()} == {"run.json", *results.PICTURES}


def test_where_no_file_can_be_written_the_results_are_printed(tmp_path, monkeypatch, capsys):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(results, "_write_json", full)
    assert main([*SHORT, "--out", str(tmp_path)]) == 1
    printed = capsys.readouterr().out
    assert json.JSONDecoder().raw_decode(printed[printed.index('{"config"') :])[0]["runs"]
    assert "No space left on device" in printed


@pytest.mark.parametrize("error", [KeyboardInterrupt, ZeroDivisionError])
def test_what_had_ended_is_kept_when_the_run_breaks_off(error, tmp_path, monkeypatch, capsys):
    def time_steps(*args, **options):
        raise error

    monkeypatch.setattr(timing, "time_steps", time_steps)
    (tmp_path / "run.json").write_text("of an earlier run")
    if error is KeyboardInterrupt:
        assert main([*SHORT, "--out", str(tmp_path)]) == 130
    else:
        with pytest.raises(error):
            main([*SHORT, "--out", str(tmp_path)])
    told = capsys.readouterr().err
    assert f"{error.__name__} before the end; what had ended is in" in told
    assert json.loads((tmp_path / "unfinished.json").read_text())["runs"]["0"]["none"]["tasks"]
    assert (tmp_path / "run.json").read_text() == "of an earlier run"


train = training.train


def fails_with_seed_1(folder, settings, seed, method, **told):
    """What a worker process is given; it waits until something has been kept."""
    while seed == 1 and not (folder / "unfinished.json").exists():
        time.sleep(0.01)
    if seed == 1:
        raise ZeroDivisionError
    return train(settings, seed, method, **told)


@pytest.mark.parametrize("workers", ["1", "2"])
def test_what_had_ended_is_kept_when_a_run_fails(workers, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(training, "train", partial(fails_with_seed_1, tmp_path))
    options = ["--tasks", "2", "--epochs", "1", "--seeds", "2", "--workers", workers]
    with pytest.raises(ZeroDivisionError):
        main(["demo", *options, "--out", str(tmp_path)])
    assert "ZeroDivisionError before the end; what had ended is in" in capsys.readouterr().err
    kept = json.loads((tmp_path / "unfinished.json").read_text())
    assert list(kept["runs"]) == ["0"]
    assert kept["runs"]["0"].keys() == kept["comparison"].keys()


@pytest.mark.parametrize(("module", "project"), COMMANDS["demo"].needs)
def test_missing_packages_are_named_with_the_extra(module, project, monkeypatch, capsys):
    for name in [n for n in sys.modules if n.partition(".")[0] == module]:
        monkeypatch.delitem(sys.modules, name)
    for name in [n for n in sys.modules if n.startswith("lasem_fast.demo")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, module, None)
    assert main(["demo", "--quick"]) == 1
    assert f"demo needs {project}: pip install lasem_fast[demo]" in capsys.readouterr().err


def test_help_of_the_command_itself(capsys):
    with pytest.raises(SystemExit) as end:
        main(["demo", "--help"])
    assert end.value.code == 0
    assert "--backend" in capsys.readouterr().out
