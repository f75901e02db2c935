"""What a results file keeps of a column, and the file of a run without pytest-benchmark."""

from __future__ import annotations

import json
import subprocess
from functools import lru_cache
from pathlib import Path
from typing import Any

from bench import machine
from bench.cases import TASK, Case
from bench.peers import Column
from bench.race import Lane
from lasem_fast.tools.costs import StepCost, step_cost


@lru_cache
def _cost(case: Case) -> StepCost:
    problem = case.problem()
    return step_cost(problem.net, TASK, problem.space, problem.x[0].cpu(), case.batch)


def extra_info(
    case: Case, column: Column, lane: Lane, peaks: dict[str, float | None]
) -> dict[str, Any]:
    """A timed column as :mod:`bench.measured` reads it."""
    cost = _cost(case)
    flops = cost.flops if column.weighs != "one" else cost.base_flops
    # fp16 has the peak of bf16
    dtype = "bf16" if case.dtype == "fp16" else case.dtype
    peak = max(p for name, p in peaks.items() if p and name.endswith(dtype))
    return {
        "row": case.id,
        "net": case.net,
        "batch": case.batch,
        "dtype": case.dtype,
        "device": case.device,
        "choices": len(case.groups) if case.groups else len(cost.levels) - 1,
        "column": column.name,
        "seconds": lane.seconds,
        "first_step": lane.first_step,
        "peak_memory": lane.peak_memory,
        "errors": lane.errors,
        "tree_flops": cost.flops,
        # Of the work that the tree needs, whatever the column does: how close it is to the floor.
        "fraction_of_peak": flops / sorted(lane.seconds)[len(lane.seconds) // 2] / peak,
    }


class ResultsFile:
    """A results file that grows column by column, so that a run cut short leaves what it has.

    Args:
        path: the file; rows that are there already are kept.
        device: of the rows, ``"cpu"`` or ``"cuda"``.
        peaks: the machine's measured peaks.

    Raises:
        ValueError: the file is of another machine.
    """

    def __init__(self, path: Path, device: str, peaks: dict[str, float | None]) -> None:
        self.path = path
        self.peaks = peaks
        here = machine.describe(device)
        self.data: dict[str, Any] = {"benchmarks": [], "refused": []}
        if path.exists():
            self.data = json.loads(path.read_text())
            there = self.data["machine_info"]["device"]
            if there != here["device"]:
                raise ValueError(f"--out: expected results of {here['device']}, got {there}'s")
        self.data |= {"machine_info": here, "commit_info": _commit(), "peaks": peaks}
        self._write()

    def has(self, case: Case, columns: list[Column]) -> bool:
        """Whether these columns of the row were run, against one another."""
        known = [b["extra_info"] for b in self.data["benchmarks"]]
        known = [info for info in known if not info.get("alone")]
        there = {(e["row"], e["column"]) for e in [*known, *self.data["refused"]]}
        return all((case.id, column.name) in there for column in columns)

    def add(self, case: Case, column: Column, lane: Lane, *, alone: bool = False) -> None:
        """Adds a column of a row, in place of what was known of it, and writes the file.

        Args:
            case: the row.
            column: the column.
            lane: what is known of it.
            alone: its time was not taken in turns with the others'.
        """
        key = case.id, column.name
        self.data["benchmarks"] = [
            b for b in self.data["benchmarks"]
            if (b["extra_info"]["row"], b["extra_info"]["column"]) != key
        ]  # fmt: skip
        refused = [r for r in self.data["refused"] if (r["row"], r["column"]) != key]
        if lane.refused:
            refused.append({"row": case.id, "column": column.name, "why": lane.refused})
        else:
            info = extra_info(case, column, lane, self.peaks) | ({"alone": True} if alone else {})
            self.data["benchmarks"].append({"group": case.id, "extra_info": info})
        self.data["refused"] = refused
        self._write()

    def _write(self) -> None:
        self.data["load_average_at_end"] = machine.load_average()
        self.path.write_text(json.dumps(self.data, indent=1))


def _commit() -> dict[str, Any]:
    """The commit that is checked out; nothing where git does not say."""

    def git(*command: str) -> str:
        folder = Path(__file__).parent
        done = subprocess.run(["git", *command], cwd=folder, capture_output=True, text=True)
        return done.stdout.strip() if done.returncode == 0 else ""

    try:
        commit = git("rev-parse", "HEAD")
        return {"id": commit, "dirty": bool(git("status", "--porcelain"))} if commit else {}
    except OSError:
        return {}
