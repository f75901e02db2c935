"""``python -m bench.demo_seeds RUN.JSON...``: what several runs of the demo have in common.

    for seed in 0 1 2 3 4 5 6 7; do python -m lasem_fast demo --seed $seed --out runs/$seed; done
    python -m bench.demo_seeds runs/*/run.json --out bench/results/demo_seeds.json

Prints a row per method, mean and range over the runs, and how often the search was ahead.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from collections.abc import Sequence
from pathlib import Path

NAMES = {"lasem": "LASEM", "all": "everything shared", "none": "nothing shared"}
MEASURES = ("peak_accuracy", "average_accuracy", "forgetting", "parameters")


def main(argv: Sequence[str] | None = None) -> int:
    """Prints the table, and writes the figures behind it."""
    parser = argparse.ArgumentParser(prog="python -m bench.demo_seeds", description=__doc__)
    parser.add_argument("runs", nargs="+", type=Path, help="the demo's run.json files")
    parser.add_argument("--out", type=Path, help="a JSON file")
    args = parser.parse_args(argv)
    try:
        runs = [json.loads(path.read_text()) for path in args.runs]
        settings = [{k: v for k, v in run["config"].items() if k != "seed"} for run in runs]
    except (OSError, ValueError, KeyError, TypeError) as error:
        parser.error(f"runs: expected run.json files of the demo, got {error!r}")
    if any(other != settings[0] for other in settings):
        parser.error("runs: expected the same options but for the seed, got different ones")
    found = {
        "settings": settings[0],
        "versions": runs[0]["versions"],
        "runs": {
            str(run["config"]["seed"]): {
                method: {measure: values[measure] for measure in MEASURES}
                for method, values in run["comparison"].items()
            }
            for run in runs
        },
    }
    print(table(found))
    if args.out:
        args.out.write_text(json.dumps(found, indent=1) + "\n")
    return 0


def table(found: dict) -> str:
    """Mean and range over the runs, as Markdown."""
    runs = list(found["runs"].values())
    lines = [
        "| | peak accuracy | after the last task | forgetting | parameters kept |",
        "| --- | --: | --: | --: | --: |",
    ]
    for method in runs[0]:
        cells = [
            _cell([run[method][measure] for run in runs], measure == "parameters")
            for measure in MEASURES
        ]
        lines.append(f"| {NAMES[method]} | {' | '.join(cells)} |")
    less = sum(run["lasem"]["forgetting"] < run["all"]["forgetting"] for run in runs)
    ahead = sum(run["lasem"]["average_accuracy"] > run["none"]["average_accuracy"] for run in runs)
    lines.append(
        f"\nThe search forgot less than sharing everything in {less} of {len(runs)} runs, and was "
        f"more accurate after the last task than sharing nothing in {ahead}."
    )
    return "\n".join(lines)


def _cell(values: list[float], counts: bool) -> str:
    three = (statistics.mean(values), min(values), max(values))
    numbers = [f"{v / 1e3:.0f}k" if counts else f"{100 * v:.1f}" for v in three]
    mean, low, high = numbers
    return mean if low == high else f"{mean} ({low} to {high})"


if __name__ == "__main__":
    sys.exit(main())
