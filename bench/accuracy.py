"""``python -m bench.accuracy``: does training with one backend end where it does with another?

The demo's tasks on scikit-learn's digits (real images), the demo's net, the same initial weights
and mini-batches for every backend, several seeds. Rounding differs, so single runs differ; over
seeds the accuracies must not.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import torch

from bench import machine
from lasem_fast import TransferNet
from lasem_fast.demo import data, model
from lasem_fast.lifelong import train_sequence

MEASURES = ("peak_accuracy", "average_accuracy")


def main(argv: Sequence[str] | None = None) -> int:
    """Trains, prints a table, and writes the results; the exit status is 0 if they agree."""
    parser = argparse.ArgumentParser(prog="python -m bench.accuracy", description=__doc__)
    parser.add_argument("--backends", nargs=2, default=["torch", "cpp"], metavar="NAME")
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--tasks", type=int, default=4)
    parser.add_argument("--epochs", type=int, default=20)
    parser.add_argument("--width", type=int, default=16, help="channels of the first stage")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--out", type=Path, help="a JSON file")
    args = parser.parse_args(argv)
    runs = {
        backend: [_run(args, backend, seed) for seed in range(args.seeds)]
        for backend in args.backends
    }
    result = {
        "settings": {k: v for k, v in vars(args).items() if k != "out"},
        "machine": machine.describe(args.device),
        "runs": runs,
        "comparison": {measure: _compare(*runs.values(), measure) for measure in MEASURES},
    }
    for measure, found in result["comparison"].items():
        print(f"{measure}: {args.backends[0]} {found['means'][0]:.4f}, {args.backends[1]} "
              f"{found['means'][1]:.4f}; difference {found['difference']:+.4f}, spread over seeds "
              f"{found['spread']:.4f}")  # fmt: skip
    if args.out:
        args.out.write_text(json.dumps(result, indent=1) + "\n")
    return int(any(not found["agree"] for found in result["comparison"].values()))


def _run(args: argparse.Namespace, backend: str, seed: int) -> dict[str, float]:
    """Mean test accuracies over the tasks of one training run."""
    images = data.digits(seed)
    run = train_sequence(
        lambda: TransferNet(model.make_stages(images.side, args.width)),
        lambda task: model.make_head(task.n_classes, images.side, args.width),
        data.make_tasks(images, args.tasks, seed=seed),
        method="lasem",
        epochs=args.epochs,
        batch_size=16,
        optimizer=partial(torch.optim.Adam, lr=1e-3),
        seed=seed,
        em_options={"backend": backend},
        device=args.device,
    )
    return {measure: run.summary()[measure] for measure in MEASURES}


def _compare(first: list[dict], second: list[dict], measure: str) -> dict[str, object]:
    """The mean difference against the standard deviation of the first backend over seeds."""
    a, b = ([run[measure] for run in runs] for runs in (first, second))
    difference = statistics.mean(b) - statistics.mean(a)
    spread = statistics.stdev(a)
    return {
        "means": [statistics.mean(a), statistics.mean(b)],
        "difference": difference,
        "spread": spread,
        "agree": abs(difference) <= spread,
    }


if __name__ == "__main__":
    sys.exit(main())
