"""``python -m tests.zoo --examples 500 --seed 0``: compares drawn cases and prints the figures."""

from __future__ import annotations

import argparse
import os
import random
import re
import sys
import time
import traceback
from collections import Counter

import torch

os.environ.setdefault("LASEM_FAST_CHOICES", "first")

from . import cases, compare

BACKENDS = ("torch", "cpp", "auto")


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.zoo", description=__doc__)
    parser.add_argument("--examples", type=int, default=500, help="drawn cases")
    parser.add_argument("--seed", type=int, default=0, help="of the first case")
    parser.add_argument("--backends", nargs="+", default=BACKENDS)
    parser.add_argument("--verbose", action="store_true", help="show the disagreeing nets")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    start = time.perf_counter()
    events, refused, wrong, kinds = Counter(), Counter(), Counter(), Counter()
    for seed in range(arguments.seed, arguments.seed + arguments.examples):
        for backend in arguments.backends:
            case = cases.draw(random.Random(seed))
            try:
                events[backend] += compare.check(case, backend)
            except Exception as error:
                wrong[backend] += 1
                kinds[re.sub(r"[-+.\d]+|event|task_\w", "#", str(error))[:110]] += 1
                print(f"seed {seed}, {backend}: {type(error).__name__} {str(error)[:400]}")
                if arguments.verbose:
                    print(case.describe())
                    if not isinstance(error, compare.Disagreement):
                        traceback.print_exc()
            if "refused" in case.notes:
                refused[str(case.notes["refused"])[:90]] += 1
    print(f"{arguments.examples} cases in {time.perf_counter() - start:.0f} s")
    for backend in arguments.backends:
        print(f"{backend}: {events[backend]} events agree, {wrong[backend]} disagreements")
    for why, count in kinds.most_common(40):
        print(f"disagreed {count} times: {why}")
    for why, count in refused.most_common(20):
        print(f"refused {count} times: {why}")
    return 1 if wrong.total() else 0


if __name__ == "__main__":
    sys.exit(main())
