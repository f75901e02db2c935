"""The demo from the command line: train, compare, plot, time, write everything down."""

from __future__ import annotations

import argparse
import platform
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import joblib
import numpy as np
import torch
from rich.console import Console
from rich.progress import BarColumn, TextColumn, TimeElapsedColumn
from rich.progress import Progress as ProgressBar

import lasem_fast
from lasem_fast.demo import tables, timing, training
from lasem_fast.demo.comparison import METHOD_NAMES, compare, verdict
from lasem_fast.demo.results import Results
from lasem_fast.demo.training import Settings
from lasem_fast.lifelong import METHODS, Progress, RunRecord
from lasem_fast.tools import arguments

FULL = {"tasks": 8, "epochs": 40, "seeds": 3}
QUICK = {"tasks": 3, "epochs": 4, "seeds": 1}


def main(argv: Sequence[str] | None = None, prog: str | None = None) -> int:
    """Run the demo; returns the exit status."""
    parser = _parser(prog)
    args = parser.parse_args(argv)
    for name, value in (QUICK if args.quick else FULL).items():
        if getattr(args, name) is None:
            setattr(args, name, value)
    seeds = range(args.seed, args.seed + args.seeds)
    workers = _workers(args)
    settings = Settings(
        args.data, args.root, args.tasks, args.epochs, args.device, args.backend, args.threads
    )
    console = Console()
    torch.set_num_threads(args.threads)
    try:
        if seeds[-1] >= 2**63:
            raise ValueError(f"--seeds: expected seeds below 2^63, got {seeds[0]} to {seeds[-1]}")
        training.check(settings, seeds[0])
        results = Results(args.out)
    except (OSError, ValueError) as error:
        parser.error(str(error))

    runs: dict[int, dict[str, RunRecord]] = {}

    def keep(run: RunRecord) -> None:
        runs.setdefault(run.seed, {})[run.method] = run
        results.keep(_result(settings, seeds, runs, {}))

    try:
        with _progress_bar(console) as bar:
            shown = _Shown(bar, len(seeds) * len(METHODS), workers)
            for run in training.run_all(settings, seeds, workers, shown.epoch, keep):
                keep(run)
                shown.ended()
        tasks = training.tasks(settings, seeds[0])
        make_net, make_head = training.factories(tasks)
        times = timing.time_steps(
            make_net, make_head, tasks[0],
            batch_size=training.BATCH_SIZE, backend=args.backend, device=args.device,
        )  # fmt: skip
    except (Exception, KeyboardInterrupt) as error:
        if runs:
            print(f"{type(error).__name__} before the end; {results.kept()}", file=sys.stderr)
        if isinstance(error, KeyboardInterrupt):
            return 130  # as a shell has it
        raise
    result = _result(settings, seeds, runs, {**times, "workers": workers})
    # first of all: what follows may fail, and the results are there then
    written = results.write(result, runs[seeds[0]]["lasem"])

    console.print(tables.task_table(runs[seeds[0]]["lasem"]))
    console.print(tables.method_table(result["comparison"]))
    console.print(verdict(result["comparison"]), highlight=False)
    console.print(tables.timing_lines(runs, result["timing"]))
    console.print(written.message, markup=False, highlight=False)
    return written.status


def _parser(prog: str | None) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog=prog,
        description="Train on sequences of small, diverse image tasks, one for every seed, three "
        "times each: LASEM, transfer at all stages, no transfer. On one machine the same options "
        "and seeds give the same results, whatever else it does and however many workers there "
        "are, unless LASEM_FAST_CHOICES=measure asks for timing.",
    )
    add = parser.add_argument
    add("--data", choices=("digits", "fashion-mnist"), default="digits",
        help="scikit-learn's 8 x 8 digits (default), or Fashion-MNIST from --root")  # fmt: skip
    add("--root", type=Path, help="folder of Fashion-MNIST's four idx files, gzipped or not")
    add(
        "--seed",
        type=arguments.seed,
        default=0,
        help="the first one, of tasks, weights and mini-batches (default 0)",
    )
    add("--seeds", type=arguments.positive, metavar="N",
        help=f"how many, counted on from --seed (default {FULL['seeds']})")  # fmt: skip
    add("--tasks", type=arguments.positive, help=f"default {FULL['tasks']}")
    add("--epochs", type=arguments.positive, help=f"per task (default {FULL['epochs']})")
    add("--quick", action="store_true",
        help=f"one seed, {QUICK['tasks']} tasks of {QUICK['epochs']} epochs: does it run?"
    )  # fmt: skip
    add("--out", type=Path, default=Path("demo-run"), metavar="DIR", help="default demo-run/")
    add("--device", type=arguments.device, default="cpu", help="a PyTorch device (default cpu)")
    add("--backend", default="auto", help="of the EM step (default auto)")
    add("--threads", type=arguments.threads, default=1,
        help="CPU threads of a run; the net is too small to gain from more than the default 1"
    )  # fmt: skip
    add("--workers", type=arguments.positive, metavar="N",
        help="runs at a time (default: one per seed, as far as there are CPUs; 1 on a GPU)"
    )  # fmt: skip
    return parser


def _workers(args: argparse.Namespace) -> int:
    """How many processes train; never more than there are runs."""
    if args.workers is not None:
        return min(args.workers, args.seeds * len(METHODS))
    if torch.device(args.device).type != "cpu":
        return 1
    # those that this process may use
    return max(1, min(args.seeds, joblib.cpu_count() // args.threads))


def _progress_bar(console: Console) -> ProgressBar:
    return ProgressBar(
        TextColumn("{task.description}"),
        BarColumn(bar_width=8),
        TextColumn("{task.fields[where]}"),
        TimeElapsedColumn(),
        console=console,
    )


class _Shown:
    """The progress bar: how many of the runs have ended, and where the present one is if known."""

    def __init__(self, bar: ProgressBar, total: int, workers: int) -> None:
        self._bar, self._total, self._ended = bar, total, 0
        where = f"{workers} at a time" if workers > 1 else ""
        self._row = bar.add_task(self._counted(), total=total, where=where)

    def epoch(self, seed: int, now: Progress) -> None:
        """An epoch of a run in this process."""
        done = ((now.task_number - 1) * now.epochs + now.epoch) / (now.n_tasks * now.epochs)
        where = f"{METHOD_NAMES[now.method]}, seed {seed}, task {now.task_number}/{now.n_tasks}"
        where += f", epoch {now.epoch}/{now.epochs}"
        self._bar.update(self._row, completed=self._ended + done, where=where)

    def ended(self) -> None:
        """A run."""
        self._ended += 1
        self._bar.update(self._row, completed=self._ended, description=self._counted())

    def _counted(self) -> str:
        return f"{self._ended} of {self._total} runs"


def _result(
    settings: Settings,
    seeds: Sequence[int],
    runs: dict[int, dict[str, RunRecord]],
    times: dict[str, Any],
) -> dict[str, Any]:
    """All that is written down. Wall-clock times are under "timing" and "seconds" only."""
    config = {k: v for k, v in vars(settings).items() if k != "root"}
    options = {
        "batch_size": training.BATCH_SIZE,
        "optimizer": "Adam",
        "learning_rate": training.LEARNING_RATE,
    }
    versions = {
        "lasem_fast": lasem_fast.__version__,
        "torch": torch.__version__,
        "numpy": np.__version__,
        "python": platform.python_version(),
    }
    # in this order whatever the order in which they ended
    ordered = {
        seed: {method: runs[seed][method] for method in METHODS if method in runs[seed]}
        for seed in seeds
        if seed in runs
    }
    return {
        "config": {**config, "seeds": list(seeds), **options},
        "versions": versions,
        "comparison": compare(ordered),
        "runs": {
            str(seed): {method: run.to_dict() for method, run in of_seed.items()}
            for seed, of_seed in ordered.items()
        },
        "timing": times,
    }


if __name__ == "__main__":
    sys.exit(main())
