"""The demo's plots: two of the first seed's search, and one of all methods over the seeds."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure  # without pyplot: Agg, and no global state

from lasem_fast.demo.comparison import METHOD_NAMES, Comparison, Spread
from lasem_fast.lifelong import RunRecord

_INK = "#222222"
# colours of Okabe and Ito, told apart with every colour vision; never without another mark
_STYLES = {"lasem": ("#0072B2", "o"), "all": ("#D55E00", "s"), "none": ("#009E73", "^")}


def plot_posterior(record: RunRecord, path: Path) -> None:
    """Posterior over time: a panel per task, a row per configuration, a column per epoch."""
    labels = record.configurations
    n = len(record.tasks)
    columns = min(n, 4)
    rows = math.ceil(n / columns)
    size = (1.6 + 2.6 * columns, 0.9 + (0.9 + 0.165 * len(labels)) * rows)
    figure = Figure(figsize=size, layout="constrained")
    axes = figure.subplots(rows, columns, squeeze=False, sharex=True, sharey=True)
    image = None
    for axis, task in zip(axes.flat, record.tasks, strict=False):
        image = axis.imshow(
            np.array(task.posterior).T,
            aspect="auto",
            cmap="Blues",
            vmin=0,
            vmax=1,
            interpolation="nearest",
            extent=(0.5, record.epochs + 0.5, len(labels) - 0.5, -0.5),
        )
        axis.set_title(f"{task.name}: {task.label}", fontsize=10, color=_INK)
        axis.set_yticks(range(len(labels)), labels, fontsize=7)
        axis.axhline(labels.index(task.label), color="#d1495b", lw=0.8, ls=(0, (2, 2)))
    for axis in axes.flat[n:]:
        axis.set_axis_off()
    for column in range(columns):
        below = [axis for axis in axes[:, column] if axis.axison]
        below[-1].set_xlabel("epoch")
        below[-1].xaxis.set_tick_params(labelbottom=True)
    for axis in axes[:, 0]:
        axis.set_ylabel("shared stages")
    figure.colorbar(image, ax=axes, label="posterior, mean of the epoch", shrink=0.6, pad=0.015)
    figure.suptitle(
        f"Posterior of each configuration, first seed ({record.seed}); dashed: the one kept",
        color=_INK,
    )
    figure.savefig(path, dpi=150)


def plot_share_frequency(record: RunRecord, path: Path) -> None:
    """How often each stage is shared: over the configurations kept, and over the priors."""
    depth = len(record.share_frequency)
    stages = np.arange(1, depth + 1)
    bits = np.array([_bits(label, depth) for label in record.configurations])
    marginal = np.mean([np.array(task.prior) @ bits for task in record.tasks], axis=0)
    figure = Figure(figsize=(1.6 + 0.9 * depth, 3.4), layout="constrained")
    axis = figure.subplots()
    axis.bar(
        stages, record.share_frequency, width=0.62, color="#4c78a8", label="configuration kept"
    )
    axis.plot(
        stages, marginal, "D", ms=6, color="#f2a541", mec=_INK, mew=0.7,
        label="prior at the end of the task",
    )  # fmt: skip
    n = len(record.tasks)
    counts = [round(share * n) for share in record.share_frequency]
    names = [f"{stage}\n{count} of {n}" for stage, count in zip(stages, counts, strict=True)]
    axis.set_xticks(stages, names)
    axis.set_xlabel("stage (1 is next to the input), tasks that share it")
    axis.set_ylabel("frequency of sharing")
    axis.set_ylim(0, 1.05)
    axis.set_yticks(np.linspace(0, 1, 6))
    axis.set_title(f"first seed ({record.seed})", fontsize=10, color=_INK)
    axis.spines[["top", "right"]].set_visible(False)
    figure.legend(loc="outside upper center", ncols=2, frameon=False, fontsize=9)
    figure.savefig(path, dpi=150)


def plot_trade_off(comparison: Comparison, path: Path) -> None:
    """What is kept against what it is worth: accuracy after the last task, and forgetting.

    A small, light mark for every seed, a large one with the range's bars for the mean.
    """
    figure = Figure(figsize=(8.4, 3.9), layout="constrained")
    panels = (("average_accuracy", "accuracy after the last task, %"),
              ("forgetting", "forgetting, percentage points"))  # fmt: skip
    axes = figure.subplots(1, 2, sharex=True)
    for axis, (name, label) in zip(axes, panels, strict=True):
        for method, measures in comparison.items():
            _mark(axis, method, measures["parameters"], measures[name])
        axis.set_ylabel(label)
        axis.set_xlabel("parameters kept, thousands")
        axis.set_xlim(0, 1.08e-3 * max(m["parameters"]["max"] for m in comparison.values()))
        axis.grid(color="#dddddd", lw=0.6)
        axis.set_axisbelow(True)
        axis.spines[["top", "right"]].set_visible(False)
    if comparison["lasem"]["forgetting"]["mean"] is None:
        axes[1].text(0.5, 0.5, "not defined for one task", ha="center", transform=axes[1].transAxes)
    axes[0].set_title("higher and further left is better", fontsize=9, color=_INK)
    axes[1].set_title("lower and further left is better", fontsize=9, color=_INK)
    n = len(comparison["lasem"]["parameters"]["values"])
    of = f"mean and range of {n} seeds" if n > 1 else "one seed"
    handles, labels = axes[0].get_legend_handles_labels()
    figure.legend(
        handles, labels, loc="outside upper center", ncols=3, frameon=False, fontsize=9, title=of
    )
    figure.savefig(path, dpi=150)


def _mark(axis: Axes, method: str, kept: Spread, worth: Spread) -> None:
    """One method in one panel; accuracies are fractions."""
    if worth["mean"] is None:
        return
    color, marker = _STYLES[method]
    x, y = _scaled(kept, 1e-3), _scaled(worth, 100)
    if len(x["values"]) > 1:
        axis.plot(x["values"], y["values"], marker, color=color, ms=5, mew=0, alpha=0.35)
    axis.errorbar(
        x["mean"], y["mean"], xerr=_bars(x), yerr=_bars(y), fmt="none", color=color,
        capsize=3, lw=1.2,
    )  # fmt: skip
    axis.plot(
        x["mean"], y["mean"], marker, color=color, ms=10, mec="white", mew=0.8,
        label=METHOD_NAMES[method],
    )  # fmt: skip


def _scaled(measure: Spread, factor: float) -> dict[str, Any]:
    values = [factor * value for value in measure["values"].values()]
    return {**{name: factor * measure[name] for name in ("mean", "min", "max")}, "values": values}


def _bars(measure: dict[str, Any]) -> list[list[float]]:
    """From the mean down and up; a mean of equal values may round to just outside of them."""
    down, up = measure["mean"] - measure["min"], measure["max"] - measure["mean"]
    return [[max(0.0, down)], [max(0.0, up)]]


def _bits(label: str, depth: int) -> list[float]:
    stages = label.strip("{}").split(",")
    return [float(str(stage) in stages) for stage in range(1, depth + 1)]
