"""``python -m bench.demo_record DIR``: README's figures and pictures of the demo, from one run.

    python -m lasem_fast demo --seeds 8 --out demo-run
    python -m bench.demo_record demo-run

Puts run.json without its runs on record, the table that follows from it into README, and the
run's pictures into docs.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from bench.report import inserted
from lasem_fast.demo import comparison

MARKERS = "<!-- demo:begin -->", "<!-- demo:end -->"
RECORD = "bench/results/demo.json"
PICTURES = {
    "trade-off.png": "docs/demo-trade-off.png",
    "posterior.png": "docs/demo-posterior.png",
    "share_frequency.png": "docs/demo-share-frequency.png",
}


def main(argv: Sequence[str] | None = None) -> int:
    """Writes record, table and pictures; the exit status is 0."""
    parser = argparse.ArgumentParser(prog="python -m bench.demo_record", description=__doc__)
    parser.add_argument("run", type=Path, metavar="DIR", help="the demo's --out")
    parser.add_argument("--into", type=Path, default=Path(), metavar="REPOSITORY")
    args = parser.parse_args(argv)
    try:
        record = json.loads((args.run / "run.json").read_text(encoding="ascii"))
        del record["runs"]
        readme = args.into / "README.md"
        text = inserted(readme.read_text(encoding="utf-8"), text_of(record), MARKERS)
        missing = [name for name in PICTURES if not (args.run / name).is_file()]
    except (OSError, ValueError, KeyError, TypeError) as error:
        parser.error(f"expected a run of the demo and a README with {MARKERS}, got {error!r}")
    if missing:
        parser.error(f"DIR: expected the demo's pictures, got none of the name {missing[0]}")
    (args.into / RECORD).write_text(json.dumps(record, indent=1) + "\n")
    readme.write_text(text, encoding="utf-8")
    for name, place in PICTURES.items():
        shutil.copyfile(args.run / name, args.into / place)
    return 0


def text_of(record: dict[str, Any]) -> str:
    """What README says of a record: a table, and how often the search was ahead."""
    compared = record["comparison"]
    seeds = record["config"]["seeds"]
    heading = (
        f"Mean and range over seeds {seeds[0]} to {seeds[-1]}, accuracies and forgetting in % "
        f"(`{RECORD}`):"
    )
    return "\n\n".join((heading, comparison.markdown(compared), comparison.verdict(compared)))


if __name__ == "__main__":
    sys.exit(main())
