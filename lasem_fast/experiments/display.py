"""What is shown while runs are under way: each run's task and epoch, and the time that is left."""

from __future__ import annotations

import json
import math
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from rich import box
from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeRemainingColumn
from rich.table import Table

from lasem_fast.experiments.experiment import Experiment, Unit
from lasem_fast.experiments.prediction import trials

_LOOK_EVERY = 0.5  # seconds


def heading(experiment: Experiment, seconds: dict[str, float]) -> str:
    """How many runs are left, and how long all of them will take that have a prediction."""
    left = [unit for unit in experiment.units() if not unit.finished]
    total = sum(_weight(seconds, unit) for unit in left)
    unknown = sum(math.isnan(seconds[unit.variant.slug]) for unit in left)
    workers = min(experiment.config.workers, max(1, len(left)))
    without = f" without {unknown} of unknown time" if unknown else ""
    return (
        f"{experiment.config.name}: {len(left)} of {len(experiment.units())} runs left, about "
        f"{duration(total / workers)}{without} with {workers} worker{'s' * (workers > 1)}, "
        f"predicted from a few steps of each on this machine"
    )


def plan_table(experiment: Experiment, seconds: dict[str, float]) -> Table:
    """The runs that are left, and how long each of them will take."""
    left = [unit for unit in experiment.units() if not unit.finished]
    table = Table(box=box.SIMPLE_HEAD)
    table.add_column("method")
    table.add_column("runs left", justify="right")
    table.add_column("each", justify="right")
    for variant in experiment.variants:
        runs = sum(unit.variant.slug == variant.slug for unit in left)
        if runs:
            table.add_row(variant.label, str(runs), duration(seconds[variant.slug]))
    return table


def _weight(seconds: dict[str, float], unit: Unit) -> float:
    """A run's part of the whole; none where its time is not known."""
    predicted = seconds[unit.variant.slug]
    return 0.0 if math.isnan(predicted) else predicted


def duration(seconds: float) -> str:
    """A time in words of two units at most; ``?`` for NaN."""
    if math.isnan(seconds):
        return "?"
    if seconds < 60:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes:02d} min" if hours else f"{minutes} min"


@contextmanager
def shown(console: Console, experiment: Experiment, seconds: dict[str, float]) -> Iterator[None]:
    """Shows the progress of all runs that are under way, whoever works on them."""
    over = threading.Event()
    bars = Progress(
        TextColumn("{task.description}"),
        BarColumn(bar_width=20),
        TextColumn("{task.percentage:3.0f}% {task.fields[where]}"),
        TimeRemainingColumn(),
        console=console,
    )
    watch = _Watch(experiment, seconds, bars)

    def look() -> None:
        while not over.wait(_LOOK_EVERY):
            watch.look()

    with bars:
        watcher = threading.Thread(target=look, daemon=True)
        watcher.start()
        try:
            yield
        finally:
            over.set()
            watcher.join()
            watch.look()


class _Watch:
    """Reads how far the runs are from their files."""

    def __init__(self, experiment: Experiment, seconds: dict[str, float], bars: Progress) -> None:
        self._units = [unit for unit in experiment.units() if not unit.finished]
        self._seconds, self._bars, self._experiment = seconds, bars, experiment
        self._rows: dict[Path, TaskID] = {}
        total = sum(_weight(seconds, unit) for unit in self._units)
        self._all = bars.add_task("all", total=total, where="")

    def look(self) -> None:
        done, ended = 0.0, 0
        for unit in self._units:
            fraction, where = (1.0, "") if unit.finished else self._under_way(unit)
            ended += unit.finished
            done += fraction * _weight(self._seconds, unit)
            self._row(unit, fraction, where)
        self._bars.update(
            self._all, completed=done, where=f"{ended} of {len(self._units)} runs ended"
        )

    def _row(self, unit: Unit, fraction: float, where: str) -> None:
        row = self._rows.get(unit.folder)
        if row is None and 0 < fraction < 1:
            name = f"{unit.variant.label}, seed {unit.seed}"
            row = self._rows[unit.folder] = self._bars.add_task(name, total=1.0, where="")
        if row is not None:
            self._bars.update(row, completed=fraction, where=where, visible=fraction < 1)

    def _under_way(self, unit: Unit) -> tuple[float, str]:
        if unit.shared:
            ended = len(list(unit.state.glob("task*-*.json"))) if unit.state.exists() else 0
            n_tasks = self._experiment.n_tasks(unit.variant)
            total = trials(unit.variant, len(self._experiment.network.space), n_tasks)
            return ended / total, f"{ended} of {total} trials"
        try:
            told = json.loads((unit.state / "progress.json").read_text(encoding="utf-8"))
        except (OSError, ValueError):  # not begun, or gone meanwhile
            return 0.0, ""
        return told["fraction"], told["where"]
