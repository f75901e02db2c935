"""The demo over several seeds: figures worked by hand, README's table, the picture, the record."""

import json
from pathlib import Path

import pytest

pytest.importorskip("matplotlib")

from bench import demo_record
from lasem_fast.demo import comparison, plots, results
from lasem_fast.demo.comparison import compare, markdown, verdict
from lasem_fast.lifelong import RunRecord, TaskRecord

ROOT = Path(__file__).parent.parent
FIGURES = {  # of two tasks: when learnt, in the end; parameters
    "lasem": {0: (0.8, 0.6, 0.9, 3000), 1: (0.8, 0.7, 0.7, 5000)},
    "all": {0: (0.8, 0.4, 0.8, 2000), 1: (0.6, 0.5, 0.7, 2000)},
    "none": {0: (0.7, 0.7, 0.8, 8000), 1: (0.7, 0.7, 0.6, 8000)},
}


def record(method, seed, learnt, end, second, parameters) -> RunRecord:
    tasks = [TaskRecord(name, "", [], "", peak=0.9, learning_curve_area=0.5) for name in "ab"]
    matrix = [[learnt, None], [end, second]]
    return RunRecord(method, seed, 1, 8, [], tasks, matrix, parameters=parameters)


@pytest.fixture
def compared():
    runs = {
        seed: {method: record(method, seed, *FIGURES[method][seed]) for method in FIGURES}
        for seed in (0, 1)
    }
    return compare(runs)


def test_means_and_ranges_by_hand(compared):
    assert list(compared) == ["lasem", "all", "none"]
    lasem = compared["lasem"]
    assert lasem["forgetting"]["values"] == {"0": pytest.approx(0.2), "1": pytest.approx(0.1)}
    assert lasem["forgetting"]["mean"] == pytest.approx(0.15)
    assert lasem["average_accuracy"]["values"] == {"0": 0.75, "1": 0.7}
    assert (lasem["average_accuracy"]["min"], lasem["average_accuracy"]["max"]) == (0.7, 0.75)
    # the second task: 0.9 and 0.7 where nothing shared has 0.8 and 0.6
    assert lasem["gain_over_no_transfer"]["mean"] == pytest.approx(0.1)
    assert lasem["parameters"] == {
        "mean": 4000, "min": 3000, "max": 5000, "values": {"0": 3000, "1": 5000}
    }  # fmt: skip
    ratio = (0.6 / 0.8 + 1) / 2, (0.7 / 0.8 + 1) / 2
    assert lasem["forgetting_ratio_to_end"]["mean"] == pytest.approx(sum(ratio) / 2)


def test_the_sentence_counts_and_equal_is_not_ahead(compared):
    # forgetting 0.2 < 0.4, 0.1 = 0.1; accuracy 0.75 = 0.75, 0.7 > 0.65
    values = compared["all"]["forgetting"]["values"]
    values["1"] = compared["lasem"]["forgetting"]["values"]["1"]
    assert verdict(compared) == (
        "LASEM forgot less than all shared in 1 of 2 seeds and was more accurate after the last "
        "task than nothing shared in 1 of 2 seeds."
    )


def test_table_by_hand(compared):
    assert markdown(compared).splitlines() == [
        "| | peak accuracy | after the last task | forgetting | parameters kept |",
        "| --- | --: | --: | --: | --: |",
        "| LASEM | 90.0 | 72.5 (70.0 to 75.0) | 15.0 (10.0 to 20.0) | 4k (3k to 5k) |",
        "| all shared | 90.0 | 60.0 | 25.0 (10.0 to 40.0) | 2k |",
        "| nothing shared | 90.0 | 70.0 (65.0 to 75.0) | 0.0 | 8k |",
    ]


def test_what_one_task_leaves_undefined(compared, tmp_path):
    task = TaskRecord("a", "", [], "", peak=0.5)
    one = RunRecord("lasem", 0, 1, 8, [], [task], [[0.5]], parameters=1000)
    found = compare({0: {"lasem": one, "all": one, "none": one}})
    assert found["lasem"]["forgetting"] == {
        "mean": None, "min": None, "max": None, "values": {"0": None}
    }  # fmt: skip
    assert verdict(found) == (
        "LASEM was more accurate after the last task than nothing shared in 0 of 1 seeds."
    )
    assert "| LASEM | 50.0 | 50.0 | - | 1k |" in markdown(found)
    plots.plot_trade_off(found, tmp_path / "a.png")
    assert (tmp_path / "a.png").read_bytes().startswith(b"\x89PNG")


def test_of_runs_under_way_there_is_what_there_is():
    lasem = record("lasem", 0, 0.8, 0.6, 0.9, 3000)
    begun = RunRecord("none", 0, 1, 8, [], [TaskRecord("a", "", [], "", peak=0.5)], [[0.5]])
    found = compare({0: {"lasem": lasem, "none": begun}, 1: {"lasem": lasem}})
    assert list(found) == ["lasem", "none"]
    assert found["lasem"]["average_accuracy"]["mean"] == 0.75
    assert found["lasem"]["gain_over_no_transfer"]["mean"] is None
    assert found["none"]["average_accuracy"]["values"] == {"0": 0.5}


def test_the_picture_shows_every_seed_and_the_range_around_the_mean(compared, monkeypatch):
    drawn = []
    monkeypatch.setattr(plots.Figure, "savefig", lambda figure, *_, **__: drawn.append(figure))
    plots.plot_trade_off(compared, Path("unused"))
    panels = drawn[0].axes
    assert panels[0].get_shared_x_axes().joined(*panels)
    for panel, name in zip(panels, ("average_accuracy", "forgetting"), strict=True):
        lines = panel.get_lines()
        for method, measures in compared.items():
            color, marker = plots._STYLES[method]
            own = [line for line in lines if line.get_color() == color]
            seeds, mean = (line for line in own if line.get_marker() == marker)
            assert mean.get_xydata().ravel() == pytest.approx(
                [measures["parameters"]["mean"] / 1e3, 100 * measures[name]["mean"]]
            )
            assert seeds.get_ydata() == pytest.approx(
                [100 * value for value in measures[name]["values"].values()]
            )
        bars = [container.lines[2] for container in panel.containers]
        across, up = (bar.get_segments()[0] for bar in bars[0])
        assert across[:, 0] == pytest.approx([3, 5])
        low, high = (100 * compared["lasem"][name][end] for end in ("min", "max"))
        assert up[:, 1] == pytest.approx([low, high])
    assert len({color for color, _ in plots._STYLES.values()}) == 3
    assert len({marker for _, marker in plots._STYLES.values()}) == 3


# The record


def test_the_demos_figures_in_readme_are_the_ones_on_record():
    found = json.loads((ROOT / demo_record.RECORD).read_text())
    first, last = demo_record.MARKERS
    shown = (ROOT / "README.md").read_text(encoding="utf-8").partition(first)[2].partition(last)[0]
    assert shown.strip() == demo_record.text_of(found)
    for method in found["comparison"].values():
        for measure in method.values():
            assert measure == comparison.spread(measure["values"])


def test_a_run_is_put_on_record(compared, tmp_path):
    run, repository = tmp_path / "run", tmp_path / "repository"
    for folder in (run, repository / "bench" / "results", repository / "docs"):
        folder.mkdir(parents=True)
    found = {
        "config": {"seeds": [0, 1]}, "versions": {}, "comparison": compared, "timing": {}
    }  # fmt: skip
    (run / "run.json").write_text(json.dumps({**found, "runs": {"0": "much"}}))
    begin, end = demo_record.MARKERS
    (repository / "README.md").write_text(f"Ä\n{begin}\nold\n{end}\nb\n", encoding="utf-8")
    arguments = [str(run), "--into", str(repository)]
    with pytest.raises(SystemExit):
        demo_record.main(arguments)  # no pictures
    assert not (repository / demo_record.RECORD).exists()
    for name in results.PICTURES:
        (run / name).write_text(name)
    assert demo_record.main(arguments) == 0
    assert json.loads((repository / demo_record.RECORD).read_text()) == found
    readme = (repository / "README.md").read_text(encoding="utf-8")
    assert readme.startswith(f"Ä\n{begin}\nMean and range over seeds 0 to 1,")
    assert readme.endswith(f"seeds.\n{end}\nb\n")
    assert (repository / "docs" / "demo-trade-off.png").read_text() == "trade-off.png"
    assert set(demo_record.PICTURES) == set(results.PICTURES)


@pytest.mark.parametrize("wrong", ["", "{}", "[]", '{"runs": {}}'])
def test_what_is_no_run_is_refused(wrong, tmp_path, capsys):
    (tmp_path / "run.json").write_text(wrong)
    with pytest.raises(SystemExit):
        demo_record.main([str(tmp_path)])
    assert "expected a run of the demo" in capsys.readouterr().err
