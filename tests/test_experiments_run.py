"""The command `run`: files, failures, several workers, other settings in one folder."""

from __future__ import annotations

import csv
import json
import re
import shutil

import drawn_experiment
import experiment_cases as cases
import pytest

pytest.importorskip("pydantic")
pytest.importorskip("rich")

import killed_experiment

from lasem_fast.__main__ import main
from lasem_fast.experiments import prediction
from lasem_fast.experiments.config import tomllib
from lasem_fast.experiments.experiment import Experiment
from lasem_fast.lifelong import train_sequence

FEW = """
[[methods]]
method = "static"
config = ["all", "top-1"]

[[methods]]
method = "brute-force"
tasks = 2
"""


@pytest.fixture
def write(tmp_path):
    """Writes a config, gives its path; ``out`` is beside it."""

    def written(methods=drawn_experiment.METHODS, **changes):
        changes.setdefault("out", f'"{tmp_path / "out"}"')
        path = tmp_path / "config.toml"
        path.write_text(drawn_experiment.config(methods, **changes))
        return path

    return written


def test_a_run_leaves_one_json_per_run_and_tables(write, tmp_path, capsys):
    path = write()
    assert main(["run", str(path), "--plan"]) == 0
    planned = capsys.readouterr().out
    assert "10 of 10 runs left" in planned and "Brute force hps" in planned
    assert not (tmp_path / "out").exists()
    assert main(["run", str(path)]) == 0
    out = tmp_path / "out"
    experiment = Experiment.of(tomllib.loads(path.read_text()))
    assert len(experiment.units()) == 10
    for unit in experiment.units():
        assert {p.name for p in unit.folder.iterdir()} == {
            "settings.json", "run.json", "times.json"
        }  # fmt: skip
        run = json.loads((unit.folder / "run.json").read_text())
        assert run["schema"] == 1 and set(run) == {
            "schema", "settings", "summary", "record", "machine", "versions"
        }  # fmt: skip
        record = train_sequence(**experiment.arguments(unit)).to_dict()
        summary = record.pop("summary")
        assert set(record.pop("seconds")) == {"train", "evaluate", "rest"}
        assert (run["record"], run["summary"]) == (record, summary)
        assert run["settings"]["seed"] == unit.seed == record["seed"]
        assert len(record["tasks"]) == (2 if unit.shared else 3)
    with (out / "summary.csv").open() as lines:
        rows = list(csv.DictReader(lines))
    assert [(row["label"], int(row["seed"])) for row in rows] == [
        (unit.variant.label, unit.seed) for unit in experiment.units()
    ]
    for unit, row in zip(experiment.units(), rows, strict=True):
        run = json.loads((unit.folder / "run.json").read_text())
        assert float(row["peak_accuracy"]) == run["summary"]["peak_accuracy"]
        assert int(row["parameters"]) == run["record"]["parameters"]
    # nothing is left to do, and nothing is done again
    before = killed_experiment.contents(out)
    assert main(["run", str(path)]) == 0
    assert killed_experiment.contents(out) == before


def test_two_workers_leave_what_one_leaves(write, tmp_path):
    path = write(FEW, seeds="[0]")
    assert main(["run", str(path)]) == 0
    shutil.move(tmp_path / "out", tmp_path / "one")
    assert main(["run", str(path), "--workers", "2"]) == 0
    assert killed_experiment.contents(tmp_path / "out") == killed_experiment.contents(
        tmp_path / "one"
    )


def test_another_config_in_the_same_folder_is_refused(write, tmp_path, capsys):
    methods = '[[methods]]\nmethod = "static"\n'
    assert main(["run", str(write(methods))]) == 0
    assert main(["run", str(write(methods, seeds="[0, 1, 2]"))]) == 0  # more of the same
    text = write(methods).read_text().replace("lr = 0.02", "lr = 0.03")
    (tmp_path / "config.toml").write_text(text)
    with pytest.raises(SystemExit) as end:
        main(["run", str(tmp_path / "config.toml")])
    told = capsys.readouterr().err
    assert end.value.code == 2 and "'lr': 0.02" in told and "'lr': 0.03" in told


def test_a_run_that_fails_leaves_the_others_alone(write, tmp_path, capsys):
    source = drawn_experiment.__file__
    methods = (
        f'[[methods]]\nmethod = "{source}:Failing"\n'
        f'[[methods]]\nmethod = "{source}:Own"\noptions = {{ shared = 2 }}\n'
    )
    path = write(methods, seeds="[0]")
    assert main(["run", str(path)]) == 1
    told = capsys.readouterr().err
    assert "Failing hps, seed 0 failed: " in told and "as it was asked to" in told
    out = tmp_path / "out"
    assert "KeyError" in (out / "failing-hps" / "seed0" / "error.txt").read_text()
    run = json.loads((out / "own-hps" / "seed0" / "run.json").read_text())
    assert [task["label"] for task in run["record"]["tasks"]] == ["{2}"] * 3
    with pytest.raises(SystemExit):
        main(["run", str(write(methods.replace("shared", "share"), seeds="[0]"))])
    assert "options.share: unknown key; did you mean 'shared'?" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["NeverSteps", "NeverMade"])
def test_a_method_that_fails_at_once_leaves_the_others_alone(name, write, tmp_path, capsys):
    source = drawn_experiment.__file__
    methods = f'[[methods]]\nmethod = "{source}:{name}"\n[[methods]]\nmethod = "static"\n'
    path = write(methods, seeds="[0]")
    assert main(["run", str(path), "--plan"]) == 0
    planned = capsys.readouterr()
    assert re.search(rf"{name} hps +1 +\?", planned.out)
    assert "without 1 of unknown time" in planned.out
    why = "no time to predict, RuntimeError: as it was asked to"
    assert f"{name} hps: {why}" in planned.err
    assert main(["run", str(path)]) == 1
    assert f"{name} hps, seed 0 failed: " in capsys.readouterr().err
    folder = tmp_path / "out" / f"{name.lower()}-hps" / "seed0"
    assert "RuntimeError: as it was asked to" in (folder / "error.txt").read_text()
    assert (tmp_path / "out" / "all-hps" / "seed0" / "run.json").exists()


@pytest.mark.parametrize("name", ["run.json", "times.json", "settings.json"])
@pytest.mark.parametrize("text", ["{", "[]", "{}"])
def test_a_damaged_file_of_a_finished_run_is_named(name, text, write, tmp_path, capsys):
    path = write('[[methods]]\nmethod = "static"\n', seeds="[0]")
    assert main(["run", str(path)]) == 0
    folder = tmp_path / "out" / "all-hps" / "seed0"
    (folder / name).write_text(text)
    capsys.readouterr()
    with pytest.raises(SystemExit) as end:
        main(["run", str(path)])
    told = capsys.readouterr().err
    assert end.value.code == 2 and f"{path}:\nout: expected " in told and str(folder) in told


def test_tables_that_cannot_be_written_are_told(write, tmp_path, capsys):
    (tmp_path / "out" / "summary.csv").mkdir(parents=True)
    with pytest.raises(SystemExit) as end:
        main(["run", str(write('[[methods]]\nmethod = "static"\n', seeds="[0]"))])
    assert end.value.code == 2
    assert "out: expected a folder that can be written" in capsys.readouterr().err


def test_the_seed_is_the_trial_of_the_data(write):
    experiment = Experiment.of(tomllib.loads(write().read_text()))
    sizes = {unit.seed: len(experiment.tasks(unit)[0].train[0]) for unit in experiment.units()}
    assert sizes == {0: 21, 1: 20}
    fixed = tomllib.loads(write().read_text())
    fixed["data"]["trial"] = 5
    experiment = Experiment.of(fixed)
    assert {len(experiment.tasks(unit)[0].train[0]) for unit in experiment.units()} == {16}


def test_a_prediction_counts_trials_and_epochs(write, monkeypatch):
    """With a clock that says how many steps and evaluations were asked for."""
    costs = prediction.Cost(3.0, 20.0)
    monkeypatch.setattr(prediction, "_measured", lambda arguments, variant: costs)
    plain = tomllib.loads(write().read_text())
    plain["training"]["evaluate_earlier_every"] = 3
    found = prediction.predict(Experiment.of(plain))
    # 3 tasks, 3 epochs of 3 mini-batches of cost 3; 9 evaluations of the task itself, 3 x 1
    # of those before it, and 1 + 2 + 3 at the ends
    assert found["all-hps"] == 3 * 3 * 3 * 3 + (9 + 3 + 6) * 20
    # 1 + 4 trainings of 2 tasks
    assert found["brute-force-hps"] == 5 * 3 * 3 * 3 + (15 + 2.5 + 3) * 20


def test_test_samples_are_spread_over_the_split(write):
    plain = tomllib.loads(write().read_text())
    plain["training"]["test_samples"] = 10
    experiment = Experiment.of(plain)
    found = experiment.tasks(experiment.units()[0])
    for task, whole in zip(found, cases.make_tasks(3), strict=True):
        rows = [int(i * 2.5) for i in range(10)]
        assert task.test[0].tolist() == whole.test[0][rows].tolist()
        assert task.test[1].tolist() == whole.test[1][rows].tolist()
        assert len(task.valid[0]) == len(whole.valid[0])


def test_curves_for_tensorboard(write, tmp_path):
    pytest.importorskip("tensorboard")
    path = write('[[methods]]\nmethod = "static"\n', seeds="[0]", tensorboard="true")
    assert main(["run", str(path)]) == 0
    assert list((tmp_path / "out" / "all-hps" / "seed0" / "tensorboard").iterdir())


def test_a_method_of_ones_own_is_trained_as_a_built_in_one(write, tmp_path):
    methods = f'[[methods]]\nmethod = "{drawn_experiment.__file__}:Own"\n'
    assert main(["run", str(write(methods, seeds="[0]"))]) == 0
    own = json.loads((tmp_path / "out" / "own-hps" / "seed0" / "run.json").read_text())["record"]
    methods = '[[methods]]\nmethod = "static"\nconfig = "bottom-1"\n'
    assert main(["run", str(write(methods, seeds="[0]"))]) == 0
    path = tmp_path / "out" / "bottom-1-hps" / "seed0" / "run.json"
    static = json.loads(path.read_text())["record"]
    assert {**own, "method": ""} == {**static, "method": ""}
    assert len(static["share_frequency"]) == cases.DEPTH
