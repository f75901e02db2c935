"""``python -m lasem_fast COMMAND``: a command's module is imported only when it is asked for."""

from __future__ import annotations

import argparse
import importlib
import io
import sys
from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Command:
    """A sub-command: ``module`` has ``main(argv, prog) -> int``, the exit status."""

    module: str
    help: str
    extra: str = ""  # the pip extra that installs what it needs
    needs: tuple[tuple[str, str], ...] = ()  # of that extra: (module, project on PyPI)


_DEMO = (
    ("sklearn", "scikit-learn"), ("matplotlib", "matplotlib"), ("rich", "rich"),
    ("joblib", "joblib"),
)  # fmt: skip
_EXPERIMENTS = (
    ("pydantic", "pydantic"), ("joblib", "joblib"), ("tomli", "tomli"), ("rich", "rich"),
    ("matplotlib", "matplotlib"), ("scipy", "scipy"),
)  # fmt: skip
COMMANDS = {
    "demo": Command(
        "lasem_fast.demo.run",
        "a sequence of small image tasks: search against static sharing, tables, plots, timing",
        extra="demo",
        needs=_DEMO,
    ),
    "run": Command(
        "lasem_fast.experiments.run",
        "train the methods and seeds of a config; goes on where it was interrupted",
        extra="experiments",
        needs=_EXPERIMENTS,
    ),
    "report": Command(
        "lasem_fast.experiments.report",
        "tables and figures in the paper's shape from the folders of runs",
        extra="experiments",
        needs=_EXPERIMENTS,
    ),
    "overhead": Command(
        "lasem_fast.tools.overhead",
        "what an EM step costs: time per phase, beside a plain step and the naive loop",
        extra="bench",
        needs=(("rich", "rich"),),
    ),
    "plan": Command(
        "lasem_fast.tools.plan",
        "what a search would cost before it is run, and which groups fit a budget",
        extra="bench",
        needs=(("rich", "rich"),),
    ),
    "doctor": Command(
        "lasem_fast.tools.doctor", "versions, backends and why not, build flags, CPU features"
    ),
    "choices": Command(
        "lasem_fast.tools.choices", "which kernels levels take: show, clear or pin measurements"
    ),
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run one sub-command; returns its exit status."""
    for stream in (sys.stdout, sys.stderr):
        # a terminal of ASCII only shows "?" for what it lacks, in place of a traceback
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")
    parser = argparse.ArgumentParser(prog="python -m lasem_fast")
    subparsers = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    for name, command in COMMANDS.items():
        # The command's own parser answers --help; it is not known here without an import.
        subparsers.add_parser(name, help=command.help, add_help=False)
    args, rest = parser.parse_known_args(argv)
    command = COMMANDS[args.command]
    prog = f"{parser.prog} {args.command}"
    try:
        return importlib.import_module(command.module).main(rest, prog=prog)
    except KeyboardInterrupt:
        print(f"{prog}: interrupted", file=sys.stderr)
        return 130  # as a shell has it
    except ModuleNotFoundError as error:
        missing = dict(command.needs).get((error.name or "").partition(".")[0])
        if missing is None:
            raise
        print(f"{prog} needs {missing}: pip install lasem_fast[{command.extra}]", file=sys.stderr)
        return 1


if __name__ == "__main__":
    sys.exit(main())
