"""Times the columns of one row against one another, in turns."""

from __future__ import annotations

import gc
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace

import torch

from bench import ceilings
from bench.cases import Case, Problem
from bench.ceilings import synchronize
from bench.gate import Gate, WrongResult, answer_of
from bench.peers import Column
from lasem_fast.tools.memory import measured_peak

_FEWEST_ROUNDS, _MOST_ROUNDS = 3, 25
# A GPU is asked for so many steps in a row that waiting for the last one does not count.
_LEAST_SECONDS_ON_A_GPU, _MOST_REPEATS = 0.01, 100


@dataclass
class Lane:
    """What is known of a column after a race.

    Attributes:
        seconds: of a step, in every round; empty where the column was refused.
        first_step: seconds from nothing to the end of the first step, compilation included.
        peak_memory: bytes that PyTorch and the CPU kernels held at most in a step, without weights.
            What is inside a CUDA graph was allocated when it was recorded, and does not show.
        errors: against float64 brute force, relative.
        refused: why there is no time, or "".
    """

    seconds: list[float] = field(default_factory=list)
    first_step: float = 0.0
    peak_memory: int = 0
    errors: dict[str, float] = field(default_factory=dict)
    refused: str = ""


def race(
    case: Case,
    columns: list[Column],
    budget: float,
    found: Callable[[Column, Lane], None] | None = None,
) -> dict[str, Lane]:
    """One round is one step (on a GPU: some steps) of every column that passed the gate.

    Rounds fill the budget.

    Args:
        case: the row.
        columns: the columns, each timed once per round in this order.
        budget: seconds that all rounds together should take; at least three rounds are run.
        found: told of every column as soon as it is known to be right or refused, before the
            rounds, with one time of its own: what a run that is cut short still knows.

    Returns:
        A lane for every column, by name.
    """
    ceilings.set_tf32(case.dtype == "tf32")
    problem = case.problem()
    slack = max(column.slack for column in columns)
    gates = {
        weighs: Gate(problem, _configs(problem, weighs), largest_slack=slack)
        for weighs in dict.fromkeys(column.weighs for column in columns)
    }
    lanes, steps, repeats, round_time = {}, {}, {}, 0.0
    for column in columns:
        lane = lanes[column.name] = Lane()
        try:
            start = time.perf_counter()
            runner = column.build(problem)
            outcome = runner.step()
            synchronize(case.device)
            lane.first_step = time.perf_counter() - start
            gate = gates[column.weighs]
            lane.errors = gate.check(column, answer_of(runner, outcome))
        except WrongResult as error:
            lane.refused = str(error)
        except Exception as error:  # a peer that cannot run here must not end the suite
            lane.refused = f"{column.name} did not run: {type(error).__name__}: {error}"
        if lane.refused:
            if found is not None:
                found(column, lane)
            continue
        runner.net.zero_grad()
        start = time.perf_counter()
        lane.peak_memory = measured_peak(runner.step, case.device)
        repeats[column.name] = 1
        if case.device == "cuda":
            once = _seconds(runner.step, case.device, 3)
            repeats[column.name] = max(1, min(_MOST_REPEATS, round(_LEAST_SECONDS_ON_A_GPU / once)))
        if found is not None:
            once = _seconds(runner.step, case.device, repeats[column.name])
            found(column, replace(lane, seconds=[once] * _FEWEST_ROUNDS))
        round_time += (time.perf_counter() - start) * repeats[column.name]
        steps[column.name] = runner.step
    rounds = max(_FEWEST_ROUNDS, min(_MOST_ROUNDS, int(budget / max(round_time, 1e-6))))
    gc.collect()
    for _ in range(rounds if steps else 0):
        for name, step in steps.items():
            lanes[name].seconds.append(_seconds(step, case.device, repeats[name]))
    torch.compiler.reset()
    return lanes


def _configs(problem: Problem, weighs: str) -> list[tuple[bool, ...]] | None:
    """The configurations that a column weighs; None: all."""
    if weighs == "one":
        return [problem.space.all]
    if weighs == "favoured":
        return [problem.space.configs[i] for i in problem.favoured()]
    return None


def _seconds(step: Callable[[], object], device: str, repeats: int) -> float:
    """Mean seconds of steps that follow one another."""
    synchronize(device)
    start = time.perf_counter()
    for _ in range(repeats):
        step()
    synchronize(device)
    return (time.perf_counter() - start) / repeats
