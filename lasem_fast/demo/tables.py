"""What the demo prints: two tables, a sentence, and what a step costs."""

from __future__ import annotations

import statistics
from collections.abc import Iterable
from typing import Any

from rich import box
from rich.table import Table

from lasem_fast.demo import comparison
from lasem_fast.demo.comparison import METHOD_NAMES, Comparison, Runs, Shown
from lasem_fast.lifelong import METHODS, RunRecord

_TABLE = {"box": box.SIMPLE_HEAD, "padding": (0, 1, 0, 0)}  # 80 columns have to do


def task_table(run: RunRecord) -> Table:
    """A search, task by task."""
    table = Table(
        title=f"LASEM, task by task: the first seed ({run.seed})",
        caption="Test accuracy in %. Peak: at the best validation epoch. Ratio: after the last "
        "task / after the task's own training.",
        **_TABLE,
    )
    table.add_column("task")
    table.add_column("classes, transformation, noise")
    table.add_column("shared\nstages", justify="center")
    for heading in ("peak", "after\nlast", "forgetting\nratio"):
        table.add_column(heading, justify="right")
    R = run.accuracy_matrix()
    for task, learnt, final in zip(run.tasks, R.diagonal(), R[-1], strict=True):
        table.add_row(
            task.name, task.note, task.label, f"{100 * task.peak:.1f}", f"{100 * final:.1f}",
            f"{final / learnt:.2f}" if learnt > 0 else "-",
        )  # fmt: skip
    return table


def method_table(compared: Comparison) -> Table:
    """The methods over the seeds: the mean, and the range below it."""
    n = len(compared["lasem"]["parameters"]["values"])
    over = f"mean and range over {n} seeds" if n > 1 else "one seed"
    table = Table(
        title=f"The three methods, means over the tasks: {over}",
        caption="Test accuracy in %. While learning: mean over the task's own epochs. Forgetting "
        "ratio: after the last task / after the task's own training. Parameters: of all tasks, "
        "heads included.",
        **_TABLE,
    )
    table.add_column("method")
    for heading in (
        "peak", "while\nlearning", "after\nlast", "forgetting\nratio", "parameters\nkept",
    ):  # fmt: skip
        table.add_column(heading, justify="right", no_wrap=True)
    for method, measures in compared.items():
        shown = (
            comparison.percent(measures["peak_accuracy"]),
            comparison.percent(measures["learning_curve_area"]),
            comparison.percent(measures["average_accuracy"]),
            comparison.ratio(measures["forgetting_ratio_to_end"]),
            comparison.thousands(measures["parameters"]),
        )
        table.add_row(METHOD_NAMES[method], *map(_in_two_lines, shown))
    return table


def timing_lines(runs: Runs, times: dict[str, Any]) -> str:
    """What a step costs, and how long each method trained, a mean over the seeds."""
    ms = times["milliseconds"]
    n_configs = len(next(iter(runs.values()))["lasem"].configurations)
    trained = ", ".join(
        f"{METHOD_NAMES[method]} {_mean(run[method].seconds['train'] for run in runs.values()):.1f}"
        f" s"
        for method in METHODS
    )
    together = f", {times['workers']} runs at a time" if times["workers"] > 1 else ""
    return (
        f"One EM step over {n_configs} configurations (backend {times['backend']}, mini-batch of "
        f"{times['batch_size']}): {ms['em']:.1f} ms\n"
        f"  the naive loop: {ms['naive']:.1f} ms ({ms['naive'] / ms['em']:.1f} x as long)\n"
        f"  one plain training step: {ms['plain']:.1f} ms (EM takes "
        f"{ms['em'] / ms['plain']:.1f} x as long)\n"
        f"Training only, per seed{together}: {trained}"
    )


def _in_two_lines(shown: Shown) -> str:
    return shown.mean if shown.range is None else f"{shown.mean}\n{'-'.join(shown.range)}"


def _mean(seconds: Iterable[float]) -> float:
    return statistics.mean(seconds)
