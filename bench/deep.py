"""``python -m bench.deep``: deep ungrouped searches within a memory budget.

A net of d stages on real images (scikit-learn's digits), all 2^d configurations, at one
``max_memory`` for every depth; the shallowest depth also without a bound. Each row is a process of
its own, so that its peak is what the operating system says of it. The processes take turns, so that
the machine's drift meets all of them; ratios are medians of those within a round.
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
    parser.add_argument("--rounds", type=int, default=15, help="turns of every row")
    parser.add_argument("--turn", type=float, default=0.5, metavar="SECONDS",
        help="of steps a turn, at least one step")  # fmt: skip
    parser.add_argument("--out", type=Path, metavar="FILE", help="a JSON file")
    parser.add_argument("--row", type=int, nargs=2, help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    if args.row:
        _take_turns(args, *args.row)
        return 0
    asked = [(args.depths[0], 0), *((depth, args.max_memory) for depth in args.depths)]
    rows = _measured(args, asked)
    result = {
        "settings": {k: v for k, v in vars(args).items() if k not in ("out", "row")},
        "machine": machine.describe("cpu"),
        "rows": rows,
    }
    if args.out:
        args.out.write_text(json.dumps(result, indent=1) + "\n")
    Console().print(_table(rows))
    return 0


def _measured(args: argparse.Namespace, asked: Sequence[tuple[int, int]]) -> list[dict[str, Any]]:
    """All rows, ``(depth, max_memory)``, in rounds of a turn each."""
    processes = [_process(args, *row) for row in asked]
    try:
        for process in processes:
            _turn(process, 0.0)  # makes plans and buffers
        turns = [[_turn(p, args.turn) for p in processes] for _ in range(args.rounds)]
    finally:
        for process in processes:
            process.kill()
    evaluation = [
        [statistics.median(turn["seconds"]) / _evaluations(depth) for turn in row]
        for row, (depth, _) in zip(zip(*turns, strict=True), asked, strict=True)
    ]
    return [
        _row(depth, max_memory, [turn[i] for turn in turns])
        | {"times_unbounded": _ratio(evaluation[i], evaluation[0])}
        | {"times_shallowest": _ratio(evaluation[i], evaluation[1])}
        for i, (depth, max_memory) in enumerate(asked)
    ]


def _process(args: argparse.Namespace, depth: int, max_memory: int) -> subprocess.Popen:
    options = {name: getattr(args, name) for name in ("batch", "width", "backend")}
    words = [word for name, value in options.items() for word in (f"--{name}", str(value))]
    command = [sys.executable, "-m", "bench.deep", *words, "--row", str(depth), str(max_memory)]
    return subprocess.Popen(command, text=True, stdin=subprocess.PIPE, stdout=subprocess.PIPE)


def _turn(process: subprocess.Popen, seconds: float) -> dict[str, Any]:
    print(seconds, file=process.stdin, flush=True)
    answer = process.stdout.readline()
    if not answer:
        raise RuntimeError(f"{process.args} ended with status {process.wait()}")
    return json.loads(answer)


def _take_turns(args: argparse.Namespace, depth: int, max_memory: int) -> None:
    """One depth: for each line that comes in, a number of seconds, steps of training for as long.

    ``max_memory`` 0: none.
    """
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
    em = lf.LASEM(net, backend=args.backend, max_memory=max_memory * MIB or None)
    optimizer = torch.optim.Adam(net.task_parameters("digits"))
    before = _peak()
    for line in sys.stdin:
        seconds, begin = [], time.perf_counter()
        while not seconds or time.perf_counter() - begin < float(line):
            rows = torch.randint(len(x), (args.batch,))
            start = time.perf_counter()
            optimizer.zero_grad()
            em(x[rows], y[rows], "digits").loss.backward()
            optimizer.step()
            seconds.append(time.perf_counter() - start)
        turn = {"seconds": seconds, "peak": _peak(), "peak_of_steps": _peak() - before}
        print(json.dumps(turn), flush=True)


def _row(depth: int, max_memory: int, turns: Sequence[dict[str, Any]]) -> dict[str, Any]:
    seconds = [time for turn in turns for time in turn["seconds"]]
    step = statistics.median(seconds)
    return {
        "depth": depth,
        "configurations": 2**depth,
        "max_memory_mib": max_memory or None,
        "steps": len(seconds),
        "step_ms": 1e3 * step,
        "evaluation_us": 1e6 * step / _evaluations(depth),
        "peak_mib": turns[-1]["peak"] / MIB,
        "peak_of_steps_mib": turns[-1]["peak_of_steps"] / MIB,
    }


def _evaluations(depth: int) -> int:
    """How many stage evaluations a step of all configurations has."""
    return 2 ** (depth + 1) - 2


def _ratio(times: Sequence[float], of: Sequence[float]) -> float:
    return statistics.median(a / b for a, b in zip(times, of, strict=True))


def _peak() -> int:
    """The largest resident size of this process so far, in bytes (ru_maxrss is in KiB on Linux)."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def _table(rows: Sequence[dict[str, Any]]) -> Table:
    table = Table(title="Steps of training within a memory budget")
    for heading in (
        "stages", "configurations", "max_memory, MiB", "peak of the process, MiB",
        "of it by the steps", "ms a step", "us a stage evaluation", "times unbounded",
        "times shallowest",
    ):  # fmt: skip
        table.add_column(heading, justify="right")
    for row in rows:
        table.add_row(
            str(row["depth"]), str(row["configurations"]), str(row["max_memory_mib"] or "none"),
            f"{row['peak_mib']:.0f}", f"{row['peak_of_steps_mib']:.0f}", f"{row['step_ms']:.0f}",
            f"{row['evaluation_us']:.0f}", f"{row['times_unbounded']:.2f}",
            f"{row['times_shallowest']:.2f}",
        )  # fmt: skip
    return table


if __name__ == "__main__":
    sys.exit(main())
