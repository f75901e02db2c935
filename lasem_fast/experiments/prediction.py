"""How long runs will take, from a few steps and one evaluation of each method."""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import torch

from lasem_fast.experiments.config import ConfigError
from lasem_fast.experiments.experiment import Experiment, Unit
from lasem_fast.experiments.variants import Variant
from lasem_fast.lifelong import Method, Phase, Task
from lasem_fast.lifelong.training import accuracy

_STEPS = 2
_EPOCHS = 10  # of a brief training
_IMAGES = 128  # that an evaluation is timed with, at most


class Cost(NamedTuple):
    """Seconds of a step and of evaluating one task, means over the tasks."""

    step: float
    evaluation: float


def predict(experiment: Experiment) -> dict[str, float]:
    """Seconds of one run of every variant that has runs left, by its slug, on one worker.

    Measured on this machine with the first task and, because some methods grow with the tasks, the
    middle one and the last. NaN for a variant that fails, told on stderr: its runs will fail too,
    or not, and say why in files of their own.

    Raises:
        ConfigError: the config's values do not fit together.
    """
    torch.set_num_threads(experiment.config.threads)
    found: dict[str, float] = {}
    for unit in experiment.units():
        if unit.finished or unit.variant.slug in found:
            continue
        with torch.random.fork_rng():
            torch.manual_seed(0)
            try:
                found[unit.variant.slug] = _seconds(experiment, unit)
            except ConfigError:
                raise
            except Exception as error:  # a method may be anyone's; the others go on
                found[unit.variant.slug] = math.nan
                told = f"{type(error).__name__}: {error}".partition("\n")[0]
                print(f"{unit.variant.label}: no time to predict, {told}", file=sys.stderr)
    return found


def _seconds(experiment: Experiment, unit: Unit) -> float:
    arguments = experiment.arguments(unit)
    tasks, epochs = arguments["tasks"], arguments["epochs"]
    cost = _measured(arguments, unit.variant)
    n, size = len(tasks[0].train[0]), arguments["batch_size"]
    steps = max(1, n // size if arguments["drop_last"] else -(-n // size))
    trainings = trials(unit.variant, len(experiment.network.space), len(tasks))
    training = trainings * epochs * steps * cost.step
    # every so often the task itself, or those before it too; at its end the test data of all
    own = -(-epochs // arguments["evaluate_every"])
    every = arguments["evaluate_earlier_every"]
    often = 0 if every is None else -(-epochs // every)
    earlier = trainings * often * (len(tasks) - 1) / 2
    evaluations = trainings * own + earlier + len(tasks) * (len(tasks) + 1) / 2
    return training + evaluations * cost.evaluation


def trials(variant: Variant, configurations: int, n_tasks: int) -> int:
    """How many trainings of a task a run consists of."""
    if variant.settings["method"] == "brute-force":
        return 1 + (n_tasks - 1) * configurations
    return n_tasks


def _measured(arguments: dict[str, Any], variant: Variant) -> Cost:
    tasks: list[Task] = arguments["tasks"]
    device = torch.device(arguments["device"])
    built = arguments["method"]
    method = built(lambda: built.make_net().to(device))
    first = _at(method, tasks[0], arguments)
    if variant.settings["method"] == "brute-force" or len(tasks) < 3:
        return first
    found = {0: first}
    for number, task in enumerate(tasks[1:], 1):
        method.end_task(tasks[number - 1])
        if number in (len(tasks) // 2, len(tasks) - 1):
            found[number] = _at(method, task, arguments)
        else:
            parameters = _added(method, task, arguments)
            if getattr(method, "grows", False):
                _train_briefly(method, task, parameters, arguments)
    middle, last = found[len(tasks) // 2], found[len(tasks) - 1]
    # Simpson's rule: a progressive network grows with the square of the tasks
    means = [(a + 4 * b + c) / 6 for a, b, c in zip(first, middle, last, strict=True)]
    return Cost(*means)


def _added(method: Method, task: Task, arguments: dict[str, Any]) -> list[Any]:
    device = torch.device(arguments["device"])
    parameters = method.add_task(task, arguments["make_head"](task).to(device))
    method.module.to(device)
    return parameters


def _train_briefly(
    method: Method, task: Task, parameters: list[Any], arguments: dict[str, Any]
) -> None:
    """One mini-batch in each of a few epochs, so that a network has the size that it grows to."""
    optimizer = arguments["optimizer"](parameters)
    x, y = (part[: arguments["batch_size"]].to(arguments["device"]) for part in task.train)
    epochs = min(_EPOCHS, arguments["epochs"])
    for epoch in range(1, epochs + 1):
        method.begin_epoch(task, Phase(epoch, epochs))
        method.step(x, y, task.name, optimizer)


def _at(method: Method, task: Task, arguments: dict[str, Any]) -> Cost:
    """Seconds of one step and of one evaluation of a task that is added now."""
    parameters = _added(method, task, arguments)
    task = task.to(arguments["device"])
    if hasattr(method, "candidates"):
        parameters = method.try_out(task, method.candidates(task)[0])
    optimizer = arguments["optimizer"](parameters)
    x, y = (part[: arguments["batch_size"]] for part in task.train)
    method.begin_epoch(task, Phase(1, arguments["epochs"]))

    def step() -> None:
        method.step(x, y, task.name, optimizer)

    def evaluate() -> None:
        inputs, labels = task.test
        accuracy(method, task.name, inputs[:_IMAGES], labels[:_IMAGES])

    step()  # the first one makes what later ones use again
    images = len(task.valid[0]) + len(task.test[0])
    scale = images / min(_IMAGES, len(task.test[0]))
    return Cost(_timed(step, _STEPS, x.device), scale * _timed(evaluate, 1, x.device))


def _timed(function: Callable[[], None], times: int, device: torch.device) -> float:
    start = time.perf_counter()
    for _ in range(times):
        function()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return (time.perf_counter() - start) / times
