"""Tables and figures against numpy, from folders of runs with drawn numbers."""

from __future__ import annotations

import csv
import json

import numpy as np
import pytest

pytest.importorskip("pydantic")
pytest.importorskip("matplotlib")
pytest.importorskip("rich")
pytest.importorskip("scipy")

from scipy import stats as scipy_stats

from lasem_fast import metrics
from lasem_fast.__main__ import main
from lasem_fast.experiments import reading, tables
from lasem_fast.experiments.config import ConfigError
from lasem_fast.lifelong import RunRecord, TaskRecord

SEEDS, TASKS, EPOCHS, DEPTH = 4, 3, 5, 4
METHODS = {
    "LASEM hps": {"method": "lasem", "transfer": "hps"},
    "All hps": {"method": "static", "transfer": "hps", "config": [1, 2, 3, 4]},
    "Top 2 hps": {"method": "static", "transfer": "hps", "config": [3, 4]},
    "Single task": {"method": "single-task"},
    "P=0.5 Top 2 hps": {
        "method": "fixed-probability", "transfer": "hps", "config": [3, 4], "probability": 0.5,
    },
    "P=1 Top 2 hps": {
        "method": "fixed-probability", "transfer": "hps", "config": [3, 4], "probability": 1.0,
    },
}  # fmt: skip


def drawn(label: str, generator: np.random.Generator) -> RunRecord:
    settings = METHODS[label]
    labels = ["a"] * 2**DEPTH if settings["method"] == "lasem" else []
    record = RunRecord(label, 0, EPOCHS, 10, labels, parameters=int(generator.integers(100, 999)))
    for number in range(TASKS):
        valid, test = generator.uniform(0.3, 0.9, (2, EPOCHS)).tolist()
        bits = generator.random(DEPTH) < 0.5
        if "config" in settings:
            bits = np.isin(np.arange(1, DEPTH + 1), settings["config"])
        config = [] if settings["method"] == "single-task" else bits.tolist()
        task = TaskRecord(f"t{number}", "", config, "", [1.0] * EPOCHS, valid, test)
        task.peak = metrics.peak_accuracy(valid, test)
        task.learning_curve_area = metrics.learning_curve_area(test)
        record.add(task, generator.uniform(0.3, 0.9, number + 1).tolist(), [])
    return record


@pytest.fixture
def folder(tmp_path):
    """A folder as `run` leaves it, and its records by label and seed."""
    generator = np.random.default_rng(3)
    records, seconds = {}, {}
    for label, settings in METHODS.items():
        for seed in range(SEEDS):
            record = drawn(label, generator)
            place = tmp_path / "drawn" / label.replace(" ", "-") / f"seed{seed}"
            place.mkdir(parents=True)
            plain = record.to_dict()
            del plain["seconds"]
            summary = plain.pop("summary")
            where = {"label": label, "method": settings, "seed": seed, "net": {"name": "cifar-4"}}
            run = {"schema": 1, "settings": where, "summary": summary, "record": plain}
            (place / "run.json").write_text(json.dumps(run))
            times = dict(
                zip(("train", "evaluate", "rest"), generator.uniform(1, 9, 3), strict=True)
            )
            (place / "times.json").write_text(json.dumps({"seconds": times}))
            records[label, seed], seconds[label, seed] = record, times
    summary = "label,seed\n" + "".join(f"{label},0\n" for label in METHODS)
    (tmp_path / "drawn" / "summary.csv").write_text(summary)
    return tmp_path / "drawn", records, seconds


def half(values) -> float:
    return scipy_stats.t.ppf(0.975, len(values) - 1) * scipy_stats.sem(values)


def test_table_1_against_numpy(folder):
    path, records, _ = folder
    rows = tables.table1(reading.read([path]))
    assert [row["method"] for row in rows] == list(METHODS)
    for row in rows:
        runs = [records[row["method"], seed] for seed in range(SEEDS)]
        R = np.array([run.accuracy_matrix() for run in runs])
        peaks = np.array([
            [task.test[int(np.argmax(task.valid))] for task in run.tasks] for run in runs
        ])  # fmt: skip
        diagonal = np.diagonal(R, axis1=1, axis2=2)
        expected = {
            "peak_accuracy": 100 * peaks.mean(1),
            "average_accuracy": 100 * R[:, -1].mean(1),
            "backward_transfer": 100 * (R[:, -1] - diagonal)[:, :-1].mean(1),
            "forgetting_ratio_to_end": (R[:, -1] / diagonal).mean(1),
            "forgetting_ratio_to_peak": (R[:, -1] / peaks).mean(1),
        }
        for name, values in expected.items():
            assert row[name] == pytest.approx(values.mean(), rel=1e-12)
            assert row[f"{name}_half"] == pytest.approx(half(values), rel=1e-9)
        assert row["parameters"] == round(np.mean([run.parameters for run in runs]))
        assert (row["seeds"], row["tasks"]) == (SEEDS, TASKS)


def test_table_2_names_the_best_static_configuration(folder):
    path, records, _ = folder
    (row,) = tables.table2(reading.read([path]))

    def peak(label):
        runs = [records[label, seed] for seed in range(SEEDS)]
        return 100 * np.mean([task.peak for run in runs for task in run.tasks])

    best = max(("All hps", "Top 2 hps"), key=peak)
    assert row["best_static_name"] == best
    assert row["best_static"] == pytest.approx(peak(best), rel=1e-12)
    assert row["all_shared"] == pytest.approx(peak("All hps"), rel=1e-12)
    assert row["peak_accuracy"] == pytest.approx(peak("LASEM hps"), rel=1e-12)
    assert (row["configurations"], row["net"]) == (2**DEPTH, "cifar-4")


def test_table_3_against_numpy(folder):
    path, _, seconds = folder
    rows = {row["method"]: row for row in tables.table3(reading.read([path]))}

    def spent(label, *phases):
        times = [sum(seconds[label, seed][p] for p in phases) for seed in range(SEEDS)]
        return np.array(times) / (TASKS * EPOCHS)

    every = ("train", "evaluate", "rest")
    for label, row in rows.items():
        assert row["seconds"] == pytest.approx(spent(label, *every).mean(), rel=1e-12)
        assert row["seconds_half"] == pytest.approx(half(spent(label, *every)), rel=1e-9)
        for phase in every:
            assert row[phase] == pytest.approx(spent(label, phase).mean(), rel=1e-12)
    search, everything = spent("LASEM hps", *every).mean(), spent("All hps", *every).mean()
    assert rows["All hps"]["relative_to_lasem"] == pytest.approx(everything / search)
    assert rows["LASEM hps"]["relative_to_all"] == pytest.approx(search / everything)
    steps = spent("LASEM hps", "train").mean() / spent("All hps", "train").mean()
    assert rows["LASEM hps"]["steps_relative_to_all"] == pytest.approx(steps)


def test_differences_are_paired_by_seed(folder):
    path, records, _ = folder
    rows = {row["against"]: row for row in tables.differences(reading.read([path]))}
    assert set(rows) == set(METHODS) - {"LASEM hps"}
    for label, row in rows.items():
        peaks = [
            [100 * np.mean([t.peak for t in records[name, s].tasks]) for s in range(SEEDS)]
            for name in ("LASEM hps", label)
        ]
        change = np.subtract(*peaks)
        assert row["peak_difference"] == pytest.approx(change.mean(), rel=1e-9)
        assert row["peak_difference_half"] == pytest.approx(half(change), rel=1e-9)


def test_the_command_prints_tables_and_writes_figures(folder, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    path, _, _ = folder
    assert main(["report", str(path)]) == 0
    told = capsys.readouterr().out
    for title in ("Table 1", "Table 2", "Table 3", "paired by seed"):
        assert title in told
    files = {p.name for p in (path / "report").iterdir()}
    figures = {f"figure{n}.{suffix}" for n in (1, 4, 5, 6) for suffix in ("png", "pdf")}
    assert files == figures | {"table1.csv", "table2.csv", "table3.csv", "differences.csv"}
    with (path / "report" / "table1.csv").open() as lines:
        rows = list(csv.DictReader(lines))
    expected = tables.table1(reading.read([path]))
    assert [float(row["peak_accuracy"]) for row in rows] == [r["peak_accuracy"] for r in expected]


def test_what_cannot_be_written_is_told_with_its_option(folder, tmp_path, capsys):
    path, _, _ = folder
    (tmp_path / "taken" / "table1.csv").mkdir(parents=True)
    (tmp_path / "file").touch()
    for name in ("taken", "file"):
        out = tmp_path / name
        with pytest.raises(SystemExit) as end:
            main(["report", str(path), "--out", str(out)])
        assert end.value.code == 2
        assert f"--out: expected a place that can be written, got '{out}'" in (
            capsys.readouterr().err
        )


def test_one_seed_has_no_interval(folder):
    path, records, _ = folder
    for run in path.glob("*/seed[123]/run.json"):
        run.unlink()
    row = tables.table1(reading.read([path]))[0]
    assert row["peak_accuracy_half"] is None and row["seeds"] == 1
    peaks = [task.peak for task in records["LASEM hps", 0].tasks]
    assert row["peak_accuracy"] == pytest.approx(100 * np.mean(peaks))


def test_what_is_no_folder_of_runs_is_refused(tmp_path, folder, capsys):
    with pytest.raises(SystemExit):
        main(["report", str(tmp_path / "nowhere")])
    assert "expected a folder of finished runs" in capsys.readouterr().err
    path, _, _ = folder
    (path / "All-hps" / "seed0" / "run.json").write_text('{"schema": 9}')
    with pytest.raises(ConfigError, match="expected schema 1, got 9"):
        reading.read([path])


@pytest.mark.parametrize("n", [2, 3, 10])
def test_intervals_are_students(n):
    values = np.random.default_rng(n).normal(size=n)
    found = metrics.mean_interval(values)
    low, high = scipy_stats.t.interval(0.95, n - 1, values.mean(), scipy_stats.sem(values))
    assert found.mean == pytest.approx(values.mean(), rel=1e-12)
    assert (found.mean - found.half, found.mean + found.half) == pytest.approx((low, high))
    other = np.random.default_rng(n + 100).normal(size=n)
    paired = metrics.paired_difference(values, other)
    assert paired == pytest.approx(metrics.mean_interval(values - other))


def test_intervals_worked_by_hand():
    """Three runs at 1, 2, 3: s = 1, t(2) = 4.302653, half = 4.302653 / sqrt(3)."""
    found = metrics.mean_interval([1.0, 2.0, 3.0])
    assert (found.mean, found.n) == (2.0, 3) and found.half == pytest.approx(2.484138, abs=1e-6)
    assert np.isnan(metrics.mean_interval([0.5]).half)
    for bad, message in (([], "non-empty vector"), ([1.0, np.nan], "finite")):
        with pytest.raises(ValueError, match=f"values: expected .*{message}|{message}"):
            metrics.mean_interval(bad)
    with pytest.raises(ValueError, match="level: expected a probability"):
        metrics.mean_interval([1.0, 2.0], level=95)
    with pytest.raises(ValueError, match=r"b: expected shape \[2\]"):
        metrics.paired_difference([1.0, 2.0], [1.0])
