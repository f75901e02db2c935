"""``python -m bench.report FILE...``: results as Markdown tables and plots; two files are compared.

The tables go to standard output, or between the two marker lines of a document (``--into``).
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterable, Sequence
from itertools import pairwise
from pathlib import Path

from bench.measured import Cell, Results
from bench.peers import BASE

BEGIN, END = "<!-- bench:begin -->", "<!-- bench:end -->"
_NOT_RUN = "-"


def main(argv: Sequence[str] | None = None) -> int:
    """Prints the report; returns the exit status."""
    parser = argparse.ArgumentParser(prog="python -m bench.report", description=__doc__)
    parser.add_argument("files", nargs="+", type=Path, metavar="FILE", help="results of make bench")
    parser.add_argument("--plots", type=Path, metavar="DIR", help="write the plots there")
    parser.add_argument("--into", type=Path, metavar="DOC",
        help=f"put the tables into DOC, between the lines {BEGIN} and {END}")  # fmt: skip
    args = parser.parse_args(argv)
    try:
        results = [Results.load(path) for path in args.files]
        text = report(results)
        if args.into:
            args.into.write_text(inserted(args.into.read_text(), text))
        else:
            print(text)
    except (OSError, ValueError) as error:
        parser.error(str(error))
    if args.plots:
        from bench import plots

        for path in plots.draw(results[-1], args.plots):
            print(f"Written: {path}", file=sys.stderr)
    return 0


def report(results: Sequence[Results]) -> str:
    """All tables as Markdown; with two results or more also each one against the one before."""
    parts = []
    for one in results:
        parts += [_origin(one), time_table(one), _details(one), _refusals(one)]
    for old, new in pairwise(results):
        parts.append(comparison(old, new))
    return "\n\n".join(part for part in parts if part)


def inserted(document: str, text: str, markers: tuple[str, str] = (BEGIN, END)) -> str:
    """The document with ``text`` between its marker lines."""
    first, last = markers
    before, begin, rest = document.partition(first)
    _, end, after = rest.partition(last)
    if not begin or not end:
        raise ValueError(f"DOC: expected the lines {first} and {last}, got a document without them")
    return f"{before}{first}\n{text}\n{last}{after}"


def _origin(results: Results) -> str:
    machine = results.machine
    peaks = ", ".join(
        f"{name} {peak / 1e9:.0f} GFLOP/s" for name, peak in results.peaks.items() if peak
    )
    return (
        f"{machine['device']}, {machine['threads']} threads of {machine['cores']} cores, "
        f"{machine['memory_gib']} GiB, {machine['simd']}, malloc: {machine['malloc']}; PyTorch "
        f"{machine['torch']}, commit {results.commit}. Measured peaks: {peaks}."
    )


def time_table(results: Results) -> str:
    """Milliseconds of a step (median, half the interquartile range) and times the base learner."""
    columns = results.columns()
    lines = []
    for row in results.rows():
        cells = [row]
        for column in columns:
            cell = results.cells.get((row, column))
            if cell is None:
                cells.append("refused" if (row, column) in results.refused else _NOT_RUN)
                continue
            text = f"{1e3 * cell.median:.3g} ±{100 * cell.spread:.0f}%"
            times = results.times_base(row, column)
            cells.append(text if times is None or column == BASE else f"{text} ({times:.1f}x)")
        lines.append(cells)
    return markdown(["ms (times the base learner)", *columns], lines)


def _details(results: Results) -> str:
    lines = [
        [
            row, column,
            f"{cell.info['peak_memory'] / 2**20:.0f}",
            f"{cell.info['first_step']:.2g}",
            f"{cell.info['tree_flops'] / 1e9:.3g}",
            f"{100 * cell.info['fraction_of_peak']:.0f}%",
            f"{max(cell.info['errors'].values()):.1e}",
        ]
        for (row, column), cell in results.cells.items()
    ]  # fmt: skip
    headings = ["row", "column", "peak memory, MiB", "first step, s", "GFLOP of the tree",
                "of measured peak", "error"]  # fmt: skip
    return markdown(headings, lines)


def _refusals(results: Results) -> str:
    return "\n".join(f"- Refused: {row}: {why}" for (row, _), why in results.refused.items())


def comparison(old: Results, new: Results) -> str:
    """Time of the old commit over that of the new one: above 1 the new one is faster."""
    both = [key for key in new.cells if key in old.cells]
    columns = [c for c in new.columns() if any(column == c for _, column in both)]
    rows = [r for r in new.rows() if any(row == r for row, _ in both)]
    lines = [
        [row, *(_speedup(old.cells.get((row, c)), new.cells.get((row, c))) for c in columns)]
        for row in rows
    ]
    return markdown([f"time of {old.commit} / time of {new.commit}", *columns], lines)


def _speedup(old: Cell | None, new: Cell | None) -> str:
    return f"{old.median / new.median:.2f}" if old and new else _NOT_RUN


def markdown(headings: Sequence[str], lines: Iterable[Sequence[str]]) -> str:
    """A Markdown table; all columns but the first are set to the right."""
    rule = ["---", *["--:"] * (len(headings) - 1)]
    return "\n".join(f"| {' | '.join(line)} |" for line in [headings, rule, *lines])


if __name__ == "__main__":
    sys.exit(main())
