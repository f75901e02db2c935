"""``python -m bench.profiled_step ROW``: one eager step between marks, for a profiler such as ncu.

    ncu --profile-from-start off ... python -m bench.profiled_step "cifar-4 b10 bf16 cuda"

With ``--slowest N FILE`` prints instead, as a regular expression for ncu's ``--kernel-name``, the N
kernels that take the longest in the row, from what ``bench.kernel_times`` wrote.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections import Counter
from collections.abc import Sequence

import torch

from bench import cases, ceilings
from bench.peers import ours

_WARM_UPS = 2


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the step, or names kernels."""
    parser = argparse.ArgumentParser(prog="python -m bench.profiled_step", description=__doc__)
    rows = {case.id: case for case in cases.gpu("cuda")}
    parser.add_argument("row", choices=rows, metavar="ROW", help="as bench.run --list prints it")
    parser.add_argument("--slowest", nargs=2, metavar=("N", "FILE"), help="name kernels")
    args = parser.parse_args(argv)
    if args.slowest:
        count, file = args.slowest
        with open(file) as text:
            print(slowest(json.load(text)[args.row]["boxes"], int(count)))
        return 0
    case = rows[args.row]
    ceilings.set_tf32(case.dtype == "tf32")
    runner = ours(case.problem(), backend="triton")
    for _ in range(_WARM_UPS):
        runner.step()
    torch.cuda.synchronize()
    torch.cuda.profiler.start()
    runner.step()
    torch.cuda.synchronize()
    torch.cuda.profiler.stop()
    return 0


def slowest(kernels: Sequence[tuple[str, float]], count: int) -> str:
    """The names of the kernels that take the most time in all, as alternatives."""
    times: Counter[str] = Counter()
    for name, time in kernels:
        times[name] += time
    return "|".join(name for name, _ in times.most_common(count))


if __name__ == "__main__":
    sys.exit(main())
