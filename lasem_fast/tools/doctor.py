"""``python -m lasem_fast doctor``: what is installed, what can run, and why the rest cannot."""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import os
import platform
import re
from collections.abc import Sequence
from typing import Any

import torch

import lasem_fast
from lasem_fast.backends import choices, measurements
from lasem_fast.search import dispatch
from lasem_fast.tools import subject
from lasem_fast.tools.choices import described
from lasem_fast.tools.stage_ways import stage_ways
from lasem_fast.tools.subject import Subject
from lasem_fast.tools.users_code import UsersError, told_in_one_line

_PACKAGES = ("numpy", "triton", "rich", "matplotlib", "pytest-benchmark", "scikit-learn")
_CPU_FEATURES = (
    "fma3", "avx2", "avx512_f", "avx512_bf16", "avx512_vnni", "amx_tile", "amx_bf16", "neon", "sve",
    "bf16",
)  # fmt: skip


def main(argv: Sequence[str] | None = None, prog: str | None = None) -> int:
    """Prints the diagnosis; returns the exit status."""
    parser = argparse.ArgumentParser(
        prog=prog,
        description=__doc__,
        epilog=subject.HOW_TO_NAME_A_NET,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "net", metavar="NET", nargs="?", help="show which way each stage of this net takes"
    )
    parser.add_argument("--json", action="store_true", help="print JSON in place of text")
    parser.set_defaults(batch=None, groups=None)
    args = parser.parse_args(argv)
    if args.net is None:
        result = diagnose()
    else:
        try:
            with told_in_one_line(args.net):
                result = diagnose(subject.load(args))
        except UsersError as error:
            parser.error(str(error))
    if args.json:
        print(json.dumps(result, indent=1))
        return 0
    for heading, facts in result.items():
        print(f"{heading}:")
        for name, value in facts.items():
            print(f"  {name}: {value}")
    return 0


def diagnose(looked_at: Subject | None = None) -> dict[str, dict[str, Any]]:
    """Versions, backends, build flags and hardware; no paths and no host name.

    Args:
        looked_at: a net, whose stages' ways are told too.
    """
    result = {
        "versions": _versions(),
        "backends": lasem_fast.backends(),
        "PyTorch's build": _build(),
        "CPU": _cpu(),
        "CUDA": _cuda(),
        "ways that levels take (LASEM_FAST_CHOICES)": _choices(),
    }
    if looked_at is not None:
        result[f"ways that the stages of {looked_at.name} take"] = _ways(looked_at)
    return result


def _ways(looked_at: Subject) -> dict[str, str]:
    """Of every stage, with the backend that ``auto`` takes here."""
    backend = dispatch.choose("auto")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    net, (x, _) = looked_at.net.to(device), looked_at.batch_of(1, device)
    ways = stage_ways(net, looked_at.task, backend, x)
    return {"backend": backend, **{f"stage {way.stage}": str(way) for way in ways}}


def _versions() -> dict[str, str]:
    versions = {
        "lasem_fast": lasem_fast.__version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
    }
    for package in _PACKAGES:
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            versions[package] = "not installed"
    return versions


def _build() -> dict[str, Any]:
    config = torch.__config__.show()
    flags = re.search(r"CXX_FLAGS=([^,]*)", config)
    return {
        "compiler": next((s[4:] for line in config.splitlines()
                          if (s := line.strip()).startswith("- GCC")), "unknown"),
        "C++ flags": flags.group(1).strip() if flags else "unknown",
        "C++11 ABI": torch.compiled_with_cxx11_abi(),
        "CUDA": torch.version.cuda or "none",
        "oneDNN": torch.backends.mkldnn.is_available(),
        "MKL": torch.backends.mkl.is_available(),
        "OpenMP": torch.backends.openmp.is_available(),
    }  # fmt: skip


def _cpu() -> dict[str, Any]:
    features = measurements.cpu_features()
    return {
        "architecture": platform.machine(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "used by PyTorch": torch.backends.cpu.get_cpu_capability(),
        "features": ", ".join(name for name in _CPU_FEATURES if features.get(name)) or "unknown",
    }


def _choices() -> dict[str, str]:
    """What decides, and what was measured on this machine's devices so far."""
    try:
        decides = str(choices.process())
    except ValueError:  # its words hold a path
        decides = "LASEM_FAST_CHOICES is not usable: `python -m lasem_fast choices show` says why"
    return {"in force": decides, **described()}


def _cuda() -> dict[str, Any]:
    if not torch.cuda.is_available():
        return {"devices": "none"}
    return {
        f"device {i}": f"{torch.cuda.get_device_name(i)}, compute capability "
        f"{'.'.join(map(str, torch.cuda.get_device_capability(i)))}"
        for i in range(torch.cuda.device_count())
    }
