"""``python -m tests.fuzz --calls 10000 --seed 0``."""

from __future__ import annotations

import argparse
import os
import sys
import time

os.environ.setdefault("LASEM_FAST_CHOICES", "first")

import torch

from . import judge
from .calls import CALLS


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz", description=__doc__)
    parser.add_argument("--calls", type=int, default=1000)
    parser.add_argument("--seed", type=int, default=0, help="of the first call")
    parser.add_argument("--only", nargs="+", choices=list(CALLS), help="only these entries")
    parser.add_argument("--quiet", action="store_true", help="only the figures")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    start = time.perf_counter()
    report = judge.many(arguments.calls, arguments.seed * 1_000_000, arguments.only)
    if not arguments.quiet:
        for verdict in sorted(report.bad, key=lambda v: (v.outcome, v.call, str(v.broken))):
            print(verdict)
    print(f"{len(CALLS)} entries of the surface, {time.perf_counter() - start:.0f} s")
    print(report.figures())
    return 1 if report.bad else 0


if __name__ == "__main__":
    sys.exit(main())
