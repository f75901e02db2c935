"""What is read back from the folders of experiments."""

from __future__ import annotations

import csv
import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lasem_fast import metrics
from lasem_fast.experiments.config import ConfigError
from lasem_fast.experiments.results import SCHEMA
from lasem_fast.lifelong import RunRecord

Summary = dict[str, float | None]


@dataclass
class Method:
    """A method's runs in one experiment, by seed."""

    label: str
    settings: dict[str, Any]
    records: dict[int, RunRecord] = field(default_factory=dict)
    summaries: dict[int, Summary] = field(default_factory=dict)
    seconds: dict[int, dict[str, float]] = field(default_factory=dict)

    @property
    def kind(self) -> str:
        return self.settings["method"]["method"]

    @property
    def transfer(self) -> str | None:
        return self.settings["method"].get("transfer")

    @property
    def n_tasks(self) -> int:
        return max(len(record.tasks) for record in self.records.values())

    def values(self, measure: str) -> dict[int, float]:
        """A measure of the summary by seed, of the runs that have it."""
        return {
            s: v for s, summary in self.summaries.items() if (v := summary[measure]) is not None
        }

    def interval(self, measure: str) -> metrics.Interval | None:
        """Mean and 95% interval over the seeds; None where no run has the measure."""
        values = list(self.values(measure).values())
        return metrics.mean_interval(values) if values else None

    def time(self, *phases: str) -> metrics.Interval | None:
        """Seconds per task and epoch, of these phases together; None without times."""
        spent = [
            sum(times[phase] for phase in phases)
            / (len(self.records[seed].tasks) * self.records[seed].epochs)
            for seed, times in self.seconds.items()
        ]
        return metrics.mean_interval(spent) if spent else None


@dataclass
class Experiment:
    """The methods of one folder, in the order of their labels' first appearance."""

    name: str
    methods: list[Method]

    def of_kind(self, kind: str, transfer: str | None = None) -> list[Method]:
        """The methods of a kind, of one transfer mechanism if it is given."""
        return [m for m in self.methods if m.kind == kind and transfer in (None, m.transfer)]

    @property
    def transfers(self) -> list[str]:
        """The transfer mechanisms of its searches, then of its other methods."""
        found = [m.transfer for kind in ("lasem", "static") for m in self.of_kind(kind)]
        return [t for t in dict.fromkeys(found) if t is not None]

    def lasem(self, transfer: str | None) -> Method | None:
        """The search to compare a method with: of its mechanism; of hps where it has none."""
        same = self.of_kind("lasem", transfer or "hps") or self.of_kind("lasem", transfer)
        return same[0] if same else None

    @property
    def depth(self) -> int:
        """Number of stages; 0 if no method has configurations."""
        bits = [t.config for m in self.methods for r in m.records.values() for t in r.tasks]
        return max(map(len, bits), default=0)


def read(folders: Sequence[Path]) -> list[Experiment]:
    """The finished runs of experiments.

    Raises:
        ConfigError: a folder holds none, or a file is not what `run` writes.
    """
    return [_experiment(folder) for folder in folders]


def _experiment(folder: Path) -> Experiment:
    paths = sorted(folder.glob("*/seed*/run.json"))
    if not paths:
        raise ConfigError(f"{folder}: expected a folder of finished runs, got none in it")
    methods: dict[str, Method] = {}
    for path in paths:
        try:
            run = json.loads(path.read_text(encoding="utf-8"))
            if run["schema"] != SCHEMA:
                raise ConfigError(f"{path}: expected schema {SCHEMA}, got {run['schema']}")
            settings, record = run["settings"], RunRecord.from_dict(run["record"])
            method = methods.setdefault(settings["label"], Method(settings["label"], settings))
            seed = settings["seed"]
            method.records[seed], method.summaries[seed] = record, run["summary"]
            times = path.with_name("times.json")
            if times.exists():
                method.seconds[seed] = json.loads(times.read_text(encoding="utf-8"))["seconds"]
        except (ValueError, KeyError, TypeError) as error:
            raise ConfigError(f"{path}: expected a run's record, got {error!r}") from error
    order = _order(folder)
    found = sorted(
        methods.values(), key=lambda m: order.index(m.label) if m.label in order else 1e9
    )
    return Experiment(folder.name, found)


def _order(folder: Path) -> list[str]:
    """Labels in the order of the config, as the summary has them."""
    path = folder / "summary.csv"
    if not path.exists():
        return []
    with path.open(encoding="utf-8", newline="") as lines:
        return list(dict.fromkeys(row["label"] for row in csv.DictReader(lines)))
