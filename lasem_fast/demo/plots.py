"""The demo's two plots of a search."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure  # without pyplot: Agg, and no global state

from lasem_fast.lifelong import RunRecord

_INK = "#222222"


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
    figure.suptitle("Posterior of each configuration (dashed: the one kept)", color=_INK)
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
    axis.spines[["top", "right"]].set_visible(False)
    figure.legend(loc="outside upper center", ncols=2, frameon=False, fontsize=9)
    figure.savefig(path, dpi=150)


def _bits(label: str, depth: int) -> list[float]:
    stages = label.strip("{}").split(",")
    return [float(str(stage) in stages) for stage in range(1, depth + 1)]
