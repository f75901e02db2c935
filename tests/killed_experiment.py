"""Workers of an experiment in processes of their own, which a test may kill."""

from __future__ import annotations

from pathlib import Path

import torch

from lasem_fast.experiments.config import tomllib
from lasem_fast.experiments.work import work

_TIMES = ("times.json", "times.csv")


def run(config: str, out: str) -> None:
    """Works on an experiment to its end."""
    torch.set_num_threads(1)
    work(tomllib.loads(config), out)


def contents(out: Path) -> dict[str, bytes]:
    """All files of a finished experiment but locks and wall-clock times."""
    files = [path for path in sorted(out.rglob("*")) if path.is_file()]
    return {
        str(path.relative_to(out)): path.read_bytes()
        for path in files
        if path.name not in _TIMES and "locks" not in path.parts and path.suffix != ".lock"
    }
