"""What the demo's methods came to over several seeds: figures, a sentence, README's table."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from lasem_fast import metrics
from lasem_fast.lifelong import METHODS, RunRecord

METHOD_NAMES = {"lasem": "LASEM", "all": "all shared", "none": "nothing shared"}

Runs = Mapping[int, Mapping[str, RunRecord]]
"""By seed and method."""
Spread = dict[str, Any]
"""``mean``, ``min`` and ``max`` over seeds, and ``values`` by seed; None where it is undefined."""
Comparison = dict[str, dict[str, Spread]]
"""By method and measure: those of `RunRecord.summary`, the gain, and the parameters kept."""


class Shown(NamedTuple):
    """Mean and range as text; no range where its ends read alike."""

    mean: str
    range: tuple[str, str] | None


def compare(runs: Runs) -> Comparison:
    """Every measure of every method over the seeds there are runs of."""
    comparison: Comparison = {}
    for method in METHODS:
        by_seed = {
            str(seed): _measures(of_seed[method], of_seed.get("none"))
            for seed, of_seed in runs.items()
            if method in of_seed
        }
        if by_seed:
            names = next(iter(by_seed.values()))
            comparison[method] = {
                name: spread({seed: values[name] for seed, values in by_seed.items()})
                for name in names
            }
    return comparison


def spread(values: dict[str, float | None]) -> Spread:
    """Mean and range of a measure that is given by seed."""
    known = [value for value in values.values() if value is not None]
    if len(known) < len(values):  # a mean over other seeds than those of its neighbours misleads
        return {"mean": None, "min": None, "max": None, "values": values}
    return {
        "mean": statistics.mean(known), "min": min(known), "max": max(known), "values": values
    }  # fmt: skip


def verdict(comparison: Comparison) -> str:
    """In how many seeds the search was ahead: of sharing all, and of sharing nothing."""
    n = f"{len(comparison['lasem']['average_accuracy']['values'])} seeds"
    lasem, everything, nothing = (comparison[method] for method in METHODS)
    ahead = _count(lasem, nothing, "average_accuracy", lambda a, b: a > b)
    accurate = f"more accurate after the last task than nothing shared in {ahead} of {n}"
    if lasem["forgetting"]["mean"] is None:
        return f"LASEM was {accurate}."
    less = _count(lasem, everything, "forgetting", lambda a, b: a < b)
    return f"LASEM forgot less than all shared in {less} of {n} and was {accurate}."


def markdown(comparison: Comparison) -> str:
    """README's table: mean and range over the seeds, accuracies and forgetting in %."""
    lines = [
        "| | peak accuracy | after the last task | forgetting | parameters kept |",
        "| --- | --: | --: | --: | --: |",
    ]
    for method, measures in comparison.items():
        shown = (
            *(percent(measures[name]) for name in ("peak_accuracy", "average_accuracy")),
            percent(measures["forgetting"]),
            thousands(measures["parameters"]),
        )
        lines.append(f"| {METHOD_NAMES[method]} | {' | '.join(map(_in_one_line, shown))} |")
    return "\n".join(lines)


def percent(measure: Spread) -> Shown:
    """A fraction in %."""
    return _shown(measure, lambda value: f"{100 * value:.1f}")


def ratio(measure: Spread) -> Shown:
    """A ratio with two digits."""
    return _shown(measure, lambda value: f"{value:.2f}")


def thousands(measure: Spread) -> Shown:
    """A count, in thousands."""
    return _shown(measure, lambda value: f"{value / 1e3:.0f}k")


def _shown(measure: Spread, shown: Callable[[float], str]) -> Shown:
    if measure["mean"] is None:
        return Shown("-", None)
    mean, low, high = (shown(measure[name]) for name in ("mean", "min", "max"))
    return Shown(mean, None if low == high else (low, high))


def _in_one_line(shown: Shown) -> str:
    return shown.mean if shown.range is None else f"{shown.mean} ({' to '.join(shown.range)})"


def _count(
    a: dict[str, Spread], b: dict[str, Spread], name: str, ahead: Callable[[float, float], bool]
) -> int:
    values, others = a[name]["values"], b[name]["values"]
    return sum(ahead(values[seed], others[seed]) for seed in values)


def _measures(run: RunRecord, alone: RunRecord | None) -> dict[str, float | None]:
    return {
        **run.summary(),
        "gain_over_no_transfer": _gain(run, alone),
        "parameters": run.parameters,
    }


def _gain(run: RunRecord, alone: RunRecord | None) -> float | None:
    """None for one task, and before both runs have ended."""
    if alone is None or len(run.tasks) != len(alone.tasks):
        return None
    gain = metrics.gain(run.accuracy_matrix(), alone.accuracy_matrix().diagonal())
    return gain if gain == gain else None
