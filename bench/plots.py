"""The plots of a results file: time against d, times the base learner, scaling with the batch."""

from __future__ import annotations

from collections import defaultdict
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot as plt

from bench.measured import Results
from bench.peers import BASE


def draw(results: Results, folder: Path) -> list[Path]:
    """Writes the three plots as PNG files into ``folder``; returns their paths."""
    folder.mkdir(parents=True, exist_ok=True)
    drawn = [
        ("time_against_d.png", _against(results, "choices", "independent choices d", "batch")),
        ("scaling_with_batch.png", _against(results, "batch", "samples in the mini-batch", "net")),
        ("times_base_learner.png", _times_base(results)),
    ]
    paths = []
    for name, figure in drawn:
        figure.savefig(folder / name, dpi=120, bbox_inches="tight")
        plt.close(figure)
        paths.append(folder / name)
    return paths


def _against(results: Results, axis: str, label: str, fixed: str) -> plt.Figure:
    """Median step time of the CIFAR nets in fp32 against one quantity.

    With the batch fixed it is the smallest there is; with the net fixed it is the shallowest.
    """
    cells = [
        cell
        for cell in results.cells.values()
        if cell.info["net"].startswith("cifar") and cell.info["dtype"] == "fp32"
    ]
    least = min((cell.info[fixed] for cell in cells), default=None)
    lines = defaultdict(list)
    for cell in cells:
        if cell.info[fixed] == least:
            lines[cell.column].append((cell.info[axis], 1e3 * cell.median))
    figure, axes = plt.subplots(figsize=(7, 4.5))
    for column, points in lines.items():
        points.sort()
        axes.plot(*zip(*points, strict=True), marker="o", label=column)
    axes.set_xlabel(label)
    axes.set_ylabel("ms per step")
    axes.set_yscale("log")
    axes.set_title(f"CIFAR nets, fp32, {fixed} {least}")
    if lines:
        axes.legend(fontsize=7, loc="center left", bbox_to_anchor=(1, 0.5))
    return figure


def _times_base(results: Results) -> plt.Figure:
    """Step time over the base learner's, a group of bars per row."""
    columns = [column for column in results.columns() if column != BASE]
    rows = results.rows()
    figure, axes = plt.subplots(figsize=(8, 1 + 0.9 * max(1, len(rows))))
    width = 0.8 / max(1, len(columns))
    for i, column in enumerate(columns):
        times = [results.times_base(row, column) for row in rows]
        places = [j + i * width for j, t in enumerate(times) if t is not None]
        axes.barh(places, [t for t in times if t is not None], width, label=column)
    axes.set_yticks([j + 0.4 - width / 2 for j in range(len(rows))], rows, fontsize=8)
    axes.invert_yaxis()
    axes.set_xscale("log")
    axes.set_xlim(left=1)
    axes.set_xlabel("times the base learner")
    axes.legend(fontsize=7, loc="center left", bbox_to_anchor=(1, 0.5))
    return figure
