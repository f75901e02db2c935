"""The paper's tables from runs: rows of plain values, for CSV and for the terminal alike.

Table 1: peak per-task accuracy and forgetting ratio of every method. Table 2: what the search gains
over static sharing, net by net, with the number of configurations. Table 3: time relative to the
search. Means over seeds with 95% t-intervals; differences are paired by seed.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from rich import box
from rich.table import Table

from lasem_fast import metrics
from lasem_fast.experiments.reading import Experiment, Method

Rows = list[dict[str, Any]]
_PERCENT = ("peak_accuracy", "average_accuracy", "backward_transfer")
_RATIOS = ("forgetting_ratio_to_end", "forgetting_ratio_to_peak")
_COUNTS = ("tasks", "seeds")
HEADINGS = {
    "experiment": "experiment",
    "method": "method",
    "seeds": "seeds",
    "tasks": "tasks",
    "net": "net",
    "transfer": "transfer",
    "configurations": "configu-\nrations",
    "peak_accuracy": "peak\naccuracy %",
    "average_accuracy": "accuracy\nat the end %",
    "backward_transfer": "backward\ntransfer %",
    "forgetting_ratio_to_end": "forgetting\nratio (end)",
    "forgetting_ratio_to_peak": "forgetting\nratio (peak)",
    "parameters": "parameters\nkept",
    "all_shared": "All\npeak %",
    "best_static": "best static\npeak %",
    "best_static_name": "which",
    "seconds": "s per task\nand epoch",
    "train": "steps",
    "evaluate": "evaluation",
    "rest": "rest",
    "relative_to_lasem": "relative\nto LASEM",
    "relative_to_all": "relative\nto All",
    "steps_relative_to_all": "steps rel.\nto All",
    "against": "minus",
    "peak_difference": "peak\naccuracy %",
    "forgetting_difference": "forgetting\nratio (end)",
}


def table1(experiments: Sequence[Experiment]) -> Rows:
    """Every method: accuracies in %, both forgetting ratios, parameters."""
    rows = []
    for experiment in experiments:
        for method in experiment.methods:
            row = _names(experiment, method)
            for measure in _PERCENT:
                row |= _cell(measure, method.interval(measure), 100)
            for measure in _RATIOS:
                row |= _cell(measure, method.interval(measure))
            kept = [record.parameters for record in method.records.values()]
            rows.append({**row, "parameters": round(sum(kept) / len(kept))})
    return rows


def table2(experiments: Sequence[Experiment]) -> Rows:
    """Every search beside the static configurations of the same net and mechanism."""
    rows = []
    for experiment in experiments:
        for search in experiment.of_kind("lasem"):
            record = next(iter(search.records.values()))
            static = _comparable(search, experiment.of_kind("static", search.transfer))
            shared = [m for m in static if _shares_all(m)]
            everything = shared[0].interval("peak_accuracy") if shared else None
            best = max(static, key=lambda m: m.interval("peak_accuracy").mean, default=None)
            row = {
                **_names(experiment, search),
                "net": search.settings["net"]["name"],
                "transfer": search.transfer,
                "configurations": len(record.configurations),
            }
            row |= _cell("peak_accuracy", search.interval("peak_accuracy"), 100)
            row |= _cell("all_shared", everything, 100)
            row |= _cell("best_static", best and best.interval("peak_accuracy"), 100)
            row["best_static_name"] = best and best.label
            for measure in _RATIOS:
                row |= _cell(measure, search.interval(measure))
            rows.append(row)
    return rows


def table3(experiments: Sequence[Experiment]) -> Rows:
    """Wall-clock times per task and epoch, all trials of a task together."""
    rows = []
    for experiment in experiments:
        for method in experiment.methods:
            total = method.time("train", "evaluate", "rest")
            if total is None:
                continue
            shared = [m for m in experiment.of_kind("static", method.transfer) if _shares_all(m)]
            row = {**_names(experiment, method), **_cell("seconds", total)}
            for phase in ("train", "evaluate", "rest"):
                row[phase] = method.time(phase).mean
            search, everything = experiment.lasem(method.transfer), (shared or [None])[0]
            row["relative_to_lasem"] = _ratio(total, search, "train", "evaluate", "rest")
            row["relative_to_all"] = _ratio(total, everything, "train", "evaluate", "rest")
            row["steps_relative_to_all"] = _ratio(method.time("train"), everything, "train")
            rows.append(row)
    return rows


def differences(experiments: Sequence[Experiment]) -> Rows:
    """Every search minus every other method of its mechanism or of none, seed by seed."""
    rows = []
    for experiment in experiments:
        for search in experiment.of_kind("lasem"):
            others = [
                method
                for method in experiment.methods
                if method is not search and method.transfer in (None, search.transfer)
            ]
            rows += [
                {"experiment": experiment.name, **_difference(search, method)}
                for method in _comparable(search, others)
            ]
    return rows


def _difference(search: Method, method: Method) -> dict[str, Any]:
    row: dict[str, Any] = {"method": search.label, "against": method.label}
    for name, measure, scale in (
        ("peak_difference", "peak_accuracy", 100),
        ("forgetting_difference", "forgetting_ratio_to_end", 1),
    ):
        mine, others = search.values(measure), method.values(measure)
        seeds = [seed for seed in mine if seed in others]
        found = None
        if seeds:
            found = metrics.paired_difference(
                [mine[seed] for seed in seeds], [others[seed] for seed in seeds]
            )
        row |= {"seeds": len(seeds)} | _cell(name, found, scale)
    return row


def _names(experiment: Experiment, method: Method) -> dict[str, Any]:
    return {
        "experiment": experiment.name,
        "method": method.label,
        "tasks": method.n_tasks,
        "seeds": len(method.records),
    }


def _cell(name: str, found: metrics.Interval | None, scale: float = 1) -> dict[str, Any]:
    """A mean and half its interval, None where there is none."""
    if found is None:
        return {name: None, f"{name}_half": None}
    half = found.half * scale if found.n > 1 else None
    return {name: found.mean * scale, f"{name}_half": half}


def _comparable(search: Method, methods: list[Method]) -> list[Method]:
    """Those that were trained on as many tasks."""
    return [m for m in methods if m.n_tasks == search.n_tasks and m.interval("peak_accuracy")]


def _shares_all(method: Method) -> bool:
    return all(all(t.config) for record in method.records.values() for t in record.tasks)


def _ratio(time: metrics.Interval | None, reference: Method | None, *phases: str) -> float | None:
    base = None if reference is None else reference.time(*phases)
    return None if time is None or base is None or base.mean == 0 else time.mean / base.mean


def as_table(title: str, rows: Rows, caption: str) -> Table:
    """Rows for the terminal: a mean and its interval in one cell.

    What is the same in all rows stands in the title.
    """
    columns = [name for name in rows[0] if not name.endswith("_half")]
    common = [
        name
        for name in ("experiment", "net", "tasks", "seeds")
        if name in columns and len({row[name] for row in rows}) == 1
    ]
    told = [f"{rows[0][name]} {name}" if name in _COUNTS else rows[0][name] for name in common]
    table = Table(title=", ".join([title, *told]), caption=caption, box=box.SIMPLE_HEAD)
    columns = [name for name in columns if name not in common]
    for name in columns:
        text = isinstance(rows[0][name], str)
        table.add_column(HEADINGS[name], justify="left" if text else "right")
    for row in rows:
        table.add_row(*(_shown(row, name) for name in columns))
    return table


def _shown(row: dict[str, Any], name: str) -> str:
    value, half = row[name], row.get(f"{name}_half")
    if value is None:
        return "-"
    if isinstance(value, str):
        return value
    if isinstance(value, int):
        return f"{value:,}"
    digits = 1 if name in (*_PERCENT, "all_shared", "best_static", "peak_difference") else 2
    digits = 4 if name in ("seconds", "train", "evaluate", "rest") else digits
    return f"{value:.{digits}f}" + ("" if half is None else f" ± {half:.{digits}f}")
