"""``python -m bench.left_out``: steps that leave configurations out of the M-step, beside exact.

Forward and backward on one mini-batch of the paper's four-layer net. Pruned: a prior favours some
configurations, evenly spread over the space, and the M-step leaves the others out. Sampled: it
follows some draws from the posterior. Each is timed beside the exact step of the same backend and
prior, the two taking turns; the ratio is the median of neighbours'.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import track
from rich.table import Table

import lasem_fast as lf
from bench import cases, machine

Step = Callable[[], lf.EMStep]


def main(argv: Sequence[str] | None = None) -> int:
    """Prints and writes the table; the exit status is 0."""
    parser = argparse.ArgumentParser(prog="python -m bench.left_out", description=__doc__)
    add = parser.add_argument
    add("--net", choices=cases.NETS, default="cifar-4")
    add("--batch", type=int, default=10)
    add("--kept", type=int, nargs="+", default=[1, 2, 4, 8, 12, 14, 15], help="configurations")
    add("--draws", type=int, nargs="+", default=[1, 2, 4, 8, 16])
    add("--turns", type=int, default=40, help="of each pair")
    add("--out", type=Path, metavar="FILE", help="a JSON file")
    args = parser.parse_args(argv)
    known = lf.backends()
    backends = [name for name in ("torch", "cpp") if known[name] == "available"]
    asked = [
        (backend, how, number)
        for backend in backends
        for how, numbers in (("pruned", args.kept), ("sampled", args.draws))
        for number in numbers
    ]
    rows = [_row(args, *row) for row in track(asked, console=Console(stderr=True))]
    if args.out:
        settings = {k: v for k, v in vars(args).items() if k != "out"}
        result = {"settings": settings, "machine": machine.describe("cpu"), "rows": rows}
        args.out.write_text(json.dumps(result, indent=1) + "\n")
    Console().print(_table(rows))
    return 0


def _row(args: argparse.Namespace, backend: str, how: str, number: int) -> dict[str, Any]:
    problem = cases.Case(args.net, args.batch, favours=number).problem()
    size = len(problem.space)
    if how == "pruned":
        # not 0: what has no posterior at all is left out of exact steps too
        prior = torch.full((size,), 1e-9, dtype=torch.float64)
        prior[problem.favoured()] = 1
        following = {"prune": 1e-6}
    else:
        prior = torch.ones(size, dtype=torch.float64)
        following = {"m_step_draws": number}
    exact = _step(problem, backend, prior, {})
    some = _step(problem, backend, prior, following)
    ratios, exact_ms, dropped = [], [], []
    for i in range(args.turns + 3):
        pair = [_timed(step) for step in ((exact, some) if i % 2 else (some, exact))]
        (exact_s, _), (some_s, result) = pair if i % 2 else reversed(pair)
        if i < 3:
            continue  # plans, buffers, and what a narrow posterior tells the next steps
        ratios.append(some_s / exact_s)
        exact_ms.append(1e3 * exact_s)
        dropped.append(float(result.dropped_mass))
    return {
        "backend": backend,
        "how": how,
        "number": number,
        "configurations": size,
        "dropped_mass": statistics.mean(dropped),
        "exact_ms": statistics.median(exact_ms),
        "ratio": statistics.median(ratios),
        "quartiles": statistics.quantiles(ratios, n=4)[::2],
    }


def _step(
    problem: cases.Problem, backend: str, prior: torch.Tensor, following: dict[str, Any]
) -> Step:
    net = problem.net
    em = lf.LASEM(net, problem.space, backend=backend, prior=prior, **following)

    def step() -> lf.EMStep:
        net.zero_grad()
        result = em(problem.x, problem.y, task=cases.TASK)
        result.loss.backward()
        return result

    return step


def _timed(step: Step) -> tuple[float, lf.EMStep]:
    start = time.perf_counter()
    result = step()
    return time.perf_counter() - start, result


def _table(rows: Sequence[dict[str, Any]]) -> Table:
    table = Table(title="Steps that leave configurations out, in steps that do not")
    for heading in (
        "backend", "", "kept or drawn", "of", "mass dropped", "exact, ms", "ratio", "quartiles",
    ):  # fmt: skip
        table.add_column(heading, justify="right")
    for row in rows:
        low, high = row["quartiles"]
        table.add_row(
            row["backend"], row["how"], str(row["number"]), str(row["configurations"]),
            f"{row['dropped_mass']:.2f}", f"{row['exact_ms']:.1f}", f"{row['ratio']:.3f}",
            f"{low:.3f} to {high:.3f}",
        )  # fmt: skip
    return table


if __name__ == "__main__":
    sys.exit(main())
