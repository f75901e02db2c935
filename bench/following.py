"""``python -m bench.following``: M-steps that follow the posterior along real training runs.

CIFAR-4 (the paper's four-layer net) on Fashion-MNIST, padded to 32 x 32 in three channels: a
sequence of tasks, several seeds, and for each posterior mass that an M-step may leave out the time
of a step, the mass that was left out, and the accuracies. A step's time is that of forward,
backward and optimiser; a plain step of one configuration is timed on the same mini-batches.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from rich.console import Console
from rich.table import Table
from torch import Tensor

import lasem_fast as lf
from bench import machine
from lasem_fast.demo import data
from lasem_fast.tools.builtin import NETS

NET = NETS["cifar-4"]
_EVERY = 5  # every how many steps a plain one is timed
_TURNS = 102
_SIDE = 32


def main(argv: Sequence[str] | None = None) -> int:
    """Trains, prints a table and writes the results; the exit status is 0."""
    parser = argparse.ArgumentParser(prog="python -m bench.following", description=__doc__)
    add = parser.add_argument
    add("--root", type=Path, required=True, help="folder of Fashion-MNIST's four idx files")
    add("--masses", type=float, nargs="+", default=[0.0, 1e-3, 1e-2, 1e-1])
    add("--seeds", type=int, default=5)
    add("--tasks", type=int, default=3)
    add("--classes", type=int, default=5)
    add("--train-per-class", type=int, default=34)
    add("--epochs", type=int, default=40)
    add("--batch", type=int, default=10)
    add("--backend", default="auto")
    add("--out", type=Path, metavar="FILE", help="a JSON file")
    add("--plot", type=Path, metavar="FILE", help="a picture of time and accuracy against the mass")
    args = parser.parse_args(argv)
    nothing = _nothing_to_prune(args)
    runs = []
    for seed in range(args.seeds):
        for mass in args.masses:  # in turns, so that the machine's drift meets all of them
            runs.append(_run(args, mass, seed))
            print(json.dumps(runs[-1]), file=sys.stderr, flush=True)
    rows = [_row(mass, [run for run in runs if run["mass"] == mass]) for mass in args.masses]
    if args.out:
        settings = {k: v for k, v in vars(args).items() if k not in ("out", "root", "plot")}
        result = {
            "settings": settings, "machine": machine.describe("cpu"),
            "nothing_to_prune": nothing, "rows": rows, "runs": runs,
        }  # fmt: skip
        args.out.write_text(json.dumps(result, indent=1) + "\n")
    if args.plot:
        _draw(rows, args.plot)
    Console().print(_table(rows))
    print(f"With nothing to leave out: {nothing:.3f} times an exact step")
    return 0


def _nothing_to_prune(args: argparse.Namespace) -> float:
    """Time of a step that may leave out 1e-30 of the posterior, which is nothing, over exact's.

    The two take turns on one mini-batch; the median of the ratios of neighbours.
    """
    torch.manual_seed(0)
    x, y = torch.randn(args.batch, 3, _SIDE, _SIDE), torch.randint(args.classes, (args.batch,))
    ems = []
    for mass in (0.0, 1e-30):
        net = lf.TransferNet(NET.stages())
        net.add_task("task", NET.head(args.classes))
        ems.append(lf.LASEM(net, prune=mass, backend=args.backend))
    ems[1].net.load_state_dict(ems[0].net.state_dict())
    ratios = []
    for i in range(_TURNS):
        seconds = []
        for em in ems if i % 2 else reversed(ems):
            em.net.zero_grad()
            start = time.perf_counter()
            step = em(x, y, "task")
            step.loss.backward()
            seconds.append(time.perf_counter() - start)
            assert float(step.dropped_mass) == 0
        exact, pruned = seconds if i % 2 else reversed(seconds)
        ratios.append(pruned / exact)
    return statistics.median(ratios[2:])  # the first ones make plans and buffers


def _run(args: argparse.Namespace, mass: float, seed: int) -> dict[str, Any]:
    """One sequence of tasks with one mass."""
    tasks = data.make_tasks(
        data.fashion_mnist(args.root, seed), args.tasks, seed=seed, classes_per_task=args.classes,
        train_per_class=args.train_per_class,
    )  # fmt: skip
    torch.manual_seed(seed)
    net = lf.TransferNet(NET.stages())
    em = lf.LASEM(net, prune=mass, backend=args.backend)
    em_ms, plain_ms, dropped, after_own = [], [], [], []
    for task in tasks:
        net.add_task(task.name, NET.head(task.n_classes))
        optimizer = torch.optim.Adam(net.task_parameters(task.name), lr=1e-3)
        x, y = _images(task.train[0]), task.train[1]
        for _ in range(args.epochs):
            for rows in torch.randperm(len(x)).split(args.batch):
                if len(rows) < args.batch:
                    continue
                if len(em_ms) % _EVERY == 0:
                    plain_ms.append(_plain_step(net, x[rows], y[rows], task.name))
                start = time.perf_counter()
                optimizer.zero_grad()
                step = em(x[rows], y[rows], task.name)
                step.loss.backward()
                optimizer.step()
                em_ms.append(1e3 * (time.perf_counter() - start))
                dropped.append(float(step.dropped_mass))
        em.end_task(task.name)
        after_own.append(_accuracy(net, task))
    return {
        "mass": mass,
        "seed": seed,
        "steps": len(em_ms),
        "step_ms": statistics.mean(em_ms),
        "median_step_ms": statistics.median(em_ms),
        "plain_ms": statistics.median(plain_ms),
        "dropped_mass": statistics.mean(dropped),
        "own_accuracy": statistics.mean(after_own),
        "final_accuracy": statistics.mean(_accuracy(net, task) for task in tasks),
        "kept": [em.space.label(em.space.index(net.config(task.name))) for task in tasks],
    }


def _plain_step(net: lf.TransferNet, x: Tensor, y: Tensor, task: str) -> float:
    """Forward, backward and an optimiser's step of one configuration, on copies of its weights."""
    stages = NET.stages()
    head = NET.head(net.heads[task][-1].out_features)
    model = torch.nn.Sequential(*stages, head)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    times = []
    for _ in range(2):  # the optimiser makes its state in the first one
        start = time.perf_counter()
        optimizer.zero_grad()
        F.cross_entropy(model(x), y).backward()
        optimizer.step()
        times.append(1e3 * (time.perf_counter() - start))
    return times[-1]


def _images(x: Tensor) -> Tensor:
    """Grey images in the middle of a black 32 x 32 one, in three equal channels."""
    left = (_SIDE - x.shape[-1]) // 2
    right = _SIDE - x.shape[-1] - left
    return F.pad(x, (left, right, left, right), value=-0.5).expand(-1, 3, -1, -1).contiguous()


@torch.no_grad()
def _accuracy(net: lf.TransferNet, task: Any) -> float:
    x, y = task.test
    right = sum(
        int((net(_images(part), task.name).argmax(1) == labels).sum())
        for part, labels in zip(x.split(256), y.split(256), strict=True)
    )
    return right / len(y)


def _row(mass: float, runs: list[dict[str, Any]]) -> dict[str, Any]:
    """Means over seeds; the ratio of a step to a plain one is taken within each run."""
    own = [run["own_accuracy"] for run in runs]
    final = [run["final_accuracy"] for run in runs]

    def spread(values: list[float]) -> float:
        return statistics.stdev(values) if len(values) > 1 else 0.0

    return {
        "mass": mass,
        "step_ms": statistics.mean(run["step_ms"] for run in runs),
        "plain_ms": statistics.mean(run["plain_ms"] for run in runs),
        "base_steps": statistics.mean(run["step_ms"] / run["plain_ms"] for run in runs),
        "dropped_mass": statistics.mean(run["dropped_mass"] for run in runs),
        "own_accuracy": [statistics.mean(own), spread(own)],
        "final_accuracy": [statistics.mean(final), spread(final)],
    }


def _draw(rows: Sequence[dict[str, Any]], file: Path) -> None:
    """Two panels over the mass that an M-step may leave out: time of a step, and accuracies."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, (time_axes, accuracy_axes) = plt.subplots(1, 2, figsize=(9, 3.5))
    places = range(len(rows))
    time_axes.plot(places, [row["base_steps"] for row in rows], "o-", color="#0072B2")
    time_axes.axhline(1, color="black", linestyle=":", label="a step of one configuration")
    time_axes.set_ylabel("mean step, in plain steps")
    time_axes.set_ylim(bottom=0)
    time_axes.legend(fontsize=8)
    lines = (
        ("own_accuracy", "after the own task", "s-", "#009E73"),
        ("final_accuracy", "after all tasks", "^--", "#D55E00"),
    )
    for i, (key, label, style, colour) in enumerate(lines):
        means, spreads = zip(*(row[key] for row in rows), strict=True)
        accuracy_axes.errorbar(
            [place + 0.06 * i for place in places], means, yerr=spreads, fmt=style, color=colour,
            capsize=3, label=label,
        )  # fmt: skip
    accuracy_axes.set_ylabel("test accuracy, mean and\nstandard deviation over seeds")
    accuracy_axes.legend(fontsize=8)
    for axes in (time_axes, accuracy_axes):
        axes.set_xticks(list(places), [f"{row['mass']:g}" for row in rows])
        axes.set_xlabel("posterior mass that an M-step may leave out")
    figure.tight_layout()
    file.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(file, dpi=120)
    plt.close(figure)


def _table(rows: Sequence[dict[str, Any]]) -> Table:
    table = Table(title="M-steps that follow the posterior")
    for heading in (
        "prune", "mean ms a step", "plain steps", "mass dropped", "accuracy, own", "accuracy, end",
    ):  # fmt: skip
        table.add_column(heading, justify="right")
    for row in rows:
        own, final = row["own_accuracy"], row["final_accuracy"]
        table.add_row(
            f"{row['mass']:g}", f"{row['step_ms']:.1f}", f"{row['base_steps']:.2f}",
            f"{row['dropped_mass']:.2g}", f"{own[0]:.3f} ±{own[1]:.3f}",
            f"{final[0]:.3f} ±{final[1]:.3f}",
        )  # fmt: skip
    return table


if __name__ == "__main__":
    sys.exit(main())
