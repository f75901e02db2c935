"""The demo: its data are what they claim, a run is reproducible, errors say what to do."""

import gzip
import io
import json
import shutil
import struct
import sys
import time
from functools import partial
from pathlib import Path

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

DEBIAN_FOLDER = Path("/usr/share/datasets/fashion-mnist")


@pytest.fixture(scope="module")
def digits():
    return data.digits(seed=0)


@pytest.fixture(autouse=True)
def threads():
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def rows(split) -> set[bytes]:
    return {image.numpy().tobytes() for image in split[0]}


# The data


def test_digits_are_split_without_overlap(digits):
    assert digits.side == 8
    splits = (digits.train, digits.valid, digits.test)
    assert sum(len(y) for _, y in splits) == 1797
    assert sum(len(rows(split)) for split in splits) == len(set().union(*map(rows, splits)))
    for x, y in splits:
        assert x.shape == (len(y), 1, 8, 8)
        assert (x.dtype, y.dtype) == (torch.float32, torch.int64)
        assert (x.min(), x.max()) == (-0.5, 0.5)
        assert set(y.tolist()) == set(range(10))


def test_tasks_are_small_diverse_and_within_range(digits):
    tasks = data.make_tasks(digits, 14, seed=0)
    class_sets = [frozenset(task.note.partition(",")[0].split()) for task in tasks]
    assert len(set(class_sets)) == 14
    assert all(len(classes) == 4 for classes in class_sets)
    names = [task.note.split(", ")[1] for task in tasks]
    assert set(names[:7]) == set(names[7:]) == set(data.TRANSFORMS)
    for task in tasks:
        for (x, y), per_class in ((task.train, 10), (task.valid, 20)):
            assert y.bincount().tolist() == [per_class] * 4
            assert x.shape == (4 * per_class, 1, 8, 8)
        for x, _ in (task.train, task.valid, task.test):
            assert x.min() >= -0.5
            assert x.max() <= 0.5


def test_tasks_follow_from_the_seed(digits):
    one, same = data.make_tasks(digits, 3, seed=1), data.make_tasks(digits, 3, seed=1)
    other = data.make_tasks(digits, 3, seed=2)
    for a, b in zip(one, same, strict=True):
        assert a.note == b.note
        for (x, y), (x_again, y_again) in zip(
            (a.train, a.valid, a.test), (b.train, b.valid, b.test), strict=True
        ):
            assert torch.equal(x, x_again)
            assert torch.equal(y, y_again)
    assert [task.note for task in one] != [task.note for task in other]


def test_tasks_with_some_transformations_only(digits):
    chosen = ("inverted", "as is")
    tasks = data.make_tasks(digits, 6, seed=0, transforms=chosen)
    names = [task.note.split(", ")[1] for task in tasks]
    assert all(set(names[i : i + 2]) == set(chosen) for i in (0, 2, 4))
    everything = data.make_tasks(digits, 6, seed=0, transforms=list(data.TRANSFORMS))
    default = data.make_tasks(digits, 6, seed=0)
    assert [task.note for task in everything] == [task.note for task in default]
    assert all(torch.equal(a.test[0], b.test[0]) for a, b in zip(everything, default, strict=True))


def test_noise_is_clipped_and_labels_follow_the_order_of_the_note(digits, monkeypatch):
    monkeypatch.setattr(data, "TRANSFORMS", {"as is": data.TRANSFORMS["as is"]})
    monkeypatch.setattr(data, "NOISE_MEANS", (0.0,))
    monkeypatch.setattr(data, "NOISE_SDS", (0.0,))
    (clean,) = data.make_tasks(digits, 1, seed=0)
    label_of = dict(zip(map(bytes, map(_bytes, digits.train[0])), digits.train[1], strict=True))
    classes = [int(name) for name in clean.note.partition(",")[0].split()]
    x, y = clean.train
    assert [label_of[_bytes(image)] for image in x] == [classes[label] for label in y]

    monkeypatch.setattr(data, "NOISE_MEANS", (0.25,))
    (brighter,) = data.make_tasks(digits, 1, seed=0)
    assert torch.equal(brighter.train[0], (x + 0.25).clamp(-0.5, 0.5))


def _bytes(image) -> bytes:
    return image.numpy().tobytes()


@pytest.mark.parametrize("name", data.TRANSFORMS)
def test_transformations_are_fixed_and_lose_nothing(name):
    side = 5
    x = torch.arange(2 * side * side, dtype=torch.float32).view(2, 1, side, side)
    alter = data.TRANSFORMS[name](side, torch.Generator().manual_seed(0))
    once = alter(x)
    assert once.shape == x.shape
    assert torch.equal(once, alter(x))
    assert torch.equal(once.abs().flatten(1).sort(1).values, x.flatten(1))
    assert torch.equal(once, x) == (name == "as is")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"classes_per_task": 11}, r"classes_per_task must be in \[1, 10\], got 11"),
        ({"classes_per_task": 10, "n_tasks": 2}, r"n_tasks must be in \[1, 1\]"),
        ({"n_tasks": 0}, r"n_tasks must be in \[1, 210\]"),
        ({"transforms": ()}, r"transforms: expected some of 'as is', .*'pixels mixed', got \(\)"),
        ({"transforms": ("as is", "upside down")}, r"got \('as is', 'upside down'\)"),
        ({"transforms": "as is"}, r"transforms: expected some of .*, got 'as is'"),
    ],
)
def test_impossible_sequences(digits, options, message):
    with pytest.raises(ValueError, match=message):
        data.make_tasks(digits, **{"n_tasks": 1, "seed": 0, **options})


# Fashion-MNIST


def idx(values: torch.Tensor) -> bytes:
    shape = struct.pack(f">{values.dim()}I", *values.shape)
    return bytes([0, 0, 8, values.dim()]) + shape + values.to(torch.uint8).numpy().tobytes()


@pytest.fixture
def folder(tmp_path):
    for part, n in (("train", 20), ("t10k", 10)):
        images = (torch.arange(n * 16) % 256).view(n, 4, 4)
        images_file = tmp_path / f"{part}-images-idx3-ubyte.gz"
        images_file.write_bytes(gzip.compress(idx(images)))
        (tmp_path / f"{part}-labels-idx1-ubyte").write_bytes(idx(torch.arange(n) % 10))
    return tmp_path


def test_idx_files_gzipped_or_not(folder):
    images = data.fashion_mnist(folder, seed=0)
    assert [len(y) for _, y in (images.train, images.valid, images.test)] == [18, 2, 10]
    x, y = images.test
    assert y.tolist() == list(range(10))
    expected = (torch.arange(160) % 256 / 255 - 0.5).view(10, 1, 4, 4)
    assert torch.equal(x, expected)


@pytest.mark.parametrize(
    ("name", "content", "error", "message"),
    [
        ("t10k-labels-idx1-ubyte", None, FileNotFoundError, "Debian's package"),
        ("t10k-labels-idx1-ubyte", b"PNG", ValueError, "not an idx file of bytes with 1 dim"),
        ("t10k-labels-idx1-ubyte", idx(torch.arange(10))[:-1], ValueError, "9 values for shape"),
        ("t10k-labels-idx1-ubyte", idx(torch.arange(9)), ValueError, "10 t10k images but 9 label"),
        ("t10k-images-idx3-ubyte.gz", b"plain", ValueError, "idx3-ubyte.gz: Not a gzipped file"),
    ],
)
def test_broken_folder(folder, name, content, error, message):
    if content is None:
        (folder / name).unlink()
    else:
        (folder / name).write_bytes(content)
    with pytest.raises(error, match=message):
        data.fashion_mnist(folder, seed=0)


@pytest.mark.skipif(not DEBIAN_FOLDER.is_dir(), reason="package dataset-fashion-mnist is missing")
def test_fashion_mnist_of_debian():
    images = data.fashion_mnist(DEBIAN_FOLDER, seed=0)
    assert images.train[0].shape == (54_000, 1, 28, 28)
    assert images.test[1].bincount().tolist() == [1000] * 10


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
