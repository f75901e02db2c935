"""``python -m lasem_fast report``: tables and figures from the folders of experiments."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console

from lasem_fast.experiments import figures, reading, tables
from lasem_fast.experiments.config import ConfigError
from lasem_fast.experiments.results import csv_text
from lasem_fast.lifelong.checkpoints import write_text
from lasem_fast.tools import arguments

_TABLES = (
    (
        "table1", tables.table1, "Table 1: accuracy and forgetting",
        "Mean over seeds ± half the 95% t-interval. Peak: test accuracy where validation was best. "
        "Forgetting ratio: accuracy after the last task / after the task's own training (end), or "
        "/ its peak. Backward transfer: after the last task minus after the task's own training.",
    ),
    (
        "table2", tables.table2, "Table 2: the search beside static sharing, by net",
        "Peak accuracy of the search, of sharing all layers, and of the static configuration that "
        "was best on the test data.",
    ),
    (
        "table3", tables.table3, "Table 3: time",
        "Wall clock: training steps, evaluation, and the rest (nets, roll-back, saving).",
    ),
    (
        "differences", tables.differences, "The search minus the others, paired by seed",
        "An interval without 0 in it: a difference that the seeds bear out.",
    ),
)  # fmt: skip


def main(argv: Sequence[str] | None = None, prog: str | None = None) -> int:
    """Prints the tables, writes them as CSV and draws the figures; returns the exit status."""
    parser = argparse.ArgumentParser(
        prog=prog, description="Tables 1 to 3 and figures 1, 4, 5, 6 from finished runs."
    )
    parser.add_argument("folders", nargs="+", type=Path, metavar="DIR", help="what `run` wrote")
    parser.add_argument(
        "--out", type=Path, metavar="DIR", help="for CSV and figures (default: DIR/report)"
    )
    args = parser.parse_args(argv)
    out = args.out or args.folders[0] / "report"
    try:
        experiments = reading.read(args.folders)
    except (ConfigError, OSError) as error:
        parser.error(str(error))
    with arguments.writing(parser, "--out", out):
        out.mkdir(parents=True, exist_ok=True)
        _write(experiments, out, Console())
    return 0


def _write(experiments: list[reading.Experiment], out: Path, console: Console) -> None:
    written = []
    for name, make, title, caption in _TABLES:
        rows = make(experiments)
        if rows:
            console.print(tables.as_table(title, rows, caption))
            write_text(out / f"{name}.csv", csv_text(rows))
            written.append(out / f"{name}.csv")
    written += figures.draw(experiments, out)
    names = ", ".join(path.name for path in written)
    console.print(f"Written to {out}: {names}", markup=False, highlight=False)


if __name__ == "__main__":
    sys.exit(main())
