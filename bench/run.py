"""``python -m bench.run``: rows of the benchmark without pytest, column by column into one file.

For a machine where pytest-benchmark is not installed. A second call with the same file goes on
where the first one ended.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path

from bench import cases, ceilings, peers, record, report
from bench.peers import Column
from bench.race import Lane, race

SUITES = {
    "gpu": cases.gpu,
    "steps": cases.steps,
    "grouped": cases.grouped,
    "normed": cases.normed,
    "activations": cases.activations,
    "smoke": cases.smoke,
}
FINISHED, REFUSED, LEFT_OUT = 0, 1, 3


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the rows; returns 0, 1 where a column was refused, 3 where rows were left out."""
    parser = argparse.ArgumentParser(prog="python -m bench.run", description=__doc__)
    parser.add_argument("--suite", choices=SUITES, required=True, help="which rows")
    parser.add_argument("--columns", choices=("all", "ours", "peers"), default="all",
        help="ours: the library's, beside the base learner; peers: all others")  # fmt: skip
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda")
    parser.add_argument("--seconds", type=float, default=2.0, help="of timing per row")
    parser.add_argument("--budget", type=float, default=1e9,
        help="seconds after which no further row is begun")  # fmt: skip
    parser.add_argument("--row", metavar="ID", help="only this one")
    parser.add_argument("--list", action="store_true", help="prints the rows and ends")
    parser.add_argument("--out", type=Path, metavar="FILE", help="the results file")
    args = parser.parse_args(argv)
    rows = [case for case in SUITES[args.suite](args.device) if args.row in (None, case.id)]
    if args.list:
        print("\n".join(case.id for case in rows))
        return FINISHED
    if not rows:
        parser.error(f"argument --row: expected one that --list prints, got {args.row!r}")
    if args.out is None:
        parser.error("the following arguments are required: --out")
    start = time.monotonic()
    results = record.ResultsFile(args.out, args.device, ceilings.measure(args.device))
    left_out = []
    for case in rows:
        columns = _columns(case, args.columns)
        if not columns or results.has(case, columns):
            continue
        if time.monotonic() - start > args.budget:
            left_out.append(case.id)
            continue
        keep = partial(_keep, results, case)
        lanes = race(case, columns, args.seconds, keep)
        for column in columns:
            results.add(case, column, lanes[column.name])
        print(f"{time.monotonic() - start:6.1f} s  {case.id}", file=sys.stderr, flush=True)
    report.main([str(args.out)])
    for row in left_out:
        print(f"Left out, the budget of {args.budget:.0f} s was used up: {row}")
    if left_out:
        return LEFT_OUT
    return REFUSED if results.data["refused"] else FINISHED


def _keep(results: record.ResultsFile, case: cases.Case, column: Column, lane: Lane) -> None:
    results.add(case, column, lane, alone=True)


def _columns(case: cases.Case, which: str) -> list[Column]:
    columns = peers.columns(case)
    if which == "all":
        return columns
    known = {column.name for column in peers.PEERS}
    ours = [c for c in columns if c.name not in known]
    if which == "peers":
        return [c for c in columns if c not in ours]
    # the one that all others are compared with
    return [*(c for c in columns if c.name.startswith(peers.BASE)), *ours]


if __name__ == "__main__":
    sys.exit(main())
