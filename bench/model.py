"""What every kernel of a training step should take on a GPU, beside what it took.

    python -m bench.model [--row TEXT ...] [--kernels] [--boxes] [--results FILE]
        [--kernel-times FILE] [ceilings]

Needs no GPU: launches are recorded on the CPU, compiled for sm_90 (minutes the first time) and
timed by the formulas of :mod:`bench.time_model`. ``FILE`` is ``bench.json`` of ``bench/on_gpu.sh``:
the captured step of each row; the kernels' own times are from ``bench.kernel_times``.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

from bench.cases import Case, gpu
from bench.compiling import Launch, machine_code, specialised
from bench.recording import step_launches
from bench.time_model import Ceilings, Prediction, predict

_CAPABILITY = 90
_COLUMN = "lasem_fast triton, captured"
# No kernel behind it; a zero that a graph takes in as it is.
_FREE = {"_unsafe_view", "clone"}


def main(arguments: list[str] | None = None) -> None:
    """Prints a table of kernels per row, and a line per row."""
    parser = argparse.ArgumentParser(
        prog="python -m bench.model",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--row", action="append", help="only rows whose name contains this")
    parser.add_argument("--results", type=Path, help="bench.json of bench/on_gpu.sh")
    parser.add_argument("--kernels", action="store_true", help="a line for every kernel")
    parser.add_argument("--kernel-times", type=Path, help="what bench.kernel_times wrote")
    parser.add_argument("--boxes", action="store_true", help="levels that read boxes (TMA)")
    for name, default in Ceilings()._asdict().items():
        parser.add_argument(f"--{name}", type=type(default), default=default, help=f"({default})")
    options = parser.parse_args(arguments)
    ceilings = Ceilings(*(getattr(options, name) for name in Ceilings._fields))
    results, times = (
        json.loads(file.read_text()) if file else {}
        for file in (options.results, options.kernel_times)
    )
    cases = [c for c in gpu("cuda") if not options.row or any(part in c.id for part in options.row)]
    for case in cases:
        report(case, ceilings, results, times, options.kernels, options.boxes)


def report(
    case: Case,
    ceilings: Ceilings,
    results: dict[str, Any],
    times: dict[str, Any],
    kernels: bool,
    boxes: bool,
) -> None:
    """Prints what a row should take and, where that is known, what it took."""
    launches, others = step_launches(case, boxes, captured=True)
    forms = [specialised(launch) for launch in launches]
    found = [
        predict(launch, machine_code(form, _CAPABILITY), ceilings)
        for launch, form in zip(launches, forms, strict=True)
    ]
    names = {launch.kernel.__name__ for launch in launches}
    found_times = times.get(case.id, {}).get("boxes" if boxes else "gathering", [])
    measured = [time for name, time in found_times if name in names]
    if len(measured) != len(launches):
        measured = [None] * len(launches)
    if kernels:
        print(_HEADER)
        for line in zip(launches, found, measured, strict=True):
            print(_line(*line))
    pytorch = sum(count for name, count in others.items() if name not in _FREE)
    total = sum(p.total for p in found) + pytorch * ceilings.node
    took = step_microseconds(case, results)
    print(
        f"{case.id}: {len(launches)} launches of {len(set(forms))} kernels, {pytorch} of PyTorch, "
        f"{sum(p.flops for p in found) / 1e9:.0f} GFLOP in tiles; predicted {total:.0f} us"
        + ("" if took is None else f", took {took:.0f} us ({took / total:.1f}x)"),
        flush=True,
    )


_HEADER = (
    f"{'kernel':24} {'grid':>16} {'tile':>16} {'GFLOP':>7} {'issue':>7} {'tensor':>7} "
    f"{'L2':>7} {'DRAM':>7} {'adding':>7} {'us':>7} {'took':>7}"
)


def _line(launch: Launch, found: Prediction, took: float | None) -> str:
    a = launch.arguments
    sides = ("IMAGES", "BOX_H", "BOX_W", "ROWS", "COLUMNS", "DEPTH")
    tile = "x".join(str(a[side]) for side in sides if side in a)
    times = found.issue, found.tensor, found.l2, found.memory, found.adding, found.total
    return (
        f"{launch.kernel.__name__.removesuffix('_kernel'):24} "
        f"{'x'.join(map(str, launch.grid)):>16} {tile:>16} {found.flops / 1e9:7.2f} "
        + " ".join(f"{time:7.2f}" for time in times)
        + (f" {'-':>7}" if took is None else f" {took:7.2f}")
    )


def step_microseconds(case: Case, results: dict[str, Any]) -> float | None:
    """What the captured step of a row took at best; None where it is not in the results."""
    for entry in results.get("benchmarks", []):
        info = entry["extra_info"]
        if (info["row"], info["column"]) == (case.id, _COLUMN):
            return 1e6 * min(info["seconds"])
    return None


if __name__ == "__main__":
    main(sys.argv[1:])
