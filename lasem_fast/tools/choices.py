"""``python -m lasem_fast choices``: which ways levels take; shows, clears and pins measurements."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path

import torch

from lasem_fast.backends import choices, measurements
from lasem_fast.tools import arguments


def main(argv: Sequence[str] | None = None, prog: str | None = None) -> int:
    """Runs one of the actions; returns the exit status."""
    parser = argparse.ArgumentParser(
        prog=prog,
        description="Which of several kernels a level takes. A fixed rule decides; with "
        "LASEM_FAST_CHOICES=measure the fastest one is found by timing and remembered, and "
        "LASEM_FAST_CHOICES=FILE takes what FILE names.",
    )
    actions = parser.add_subparsers(dest="action", metavar="ACTION", required=True)
    actions.add_parser("show", help="what is in force, and what was measured on this machine")
    actions.add_parser("clear", help="forget all measurements")
    pin = actions.add_parser("pin", help="write what was measured here as a file of choices")
    pin.add_argument("file", type=Path, metavar="FILE", help="for LASEM_FAST_CHOICES=FILE")
    pin.add_argument("--threads", type=int, help="measurements with that many CPU threads")
    args = parser.parse_args(argv)
    try:
        if args.action == "show":
            return _show()
        if args.action == "clear":
            print(f"forgotten: {measurements.clear()} measurements")
            return 0
        if args.threads is not None and args.threads < 1:
            raise ValueError(f"--threads: expected at least 1, got {args.threads}")
        with arguments.writing(pin, "FILE", args.file):
            return _pin(args.file, args.threads)
    except (OSError, ValueError) as error:
        parser.error(str(error))


def measured(threads: int | None = None) -> dict[str, dict[str, measurements.Measurement]]:
    """What was measured on this machine's devices, by type of device and level."""
    devices = [torch.device("cpu")]
    devices += [torch.device("cuda", i) for i in range(torch.cuda.device_count())]
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(threads or before)
        machines = [(device.type, measurements.machine(device)) for device in devices]
    finally:
        torch.set_num_threads(before)
    found: dict[str, dict[str, measurements.Measurement]] = {}
    known = measurements.read()
    for kind, machine in machines:
        if machine in known:
            found[kind] = known[machine] | found.get(kind, {})  # of like devices the first
    return found


def described() -> dict[str, str]:
    """What was measured with the present number of threads, in words."""
    words = {}
    for device, levels in measured().items():
        for level, found in levels.items():
            facts = [f"{way} {ms:.3g} ms" for way, ms in found.milliseconds.items()]
            facts += [f"{way} refused: {why}" for way, why in found.refused.items()]
            words[f"{device}, {level}"] = f"{found.way} ({', '.join(facts) or 'only one'})"
    return words


def _show() -> int:
    print(f"in force: {choices.process()}")
    for device, levels in choices.in_force().items():
        for level, way in levels.items():
            print(f"  {device}, {level}: {way}")
    words = described()
    print(f"measured here with {torch.get_num_threads()} threads: {len(words)} levels")
    for level, fastest in words.items():
        print(f"  {level}: {fastest}")
    print(f"kept in: {measurements.cache_file() or 'nowhere, there is no home folder'}")
    return 0


def _pin(file: Path, threads: int | None) -> int:
    found = {
        device: {level: measurement.way for level, measurement in levels.items()}
        for device, levels in measured(threads).items()
    }
    if not found:
        print(
            f"nothing was measured here with {threads or torch.get_num_threads()} threads: train "
            f"with LASEM_FAST_CHOICES=measure first",
            file=sys.stderr,
        )
        return 1
    file.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    print(f"{sum(map(len, found.values()))} levels written; LASEM_FAST_CHOICES={file} pins them")
    return 0
