"""``python -m tests.zoo --examples 500 --seed 0``: compares drawn cases and prints the figures."""

from __future__ import annotations

import argparse
import random
import re
import sys
import time
import traceback
from collections import Counter

import torch

from . import compare
from .kinds import KINDS


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.zoo", description=__doc__)
    parser.add_argument("--examples", type=int, default=500, help="drawn cases of every kind")
    parser.add_argument("--seed", type=int, default=0, help="of the first case")
    parser.add_argument("--kinds", nargs="+", default=list(KINDS), choices=list(KINDS))
    parser.add_argument("--backends", nargs="+", help="only these; all of a kind's if left out")
    parser.add_argument("--verbose", action="store_true", help="show the nets that disagree")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    start = time.perf_counter()
    agreed, refused, wrong = Counter(), Counter(), Counter()
    shown = Counter()
    for name in arguments.kinds:
        kind = KINDS[name]
        for seed in range(arguments.seed, arguments.seed + arguments.examples, kind.every):
            for backend in kind.backends:
                if arguments.backends and backend not in arguments.backends:
                    continue
                case = kind.draw(random.Random(seed))
                try:
                    events = kind.check(case, backend)
                    agreed[name, backend] += 1 if events is None else events
                except Exception as error:
                    wrong[name, backend] += 1
                    shown[re.sub(r"[-+.\d]+|event|task_\w", "#", str(error))[:110]] += 1
                    message = f"{type(error).__name__} {str(error)[:400]}"
                    print(f"{name}, seed {seed}, {backend}: {message}", flush=True)
                    if arguments.verbose:
                        print(case.describe())
                        if not isinstance(error, compare.Disagreement):
                            traceback.print_exc()
                if "refused" in case.notes:
                    refused[re.sub(r"\d+", "#", str(case.notes["refused"])[:100])] += 1
    for why, count in shown.most_common(40):
        print(f"disagreed {count} times: {why}")
    for why, count in refused.most_common(20):
        print(f"refused {count} times: {why}")
    for name, backend in sorted({*agreed, *wrong}):
        print(
            f"{name}, {backend}: {agreed[name, backend]} agree, "
            f"{wrong[name, backend]} disagreements"
        )
    print(f"{wrong.total()} disagreements in {time.perf_counter() - start:.0f} s")
    return 1 if wrong.total() else 0


if __name__ == "__main__":
    sys.exit(main())
