"""``python -m bench.deep``: deep ungrouped searches within a memory budget.

A net of d stages on real images (scikit-learn's digits), all 2^d configurations, at one
``max_memory`` for every depth; the shallowest depth also without a bound. Each row is a process of
its own, so that its peak is what the operating system says of it.
"""

from __future__ import annotations

import argparse
import json
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import nn

import lasem_fast as lf
from bench import machine
from lasem_fast.demo import data

MIB = 2**20
CLASSES = 10


def main(argv: Sequence[str] | None = None) -> int:
    """Prints and writes the table; the exit status is 0."""
    parser = argparse.ArgumentParser(prog="python -m bench.deep", description=__doc__)
    parser.add_argument("--depths", type=int, nargs="+", default=[8, 9, 10, 11, 12])
    parser.add_argument("--max-memory", type=int, default=256, metavar="MIB")
    parser.add_argument("--batch", type=int, default=10)
    parser.add_argument("--width", type=int, default=32, help="channels of every stage")
    parser.add_argument("--backend", default="auto")
    parser.add_argument("--seconds", type=float, default=20.0, help="of timing per row")
    parser.add_argument("--out", type=Path, metavar="FILE", help="a JSON file")
    parser.add_argument("--row", type=int, nargs=2, help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    if args.row:
        print(json.dumps(_row(args, *args.row)))
        return 0
    asked = [(args.depths[0], 0), *((depth, args.max_memory) for depth in args.depths)]
    rows = [_in_a_process(args, *row) for row in asked]
    result = {
        "settings": {k: v for k, v in vars(args).items() if k not in ("out", "row")},
        "machine": machine.describe("cpu"),
        "rows": rows,
    }
    if args.out:
        args.out.write_text(json.dumps(result, indent=1) + "\n")
    Console().print(_table(rows))
    return 0


def _in_a_process(args: argparse.Namespace, depth: int, max_memory: int) -> dict[str, Any]:
    options = {name: getattr(args, name) for name in ("batch", "width", "backend", "seconds")}
    words = [word for name, value in options.items() for word in (f"--{name}", str(value))]
    command = [sys.executable, "-m", "bench.deep", *words, "--row", str(depth), str(max_memory)]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"depth {depth}: {done.stderr}")
    return json.loads(done.stdout)


def _row(args: argparse.Namespace, depth: int, max_memory: int) -> dict[str, Any]:
    """One depth: steps of training, their time and the process's peak. ``max_memory`` 0: none."""
    torch.manual_seed(0)
    x, y = data.digits(0).train
    net = lf.TransferNet(
        nn.Sequential(
            nn.Conv2d(args.width if i else 1, args.width, 3, padding=1), nn.ReLU(),
            *([nn.MaxPool2d(2)] if i == depth - 1 else []),
        )
        for i in range(depth)
    )  # fmt: skip
    head = nn.Sequential(nn.Flatten(), nn.Linear(args.width * 16, CLASSES))
    net.add_task("digits", head)
    bound = max_memory * MIB or None
    em = lf.LASEM(net, backend=args.backend, max_memory=bound)
    optimizer = torch.optim.Adam(net.task_parameters("digits"))
    before = _peak()
    seconds, begin = [], time.perf_counter()
    while len(seconds) < 4 or time.perf_counter() - begin < args.seconds:
        rows = torch.randint(len(x), (args.batch,))
        start = time.perf_counter()
        optimizer.zero_grad()
        em(x[rows], y[rows], "digits").loss.backward()
        optimizer.step()
        seconds.append(time.perf_counter() - start)
    step = statistics.median(seconds[1:])  # the first one makes plans and buffers
    evaluations = 2 ** (depth + 1) - 2
    return {
        "depth": depth,
        "configurations": 2**depth,
        "max_memory_mib": max_memory or None,
        "steps": len(seconds),
        "step_ms": 1e3 * step,
        "evaluation_us": 1e6 * step / evaluations,
        "peak_mib": _peak() / MIB,
        "peak_of_steps_mib": (_peak() - before) / MIB,
    }


def _peak() -> int:
    """The largest resident size of this process so far, in bytes (ru_maxrss is in KiB on Linux)."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def _table(rows: Sequence[dict[str, Any]]) -> Table:
    table = Table(title="Steps of training within a memory budget")
    for heading in (
        "stages", "configurations", "max_memory, MiB", "peak of the process, MiB",
        "of it by the steps", "ms a step", "us a stage evaluation",
    ):  # fmt: skip
        table.add_column(heading, justify="right")
    for row in rows:
        table.add_row(
            str(row["depth"]), str(row["configurations"]), str(row["max_memory_mib"] or "none"),
            f"{row['peak_mib']:.0f}", f"{row['peak_of_steps_mib']:.0f}", f"{row['step_ms']:.0f}",
            f"{row['evaluation_us']:.0f}",
        )  # fmt: skip
    return table


if __name__ == "__main__":
    sys.exit(main())
