"""The paper's figures 1, 4, 5 and 6 from runs, for print and for every kind of colour vision."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure  # without pyplot: no global state

from lasem_fast import metrics
from lasem_fast.experiments.reading import Experiment, Method
from lasem_fast.experiments.variants import configuration_name

# Okabe and Ito's colours, told apart with every colour vision; never without another mark
_BLACK, _ORANGE, _SKY, _GREEN, _YELLOW, _BLUE, _RED, _PURPLE = (
    "#000000", "#E69F00", "#56B4E9", "#009E73", "#F0E442", "#0072B2", "#D55E00", "#CC79A7",
)  # fmt: skip
_STYLES = (
    (_BLUE, "o", "-"), (_RED, "s", "--"), (_GREEN, "^", "-."), (_PURPLE, "D", ":"),
    (_ORANGE, "v", (0, (5, 1))), (_BLACK, "P", (0, (1, 1))), (_SKY, "X", (0, (3, 1, 1, 1))),
)  # fmt: skip
PEAK = "peak_accuracy"


def draw(experiments: Sequence[Experiment], out: Path) -> list[Path]:
    """Draws every figure that there are runs for, as PNG and PDF; gives the files."""
    written = []
    for name, function in (
        ("figure1", _static_configurations), ("figure4", _ranges),
        ("figure5", _share_frequencies), ("figure6", _ablation),
    ):  # fmt: skip
        figure = function(experiments)
        if figure is not None:
            for suffix in (".png", ".pdf"):
                figure.savefig(out / f"{name}{suffix}", dpi=200)
                written.append(out / f"{name}{suffix}")
    return written


def _panels(experiments: Sequence[Experiment]) -> list[tuple[Experiment, str, list[Method]]]:
    """Experiments and mechanisms that have static configurations, and a search or not."""
    found = []
    for experiment in experiments:
        for transfer in experiment.transfers:
            static = [m for m in experiment.of_kind("static", transfer) if m.interval(PEAK)]
            if static:
                found.append((experiment, transfer, static))
    return found


def _static_configurations(experiments: Sequence[Experiment]) -> Figure | None:
    """Figure 1: peak accuracy of every static configuration, with the search as a line."""
    panels = _panels(experiments)
    if not panels:
        return None
    most = max(len(static) for _, _, static in panels)
    figure, axes = _figure(len(panels), 1.8 + 0.45 * most)
    for axis, (experiment, transfer, static) in zip(axes, panels, strict=True):
        names = [_configuration(m) for m in static]
        _with_intervals(axis, range(len(static)), static, _STYLES[0], "static configuration")
        _line(axis, experiment.lasem(transfer), _RED, "--", "LASEM")
        for brute in experiment.of_kind("brute-force", transfer)[:1]:
            whole = brute.n_tasks == static[0].n_tasks
            label = "brute force" if whole else f"brute force, first {brute.n_tasks} tasks"
            _line(axis, brute, _GREEN, "-.", label)
        axis.set_xticks(range(len(names)), names, rotation=45, ha="right")
        axis.set_title(f"{experiment.name}, {transfer}", fontsize=10)
        axis.set_ylabel("peak per-task accuracy, %")
    _legend(figure, axes)
    return figure


def _ranges(experiments: Sequence[Experiment]) -> Figure | None:
    """Figure 4: the range of the static configurations, with the search, case by case."""
    panels = [p for p in _panels(experiments) if p[0].lasem(p[1]) is not None]
    if not panels:
        return None
    figure, (axis,) = _figure(1, 2.0 + 0.9 * len(panels))
    for i, (_, _, static) in enumerate(panels):
        means = [100 * m.interval(PEAK).mean for m in static]
        label = "static configurations" if i == 0 else None
        axis.plot([i, i], [min(means), max(means)], color=_SKY, lw=7, alpha=0.5,
                  solid_capstyle="butt", label=label and "their range")  # fmt: skip
        axis.plot([i] * len(means), means, "_", color=_BLUE, ms=14, mew=1.6, label=label)
    search = [experiment.lasem(transfer) for experiment, transfer, _ in panels]
    _with_intervals(axis, range(len(panels)), search, (_RED, "D", ""), "LASEM")
    names = [f"{experiment.name}\n{transfer}" for experiment, transfer, _ in panels]
    axis.set_xticks(range(len(names)), names)
    axis.set_xlim(-0.6, len(panels) - 0.4)
    axis.set_ylabel("peak per-task accuracy, %")
    _legend(figure, [axis])
    return figure


def _share_frequencies(experiments: Sequence[Experiment]) -> Figure | None:
    """Figure 5: how often each layer is shared in the configurations that the search keeps."""
    with_search = [e for e in experiments if e.of_kind("lasem")]
    if not with_search:
        return None
    figure, axes = _figure(len(with_search), 3.6)
    for axis, experiment in zip(axes, with_search, strict=True):
        searches = experiment.of_kind("lasem")
        for i, (search, style) in enumerate(zip(searches, _STYLES, strict=False)):
            per_seed = np.array([r.share_frequency for r in search.records.values()])
            stages = np.arange(1, per_seed.shape[1] + 1)
            found = [metrics.mean_interval(column) for column in per_seed.T]
            halves = [0.0 if f.n == 1 else f.half for f in found]
            color, marker, line = style
            beside = 0.08 * (i - (len(searches) - 1) / 2)  # so that no interval hides another
            axis.errorbar(
                stages + beside, [f.mean for f in found], halves,
                color=color, marker=marker, ls=line, ms=6, capsize=3, label=search.label,
            )  # fmt: skip
        axis.set_xticks(stages)
        axis.set_ylim(-0.03, 1.03)
        axis.set_xlabel("layer (1 is next to the input)")
        axis.set_ylabel("share frequency")
        axis.set_title(experiment.name, fontsize=10)
    _legend(figure, axes)
    return figure


def _ablation(experiments: Sequence[Experiment]) -> Figure | None:
    """Figure 6: peak accuracy against the probability P that is held on one configuration."""
    with_ablation = [e for e in experiments if e.of_kind("fixed-probability")]
    if not with_ablation:
        return None
    figure, axes = _figure(len(with_ablation), 4.2)
    for axis, experiment in zip(axes, with_ablation, strict=True):
        series: dict[str, list[Method]] = {}
        for method in experiment.of_kind("fixed-probability"):
            series.setdefault(f"{_configuration(method)} {method.transfer}", []).append(method)
        for (name, methods), style in zip(series.items(), _STYLES, strict=False):
            methods.sort(key=lambda m: m.settings["method"]["probability"])
            at = [m.settings["method"]["probability"] for m in methods]
            _with_intervals(axis, at, methods, style, f"P on {name}", joined=True)
        transfer = experiment.of_kind("fixed-probability")[0].transfer
        _line(axis, experiment.lasem(transfer), _BLACK, (0, (1, 1)), "LASEM")
        axis.set_xlabel("P")
        axis.set_ylabel("peak per-task accuracy, %")
        axis.set_title(experiment.name, fontsize=10)
    _legend(figure, axes)
    return figure


def _figure(panels: int, width: float) -> tuple[Figure, list[Axes]]:
    figure = Figure(figsize=(width * panels, 3.4), layout="constrained")
    axes = list(figure.subplots(1, panels, squeeze=False).flat)
    for axis in axes:
        axis.spines[["top", "right"]].set_visible(False)
        axis.grid(axis="y", color="#dddddd", lw=0.6)
        axis.set_axisbelow(True)
    return figure, axes


def _legend(figure: Figure, axes: Sequence[Axes]) -> None:
    """One for all panels, above them, where it covers no point."""
    found = {}
    for axis in axes:
        handles, labels = axis.get_legend_handles_labels()
        found |= dict(zip(labels, handles, strict=True))
    figure.legend(
        found.values(), found.keys(), loc="outside upper center", ncols=2, frameon=False, fontsize=8
    )


def _with_intervals(
    axis: Axes, at: Sequence[float], methods: Sequence[Method], style: tuple, label: str,
    joined: bool = False,
) -> None:  # fmt: skip
    """Means of peak accuracies in %, with their 95% intervals where there are several seeds."""
    found = [method.interval(PEAK) for method in methods]
    color, marker, line = style
    axis.errorbar(
        list(at), [100 * f.mean for f in found], [0.0 if f.n == 1 else 100 * f.half for f in found],
        color=color, marker=marker, ls=line if joined else "none", ms=6, capsize=3, label=label,
    )  # fmt: skip


def _line(axis: Axes, method: Method | None, color: str, style: object, label: str) -> None:
    """A method's mean as a horizontal line, its interval as a band."""
    found = None if method is None else method.interval(PEAK)
    if found is None:
        return
    axis.axhline(100 * found.mean, color=color, ls=style, lw=1.6, label=label)
    if found.n > 1:
        low, high = 100 * (found.mean - found.half), 100 * (found.mean + found.half)
        axis.axhspan(low, high, color=color, alpha=0.12, lw=0)


def _configuration(method: Method) -> str:
    depth = max(len(task.config) for record in method.records.values() for task in record.tasks)
    return configuration_name(method.settings["method"]["config"], depth)
