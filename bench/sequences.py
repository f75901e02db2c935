"""``python -m bench.sequences``: on which sequences of real images does selective sharing win?

    python -m bench.sequences --out bench/results/sequences.json --workers 2 \\
        --root /usr/share/datasets/fashion-mnist

The rule. Selective sharing wins on a sequence if LASEM's test accuracy after the last task, the
average over the tasks, is above that of both others (all stages shared, no stage shared), each
with a paired 95% interval of Student's t over the seeds that lies above 0. It loses if one of the
two intervals lies below 0; otherwise the sequence is undecided.

The sequences, a list that stands before anything is run; all of them are reported. Each has 6
tasks of the demo (`lasem_fast.demo.data`: other classes and other noise in each), 30 epochs of
mini-batches of 16 with Adam at 1e-3, the demo's net of four stages, seeds 0 to 4. "4 x 10": four
classes a task, ten training images a class.

=======  ======  ============  ================================================================
data     size    transformed   why
=======  ======  ============  ================================================================
digits   4 x 10  every way     the demo's tasks: which stages are worth sharing differs
digits   4 x 10  as is         tasks differ in classes and noise only
digits   4 x 10  late alike    as is or inverted: a stage 1 with the opposite sign makes the same
                               of an inverted image, so that all later stages can be shared
digits   4 x 20  late alike    the same with more images
digits   4 x 5   as is         few images, for which transfer should be worth more
digits   8 x 4   as is         few images a class, and most classes return
fashion  4 x 8   every way     as above, on Fashion-MNIST's 28 x 28 pixels (with ``--root``)
fashion  4 x 8   as is
fashion  4 x 8   late alike
fashion  2 x 16  as is         easy tasks
fashion  8 x 4   as is
=======  ======  ============  ================================================================

Where LASEM is in truth no better than the better one of the others, it wins by chance with a
probability of at most 2.5% (of normal differences). There are eleven tries: a single win has to be
seen again with other seeds (``--first-seed 5``, another file) before it means anything.

What is in the file already is not run again: the search can be broken off and go on.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import joblib
import numpy as np
import torch

import lasem_fast
from bench import candidates, machine
from bench.candidates import Candidate
from bench.report import markdown
from lasem_fast import metrics
from lasem_fast.demo.comparison import METHOD_NAMES
from lasem_fast.demo.training import BATCH_SIZE, LEARNING_RATE
from lasem_fast.lifelong import METHODS
from lasem_fast.lifelong.checkpoints import write_text
from lasem_fast.tools import arguments

Unit = tuple[Candidate, int]
"""A sequence and a seed."""


def main(argv: Sequence[str] | None = None) -> int:
    """Runs what is left, writes it down run by run and prints the table."""
    parser = argparse.ArgumentParser(
        prog="python -m bench.sequences", description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    add = parser.add_argument
    add("--out", type=Path, required=True, metavar="FILE", help="a JSON file; goes on with it")
    add("--root", type=Path, metavar="DIR", help="of Fashion-MNIST's four idx files")
    add("--seeds", type=arguments.positive, default=5)
    add("--first-seed", type=arguments.seed, default=0)
    add("--workers", type=arguments.positive, default=1, help="processes, each with one thread")
    add("--only", nargs="+", metavar="NAME", choices=[c.name for c in candidates.CANDIDATES])
    args = parser.parse_args(argv)
    chosen = [
        candidate
        for candidate in candidates.CANDIDATES
        if (candidate.data == "digits" or args.root) and candidate.name in (args.only or _names())
    ]
    seeds = range(args.first_seed, args.first_seed + args.seeds)
    torch.set_num_threads(1)
    try:
        found = _read(args.out)
        if any(candidate.data == "fashion" for candidate in chosen):
            candidates.images("fashion", args.root, seeds[0])
        _write(args.out, found)
    except (OSError, ValueError) as error:
        parser.error(str(error))
    left = [
        (candidate, seed)
        for seed in seeds  # all sequences with the first seed, and so on
        for candidate in chosen
        if str(seed) not in found["runs"].get(candidate.name, {})
    ]
    try:
        for number, (candidate, seed, run) in enumerate(_run_all(left, args.root, args.workers), 1):
            found["runs"].setdefault(candidate.name, {})[str(seed)] = run
            _write(args.out, found)
            print(f"{number} of {len(left)}: {candidate.name}, seed {seed}, {run['seconds']:.1f} s",
                  file=sys.stderr, flush=True)  # fmt: skip
    except KeyboardInterrupt:
        print(f"Interrupted; the same command goes on with {args.out}.", file=sys.stderr)
        return 130  # as a shell has it
    print(table(_with_results(found)["results"]))
    if args.root is None:
        print("\nWithout --root: no sequences of Fashion-MNIST.")
    return 0


def _names() -> list[str]:
    return [candidate.name for candidate in candidates.CANDIDATES]


def _read(path: Path) -> dict[str, Any]:
    """What has been run already; raises ``ValueError`` where that was something else."""
    settings = {
        "tasks": candidates.TASKS, "epochs": candidates.EPOCHS, "batch_size": BATCH_SIZE,
        "optimizer": "Adam", "learning_rate": LEARNING_RATE, "threads": 1,
        "sequences": {c.name: asdict(c) for c in candidates.CANDIDATES},
        "transformations": {way: list(names) for way, names in candidates.WAYS.items()},
        "versions": {"lasem_fast": lasem_fast.__version__, "torch": torch.__version__},
    }  # fmt: skip
    runs: dict[str, Any] = {}
    if path.exists():
        try:
            found = json.loads(path.read_text(encoding="utf-8"))
            before, runs = found["settings"], found["runs"]
        except (KeyError, TypeError, json.JSONDecodeError) as error:
            raise ValueError(f"--out: expected results of this search in {path}") from error
        if before != settings:
            raise ValueError(
                f"--out: expected results with the present settings and versions in {path}, got "
                f"{before}"
            )
    return {"settings": settings, "machine": machine.describe("cpu"), "runs": runs}


def _run_all(
    units: Sequence[Unit], root: Path | None, workers: int
) -> Iterator[tuple[Candidate, int, dict[str, Any]]]:
    """In any order; with one worker in this process."""
    parallel = joblib.Parallel(workers, backend="loky", return_as="generator_unordered")
    return parallel(
        joblib.delayed(candidates.run)(candidate, seed, root) for candidate, seed in units
    )


def _write(path: Path, found: dict[str, Any]) -> None:
    write_text(path, json.dumps(_with_results(found), indent=1) + "\n")


def _with_results(found: dict[str, Any]) -> dict[str, Any]:
    """In the order of list and seeds, with the rule's outcome for every sequence that was run."""
    runs = {
        name: dict(
            sorted(found["runs"][name].items(), key=lambda seed_and_run: int(seed_and_run[0]))
        )
        for name in _names()
        if name in found["runs"]
    }
    return {**found, "runs": runs, "results": {name: result(of) for name, of in runs.items()}}


def result(runs: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """One sequence: means over its seeds, paired differences in accuracy, and the verdict."""
    values = {
        measure: {method: [run[method][measure] for run in runs.values()] for method in METHODS}
        for measure in ("average_accuracy", "own_accuracy", "forgetting", "parameters")
    }
    accuracy = values["average_accuracy"]
    differences = {
        other: metrics.paired_difference(accuracy["lasem"], accuracy[other])
        for other in METHODS
        if other != "lasem"
    }
    above = [found.mean - found.half > 0 for found in differences.values()]
    below = [found.mean + found.half < 0 for found in differences.values()]
    return {
        "seeds": len(runs),
        "means": {
            measure: {method: float(np.mean(of_method)) for method, of_method in by_method.items()}
            for measure, by_method in values.items()
        },
        "differences": {
            other: {"mean": found.mean, "half": found.half if found.n > 1 else None}
            for other, found in differences.items()
        },
        "verdict": "wins" if all(above) else "loses" if any(below) else "undecided",
    }


def table(results: dict[str, dict[str, Any]]) -> str:
    """All sequences that were tried, as Markdown; accuracies and differences in %."""
    lines = []
    for name, found in results.items():
        means = found["means"]
        lines.append([
            name,
            *(f"{100 * means['average_accuracy'][method]:.1f}" for method in METHODS),
            *(_interval(found["differences"][method]) for method in METHODS[1:]),
            " / ".join(f"{100 * means['forgetting'][method]:.1f}" for method in METHODS[:2]),
            " / ".join(f"{means['parameters'][method] / 1e3:.0f}k" for method in METHODS),
            str(found["seeds"]),
            found["verdict"],
        ])  # fmt: skip
    headings = [
        "accuracy after the last task, %", *(METHOD_NAMES[method] for method in METHODS),
        *(f"LASEM - {METHOD_NAMES[method]}" for method in METHODS[1:]),
        "forgetting, LASEM / all", "parameters kept", "seeds", "selective sharing",
    ]  # fmt: skip
    return markdown(headings, lines)


def _interval(difference: dict[str, float | None]) -> str:
    half = difference["half"]
    between = "" if half is None else f" ±{100 * half:.1f}"
    return f"{100 * difference['mean']:+.1f}{between}"


if __name__ == "__main__":
    sys.exit(main())
