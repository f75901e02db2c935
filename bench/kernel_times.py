"""``python -m bench.kernel_times``: every kernel's own time inside a captured step.

The profiler's times of the kernels that a replay of the CUDA graph starts, one after another and in
their order: for the level kernels of one family, or as the rule and the measurements choose. The
replay that is timed as a whole runs some of them side by side. Results are added to a
file, ``{row: {family: [[kernel, microseconds], ...]}}``, medians of several replays.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from pathlib import Path
from unittest import mock

import torch
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

from bench import cases, ceilings
from bench.peers import ours_captured
from lasem_fast.backends import plain_torch, side_stream, triton_level, triton_linear_head
from lasem_fast.search import dispatch

FAMILIES = {
    "boxes": (triton_level.TritonLevel(),),
    "gathering": (triton_level.GatherLevel(),),
    "torch": (plain_torch.TorchLevel(),),
    "chosen": None,
}
_REPLAYS = 10


def main(argv: Sequence[str] | None = None) -> int:
    """Profiles rows, prints the slowest kernels and a line per row."""
    parser = argparse.ArgumentParser(prog="python -m bench.kernel_times", description=__doc__)
    parser.add_argument("--row", action="append", help="only rows whose name contains this")
    parser.add_argument("--family", nargs="+", choices=FAMILIES, default=list(FAMILIES))
    parser.add_argument("--most", type=int, default=12, help="kernels to print")
    parser.add_argument("--out", type=Path, required=True, metavar="FILE", help="JSON")
    args = parser.parse_args(argv)
    found = json.loads(args.out.read_text()) if args.out.exists() else {}
    status = 0
    for case in cases.gpu("cuda"):
        if args.row and not any(part in case.id for part in args.row):
            continue
        for family in args.family:
            try:
                kernels, wall = profiled(case, family)
            except Exception as error:  # one that does not run must not end the others
                print(f"{case.id}, {family}: {type(error).__name__}: {error}")
                status = 1
                continue
            found.setdefault(case.id, {})[family] = kernels
            args.out.write_text(json.dumps(found, indent=1))
            total = sum(time for _, time in kernels)
            print(f"{case.id}, {family}: {len(kernels)} kernels, {total:.1f} us in them, "
                  f"{wall:.1f} us a replay")  # fmt: skip
            for name, time in sorted(kernels, key=lambda k: -k[1])[: args.most]:
                print(f"  {time:9.2f}  {name[:100]}")
    return status


def profiled(case: cases.Case, family: str) -> tuple[list[tuple[str, float]], float]:
    """The kernels of a captured step with their times, and a replay's, in microseconds."""
    ceilings.set_tf32(case.dtype == "tf32")
    levels = FAMILIES[family]
    forced = mock.patch.object(dispatch, "_ON_GPU", levels) if levels else nullcontext()
    head = nullcontext()
    if family == "gathering":
        head = mock.patch.object(triton_linear_head, "_OPERATION", *levels)
    one_by_one = mock.patch.object(side_stream, "_captured_stream", return_value=None)
    with forced, head:
        wall = _microseconds(ours_captured(case.problem(), backend="triton").step)
        with one_by_one:
            step = ours_captured(case.problem(), backend="triton").step
    with profile(activities=[ProfilerActivity.CUDA]) as profiler:
        for _ in range(_REPLAYS):
            step()
        torch.cuda.synchronize()
    events = [e for e in profiler.events() if e.device_type == DeviceType.CUDA]
    events.sort(key=lambda event: event.time_range.start)
    names = [event.name for event in events]
    count, left = divmod(len(events), _REPLAYS)
    if left or any(names[i] != names[i % count] for i in range(len(names))):
        raise RuntimeError(f"expected {_REPLAYS} equal replays, got {len(events)} kernels")
    times = [event.time_range.elapsed_us() for event in events]
    return [(names[i], statistics.median(times[i::count])) for i in range(count)], wall


def _microseconds(step: Callable[[], object], repeats: int = 30) -> float:
    step()
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    for _ in range(repeats):
        step()
    end.record()
    end.synchronize()
    return 1e3 * start.elapsed_time(end) / repeats


if __name__ == "__main__":
    sys.exit(main())
