"""The files that runs leave: one JSON each, and tables of all of them as CSV.

Wall-clock times are in files of their own, so that all others of two equal runs are equal too.
"""

from __future__ import annotations

import csv
import io
import json
import os
import platform
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import torch

import lasem_fast
from lasem_fast.experiments.config import ConfigError
from lasem_fast.experiments.experiment import Experiment, Unit
from lasem_fast.lifelong import RunRecord
from lasem_fast.lifelong.checkpoints import write_text

SCHEMA = 1


def write_settings(experiment: Experiment, unit: Unit) -> None:
    """Says what a run is before it begins; the same settings may be there already.

    Raises:
        ConfigError: the folder holds a run with other settings, or a damaged file.
    """
    settings = experiment.settings(unit)
    path = unit.folder / "settings.json"
    if path.exists():
        there = _read(path)
        if there != settings:
            changed = [k for k in settings if there.get(k) != settings[k]]
            told = ", ".join(f"{k} {there.get(k)!r} there, {settings[k]!r} here" for k in changed)
            raise ConfigError(
                f"out: expected a new folder or runs with the same settings, got {unit.folder} "
                f"with others ({told})"
            )
        return
    unit.folder.mkdir(parents=True, exist_ok=True)
    write_text(path, _json(settings))


def write_run(experiment: Experiment, unit: Unit, record: RunRecord) -> None:
    """Writes down a run that has ended; last of all ``run.json``, which says that it has."""
    plain = record.to_dict()
    seconds = plain.pop("seconds")
    summary = plain.pop("summary")
    write_text(unit.folder / "times.json", _json({"seconds": seconds}))
    run = {
        "schema": SCHEMA,
        "settings": experiment.settings(unit),
        "summary": summary,
        "record": plain,
        "machine": machine(experiment.config.device),
        "versions": {
            "lasem_fast": lasem_fast.__version__,
            "torch": torch.__version__,
            "numpy": np.__version__,
            "python": platform.python_version(),
        },
    }
    write_text(unit.folder / "run.json", _json(run))


def machine(device: str) -> dict[str, Any]:
    """What the run was computed on."""
    cpu = platform.processor() or platform.machine()
    info = Path("/proc/cpuinfo")
    if info.exists():
        names = [li for li in info.read_text().splitlines() if li.startswith("model name")]
        cpu = names[0].partition(":")[2].strip() if names else cpu
    found = {"system": platform.system(), "cpu": cpu, "cores": os.cpu_count()}
    if torch.device(device).type == "cuda":
        found["gpu"] = torch.cuda.get_device_name(device)
    return found


def remove_state(unit: Unit) -> None:
    """Removes what only a run under way needs."""
    shutil.rmtree(unit.state, ignore_errors=True)
    (unit.folder / "error.txt").unlink(missing_ok=True)


def write_tables(experiment: Experiment) -> None:
    """``summary.csv`` and ``times.csv`` of the runs that have ended."""
    rows, times = [], []
    for unit in experiment.units():
        if not unit.finished:
            continue
        row, spent = rows_of(unit)
        rows.append(row)
        times.append(spent)
    for name, table in (("summary.csv", rows), ("times.csv", times)):
        if table:
            write_text(experiment.out / name, csv_text(table))


def rows_of(unit: Unit) -> tuple[dict[str, Any], dict[str, Any]]:
    """What the tables say of a run that has ended: its measures, its times.

    Raises:
        ConfigError: a file is not what `write_run` writes.
    """
    names = {"label": unit.variant.label, "seed": unit.seed}
    run, times = _read(unit.folder / "run.json"), _read(unit.folder / "times.json")
    try:
        row = {**names, **run["summary"], "parameters": run["record"]["parameters"]}
        return row, {**names, **times["seconds"], "total": sum(times["seconds"].values())}
    except (KeyError, TypeError, AttributeError) as error:
        raise _damaged(unit.folder, repr(error)) from error


def _read(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, FileNotFoundError) as error:
        raise _damaged(path, str(error)) from error
    if not isinstance(found, dict):
        raise _damaged(path, f"{type(found).__name__} in it")
    return found


def _damaged(path: Path, reason: str) -> ConfigError:
    folder = path if path.is_dir() else path.parent
    return ConfigError(
        f"out: expected what `run` has written in {path}, got a damaged file ({reason}); remove "
        f"{folder} to train this run anew"
    )


def csv_text(rows: list[dict[str, Any]]) -> str:
    """Rows with the same keys as CSV."""
    text = io.StringIO()
    writer = csv.DictWriter(text, list(rows[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()


def _json(value: Any) -> str:
    return json.dumps(value, indent=1, allow_nan=False) + "\n"
