"""``python -m lasem_fast run``: trains all that a config asks for, or goes on with it."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import joblib
from filelock import FileLock
from rich.console import Console

from lasem_fast.experiments import config, curves, display, results
from lasem_fast.experiments.config import ConfigError
from lasem_fast.experiments.experiment import Experiment
from lasem_fast.experiments.prediction import predict
from lasem_fast.experiments.work import work
from lasem_fast.lifelong.run_checks import checked_device
from lasem_fast.tools import arguments


def main(argv: Sequence[str] | None = None, prog: str | None = None) -> int:
    """Runs an experiment; returns the exit status: 0, or 1 if a run failed."""
    parser = argparse.ArgumentParser(
        prog=prog,
        description="Train all methods and seeds of a config. Started again, also after an "
        "interruption, it goes on where it was; several of them may work on one folder.",
    )
    add = parser.add_argument
    add("config", type=Path, metavar="CONFIG.toml", help="see docs/experiments.md")
    add("--out", type=Path, metavar="DIR", help="in place of the config's out")
    add("--root", metavar="DIR", help="in place of the config's data.root")
    add("--workers", type=arguments.positive, metavar="N", help="in place of the config's workers")
    add("--plan", action="store_true", help="say what would be run and for how long, and stop")
    args = parser.parse_args(argv)
    try:
        return _run(args, Console())
    except ConfigError as error:
        parser.error(f"{args.config}:\n{error}")


def _run(args: argparse.Namespace, console: Console) -> int:
    plain = _changed(config.read(args.config), args)
    experiment = Experiment.of(plain, args.out, planned=args.plan)
    _check_machine(experiment)
    seconds = predict(experiment)
    console.print(display.heading(experiment, seconds), markup=False, highlight=False)
    console.print(display.plan_table(experiment, seconds))
    if args.plan:
        return 0
    _begin(experiment)
    try:
        with display.shown(console, experiment, seconds):
            _work(experiment, plain)
    except KeyboardInterrupt:
        print("Interrupted; the same command goes on from here.", file=sys.stderr)
        return 130  # as a shell has it
    with _writing(experiment), FileLock(experiment.out / "locks" / "tables.lock"):
        results.write_tables(experiment)
    failed = [unit for unit in experiment.units() if not unit.finished]
    for unit in failed:
        print(f"{unit.variant.label}, seed {unit.seed} failed: {_reason(unit.folder)}",
              file=sys.stderr)  # fmt: skip
    console.print(
        f"Written: {experiment.out} (python -m lasem_fast report {experiment.out})",
        markup=False, highlight=False, soft_wrap=True,
    )  # fmt: skip
    return 1 if failed else 0


def _changed(plain: dict[str, Any], args: argparse.Namespace) -> dict[str, Any]:
    """The config with what the command line says."""
    if args.workers is not None:
        plain["workers"] = args.workers
    if args.root is not None and isinstance(plain.get("data"), dict):
        plain["data"]["root"] = args.root
    return plain


def _check_machine(experiment: Experiment) -> None:
    """Refuses what cannot be used here, before anything is begun."""
    checked = experiment.config
    try:
        checked_device(checked.device)
        if checked.workers > 1:
            with joblib.parallel_config(backend=checked.joblib_backend):
                pass
    except RuntimeError as error:
        raise ConfigError(str(error)) from error
    except (ImportError, ValueError) as error:
        reason = str(error).strip().partition("\n")[0]
        raise ConfigError(
            f"joblib_backend: expected one that joblib can use here, got "
            f"{checked.joblib_backend!r} ({reason})"
        ) from error
    if checked.tensorboard:
        curves.writer_class()


def _begin(experiment: Experiment) -> None:
    """Makes the folders, with what each run is; those that have ended can be read."""
    with _writing(experiment):
        (experiment.out / "locks").mkdir(parents=True, exist_ok=True)
        with FileLock(experiment.out / "locks" / "settings.lock"):
            for unit in experiment.units():
                results.write_settings(experiment, unit)
                if unit.finished:
                    results.rows_of(unit)


@contextmanager
def _writing(experiment: Experiment) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise ConfigError(
            f"out: expected a folder that can be written, got {str(experiment.out)!r} "
            f"({error.strerror or error})"
        ) from error


def _work(experiment: Experiment, plain: dict[str, Any]) -> None:
    workers = experiment.config.workers
    if workers == 1:
        work(plain, str(experiment.out))
        return
    with joblib.parallel_config(backend=experiment.config.joblib_backend):
        joblib.Parallel(n_jobs=workers)(
            joblib.delayed(work)(plain, str(experiment.out)) for _ in range(workers)
        )


def _reason(folder: Path) -> str:
    path = folder / "error.txt"
    if not path.exists():
        return "another process has not ended it"
    return f"{path.read_text(encoding='utf-8').strip().splitlines()[-1]} (more in {path})"


if __name__ == "__main__":
    sys.exit(main())
