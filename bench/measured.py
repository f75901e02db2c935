"""What a results file of the benchmark suite holds."""

from __future__ import annotations

import json
import statistics
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bench.peers import BASE, PEERS


@dataclass(frozen=True)
class Cell:
    """One column of one row: see :func:`bench.record.extra_info`."""

    info: dict[str, Any]

    @property
    def row(self) -> str:
        return self.info["row"]

    @property
    def column(self) -> str:
        return self.info["column"]

    @property
    def median(self) -> float:
        """Seconds."""
        return statistics.median(self.info["seconds"])

    @property
    def spread(self) -> float:
        """Half the distance between the quartiles, relative to the median."""
        seconds = self.info["seconds"]
        low, _, high = statistics.quantiles(seconds, n=4, method="inclusive")
        return (high - low) / 2 / self.median


@dataclass(frozen=True)
class Results:
    """One results file."""

    machine: dict[str, Any]
    commit: str
    peaks: dict[str, float | None]
    refused: dict[tuple[str, str], str]
    cells: dict[tuple[str, str], Cell]

    @classmethod
    def load(cls, path: Path) -> Results:
        """Reads a file that ``make bench`` wrote.

        Raises:
            ValueError: it is something else.
        """
        data = json.loads(path.read_text())
        if "peaks" not in data or "benchmarks" not in data:
            raise ValueError(f"FILE: expected results of the benchmark suite, got {path.name}")
        commit = data["commit_info"].get("id", "unknown")[:9]
        if data["commit_info"].get("dirty"):
            commit += " with changes"
        cells = [Cell(b["extra_info"]) for b in data["benchmarks"] if b["extra_info"]]
        return cls(
            data["machine_info"],
            commit,
            data["peaks"],
            {(r["row"], r["column"]): r["why"] for r in data["refused"]},
            {(cell.row, cell.column): cell for cell in cells},
        )

    def rows(self) -> list[str]:
        """Names of the rows, in the order of the file."""
        return list(dict.fromkeys(row for row, _ in [*self.cells, *self.refused]))

    def columns(self) -> list[str]:
        """Names of the columns: the peers in their order, then the library's."""
        present = dict.fromkeys(column for _, column in [*self.cells, *self.refused])
        peers = [column.name for column in PEERS if column.name in present]
        return [*peers, *(column for column in present if column not in peers)]

    def times_base(self, row: str, column: str) -> float | None:
        """How many times the base learner's time a column takes."""
        cell, base = self.cells.get((row, column)), self.cells.get((row, BASE))
        return cell.median / base.median if cell and base else None
