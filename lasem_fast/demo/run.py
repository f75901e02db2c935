"""The demo from the command line: train, compare, plot, time, write everything down."""

from __future__ import annotations

import argparse
import platform
import sys
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich import box
from rich.console import Console
from rich.progress import BarColumn, TextColumn, TimeElapsedColumn
from rich.progress import Progress as ProgressBar
from rich.table import Table
from torch import nn

import lasem_fast
from lasem_fast import LASEM, TransferNet, metrics
from lasem_fast.demo import data, model, timing
from lasem_fast.demo.results import Results
from lasem_fast.lifelong import METHODS, Progress, RunRecord, Task, train_sequence
from lasem_fast.tools import arguments

LEARNING_RATE = 1e-3
BATCH_SIZE = 16
EVALUATE_EARLIER_EVERY = 10
FULL = {"tasks": 8, "epochs": 40}
QUICK = {"tasks": 3, "epochs": 4}
_TABLE = {"box": box.SIMPLE_HEAD, "padding": (0, 1, 0, 0)}  # 80 columns have to do
METHOD_NAMES = {"lasem": "LASEM", "all": "all shared", "none": "nothing shared"}


def main(argv: Sequence[str] | None = None, prog: str | None = None) -> int:
    """Run the demo; returns the exit status."""
    parser = _parser(prog)
    args = parser.parse_args(argv)
    for name, value in (QUICK if args.quick else FULL).items():
        if getattr(args, name) is None:
            setattr(args, name, value)
    console = Console()
    torch.set_num_threads(args.threads)
    try:
        images = _images(args)
        tasks = data.make_tasks(images, args.tasks, seed=args.seed)
        make_net, make_head = _factories(images.side)
        _check_backend(args, make_net)
        results = Results(args.out)
    except (OSError, ValueError) as error:
        parser.error(str(error))

    options = {
        "epochs": args.epochs,
        "batch_size": BATCH_SIZE,
        "optimizer": partial(torch.optim.Adam, lr=LEARNING_RATE),
        "seed": args.seed,
        "evaluate_earlier_every": EVALUATE_EARLIER_EVERY,
        "em_options": {"backend": args.backend},
        "device": args.device,
    }
    runs: dict[str, RunRecord] = {}

    def keep(run: RunRecord) -> None:
        runs[run.method] = run
        results.keep(_result(args, runs, {}))

    try:
        with _progress_bar(console) as bar:
            for method in METHODS:
                report = _reporter(bar, method, args.tasks * args.epochs)
                train_sequence(
                    make_net, make_head, tasks,
                    method=method, on_epoch=report, on_task=keep, **options,
                )  # fmt: skip
        times = timing.time_steps(
            make_net, make_head, tasks[0],
            batch_size=BATCH_SIZE, backend=args.backend, device=args.device,
        )  # fmt: skip
    except (Exception, KeyboardInterrupt) as error:
        if runs:
            print(f"{type(error).__name__} before the end; {results.kept()}", file=sys.stderr)
        if isinstance(error, KeyboardInterrupt):
            return 130  # as a shell has it
        raise
    result = _result(args, runs, times)
    # first of all: what follows may fail, and the results are there then
    written = results.write(result, runs["lasem"])

    console.print(_task_table(runs["lasem"]))
    console.print(_method_table(result["comparison"]))
    console.print(_timing_lines(runs, times))
    console.print(written.message, markup=False, highlight=False)
    return written.status


def _parser(prog: str | None) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog=prog,
        description="Train on a sequence of small, diverse image tasks three times: LASEM, "
        "transfer at all stages, no transfer. On one machine the same options and seed give the "
        "same results, whatever else it does, unless LASEM_FAST_CHOICES=measure asks for timing.",
    )
    add = parser.add_argument
    add("--data", choices=("digits", "fashion-mnist"), default="digits",
        help="scikit-learn's 8 x 8 digits (default), or Fashion-MNIST from --root")  # fmt: skip
    add("--root", type=Path, help="folder of Fashion-MNIST's four idx files, gzipped or not")
    add(
        "--seed",
        type=arguments.seed,
        default=0,
        help="of tasks, weights and mini-batches (default 0)",
    )
    add("--tasks", type=arguments.positive, help=f"default {FULL['tasks']}")
    add("--epochs", type=arguments.positive, help=f"per task (default {FULL['epochs']})")
    add("--quick", action="store_true",
        help=f"{QUICK['tasks']} tasks of {QUICK['epochs']} epochs: does it run?")  # fmt: skip
    add("--out", type=Path, default=Path("demo-run"), metavar="DIR", help="default demo-run/")
    add("--device", type=arguments.device, default="cpu", help="a PyTorch device (default cpu)")
    add("--backend", default="auto", help="of the EM step (default auto)")
    add("--threads", type=arguments.threads, default=1,
        help="CPU threads; the net is too small to gain from more than the default 1")  # fmt: skip
    return parser


def _images(args: argparse.Namespace) -> data.Images:
    if args.data == "digits":
        if args.root is not None:
            raise ValueError("--root: expected only together with --data fashion-mnist")
        return data.digits(args.seed)
    if args.root is None:
        raise ValueError("--data fashion-mnist needs --root, the folder of its four idx files")
    return data.fashion_mnist(args.root, args.seed)


def _check_backend(args: argparse.Namespace, make_net: Callable[[], TransferNet]) -> None:
    """Raises ``ValueError`` before anything is trained; LASEM's own words say what is wrong."""
    try:
        LASEM(make_net(), backend=args.backend)
    except RuntimeError as error:
        raise ValueError(str(error)) from error


def _factories(side: int) -> tuple[Callable[[], TransferNet], Callable[[Task], nn.Module]]:
    return (
        lambda: TransferNet(model.make_stages(side)),
        lambda task: model.make_head(task.n_classes, side),
    )


def _progress_bar(console: Console) -> ProgressBar:
    return ProgressBar(
        TextColumn("{task.description:14}"),
        BarColumn(bar_width=20),
        TextColumn("{task.fields[where]}"),
        TimeElapsedColumn(),
        console=console,
    )


def _reporter(bar: ProgressBar, method: str, total: int) -> Callable[[Progress], None]:
    row = bar.add_task(METHOD_NAMES[method], total=total, where="")

    def report(now: Progress) -> None:
        where = f"task {now.task_number}/{now.n_tasks} epoch {now.epoch}/{now.epochs} {now.label}"
        bar.update(row, advance=1, where=where)

    return report


def _result(
    args: argparse.Namespace, runs: dict[str, RunRecord], times: dict[str, Any]
) -> dict[str, Any]:
    """All that is written down. Wall-clock times are under "timing" and "seconds" only."""
    config = {k: v for k, v in vars(args).items() if k not in ("out", "root", "quick")}
    settings = {"batch_size": BATCH_SIZE, "optimizer": "Adam", "learning_rate": LEARNING_RATE}
    versions = {
        "lasem_fast": lasem_fast.__version__,
        "torch": torch.__version__,
        "numpy": np.__version__,
        "python": platform.python_version(),
    }
    comparison = {
        method: {
            **run.summary(),
            "gain_over_no_transfer": _gain(run, runs.get("none")),
            "parameters": run.parameters,
        }
        for method, run in runs.items()
    }
    return {
        "config": {**config, **settings},
        "versions": versions,
        "comparison": comparison,
        "runs": {method: run.to_dict() for method, run in runs.items()},
        "timing": times,
    }


def _gain(run: RunRecord, alone: RunRecord | None) -> float | None:
    """None for one task, and before both runs have ended."""
    if alone is None or len(run.tasks) != len(alone.tasks):
        return None
    gain = metrics.gain(run.accuracy_matrix(), alone.accuracy_matrix().diagonal())
    return gain if gain == gain else None


def _task_table(run: RunRecord) -> Table:
    table = Table(
        title="LASEM, task by task",
        caption="Test accuracy in %. Peak: at the best validation epoch. Ratio: after the last "
        "task / after the task's own training.",
        **_TABLE,
    )
    table.add_column("task")
    table.add_column("classes, transformation, noise")
    table.add_column("shared\nstages", justify="center")
    for heading in ("peak", "after\nlast", "forgetting\nratio"):
        table.add_column(heading, justify="right")
    R = run.accuracy_matrix()
    for task, learnt, final in zip(run.tasks, R.diagonal(), R[-1], strict=True):
        table.add_row(
            task.name, task.note, task.label, _percent(task.peak), _percent(final),
            _ratio(final / learnt if learnt > 0 else None),
        )  # fmt: skip
    return table


def _method_table(comparison: dict[str, dict[str, float | None]]) -> Table:
    table = Table(
        title="The three methods, means over the tasks",
        caption="While learning: mean over the task's own epochs. Forgetting ratio: after the "
        "last task / after the task's own training, and / peak. Parameters: of all tasks, heads "
        "included.",
        **_TABLE,
    )
    table.add_column("method")
    for heading in (
        "peak", "while\nlearning", "after\nlast", "forgetting\nratio", "(/ peak)",
        "parameters\nkept",
    ):  # fmt: skip
        table.add_column(heading, justify="right")
    for method, row in comparison.items():
        table.add_row(
            METHOD_NAMES[method],
            _percent(row["peak_accuracy"]),
            _percent(row["learning_curve_area"]),
            _percent(row["average_accuracy"]),
            _ratio(row["forgetting_ratio_to_end"]),
            _ratio(row["forgetting_ratio_to_peak"]),
            f"{row['parameters']:,}",
        )
    return table


def _timing_lines(runs: dict[str, RunRecord], times: dict[str, Any]) -> str:
    ms = times["milliseconds"]
    n_configs = len(runs["lasem"].configurations)
    trained = ", ".join(
        f"{METHOD_NAMES[method]} {run.seconds['train']:.1f} s" for method, run in runs.items()
    )
    return (
        f"One EM step over {n_configs} configurations (backend {times['backend']}, mini-batch of "
        f"{times['batch_size']}): {ms['em']:.1f} ms\n"
        f"  the naive loop: {ms['naive']:.1f} ms ({ms['naive'] / ms['em']:.1f} x as long)\n"
        f"  one plain training step: {ms['plain']:.1f} ms (EM takes "
        f"{ms['em'] / ms['plain']:.1f} x as long)\n"
        f"Training only: {trained}"
    )


def _ratio(value: float | None) -> str:
    return "-" if value is None else f"{value:.2f}"


def _percent(value: float) -> str:
    return f"{100 * value:.1f}"


if __name__ == "__main__":
    sys.exit(main())
