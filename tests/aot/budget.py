"""What every launch may take on every architecture; run as a script, writes the budget anew.

python tests/aot/budget.py [NAME ...]    (only launches whose names contain one of these)
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import box_launches
import dropout_launches
import head_launches
import level_launches

from bench.compiling import Footprint, Launch, compile_launch

BUDGET = Path(__file__).with_name("budget.json")
# Compute capability, and the shared memory that a block may have there.
ARCHITECTURES = {80: 163 * 1024, 90: 227 * 1024}
_SOURCES = (level_launches, box_launches, head_launches, dropout_launches)


def launches() -> dict[str, Launch]:
    """Every launch of every kernel, by name."""
    return {name: launch for source in _SOURCES for name, launch in source.launches().items()}


def jobs(parts: Sequence[str] = ("",)) -> list[tuple[str, int]]:
    """Names that contain one of the parts, with every architecture that they are for."""
    only_90 = set(box_launches.launches())
    return [
        (name, capability)
        for name in launches()
        for capability in ARCHITECTURES
        if (name not in only_90 or capability == 90) and any(part in name for part in parts)
    ]


def uses_tensor_cores(launch: Launch) -> bool:
    """Whether the launch has a matrix product that is not in float32."""
    if launch.kernel.__name__ in ("box_forward_kernel", "box_dgrad_kernel", "box_wgrad_kernel"):
        return True
    precision = launch.arguments.get("PRECISION")
    operand = next((launch.arguments[n] for n in ("y", "dy", "x") if n in launch.arguments), None)
    return precision == "tf32" or (precision is not None and operand.element_size() == 2)


def compile_all(parts: Sequence[str] = ("",)) -> dict[str, Footprint]:
    """Footprints by name and architecture, compiled in as many processes as there are cores."""
    wanted = jobs(parts)
    with ProcessPoolExecutor(len(os.sched_getaffinity(0))) as pool:
        footprints = pool.map(_compile, wanted, chunksize=4)
        return {f"{n}/sm_{c}": f for (n, c), f in zip(wanted, footprints, strict=True)}


_launches: dict[str, Launch] = {}


def _compile(job: tuple[str, int]) -> Footprint:
    if not _launches:
        _launches.update(launches())
    name, capability = job
    return compile_launch(_launches[name], capability)


if __name__ == "__main__":
    listed = {f"{name}/sm_{capability}" for name, capability in jobs()}
    before = json.loads(BUDGET.read_text()) if BUDGET.exists() else {}
    entries = {name: entry for name, entry in before.items() if name in listed} | {
        name: {"registers": footprint.registers, "shared": footprint.shared}
        for name, footprint in compile_all(sys.argv[1:] or [""]).items()
    }
    lines = (f"  {json.dumps(name)}: {json.dumps(entries[name])}" for name in sorted(entries))
    BUDGET.write_text("{\n" + ",\n".join(lines) + "\n}\n")
