"""How long runs will take, from a few steps and one evaluation of each method."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any, NamedTuple

import torch

from lasem_fast.experiments.experiment import Experiment, Unit
from lasem_fast.experiments.variants import Variant
from lasem_fast.lifelong import Method, Phase, Task
from lasem_fast.lifelong.training import accuracy

_STEPS = 2
_IMAGES = 256  # that an evaluation is timed with, at most


class Cost(NamedTuple):
    """Seconds of a step and of evaluating one task, with one task and with all of them."""

    step: tuple[float, float]
    evaluation: tuple[float, float]


def predict(experiment: Experiment) -> dict[str, float]:
    """Seconds of one run of every variant, by its slug, on one worker.

    Measured on this machine with the first task and, because some methods grow, with the last.
    """
    torch.set_num_threads(experiment.config.threads)
    seed = experiment.config.seeds[0]
    found = {}
    for variant in experiment.variants:
        unit = Unit(variant, seed, experiment.out)
        with torch.random.fork_rng():
            torch.manual_seed(0)
            found[variant.slug] = _seconds(experiment, unit)
    return found


def _seconds(experiment: Experiment, unit: Unit) -> float:
    arguments = experiment.arguments(unit)
    tasks, epochs = arguments["tasks"], arguments["epochs"]
    cost = _measured(arguments, unit.variant)
    n, size = len(tasks[0].train[0]), arguments["batch_size"]
    steps = max(1, n // size if arguments["drop_last"] else -(-n // size))
    trainings = trials(unit.variant, len(experiment.network.space), len(tasks))
    training = trainings * epochs * steps * sum(cost.step) / 2
    # every so often the task itself, or those before it too; at its end the test data of all
    own = -(-epochs // arguments["evaluate_every"])
    often = -(-epochs // arguments["evaluate_earlier_every"])
    earlier = trainings * often * (len(tasks) - 1) / 2
    evaluations = trainings * own + earlier + len(tasks) * (len(tasks) + 1) / 2
    return training + evaluations * sum(cost.evaluation) / 2


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
    if variant.settings["method"] == "brute-force" or len(tasks) == 1:
        return Cost((first[0],) * 2, (first[1],) * 2)
    method.end_task(tasks[0])
    for task in tasks[1:-1]:
        _added(method, task, arguments)
        method.end_task(task)
    last = _at(method, tasks[-1], arguments)
    return Cost((first[0], last[0]), (first[1], last[1]))


def _added(method: Method, task: Task, arguments: dict[str, Any]) -> list[Any]:
    device = torch.device(arguments["device"])
    parameters = method.add_task(task, arguments["make_head"](task).to(device))
    method.module.to(device)
    return parameters


def _at(method: Method, task: Task, arguments: dict[str, Any]) -> tuple[float, float]:
    """Seconds of one step and of one evaluation of a task that is added now."""
    parameters = _added(method, task, arguments)
    task = task.to(arguments["device"])
    if hasattr(method, "candidates"):
        parameters = method.try_out(task, method.candidates(task)[0])
    optimizer = arguments["optimizer"](parameters)
    x, y = (part[: arguments["batch_size"]] for part in task.train)
    method.begin_epoch(task, Phase(1, arguments["epochs"], 0))

    def step() -> None:
        method.step(x, y, task.name, optimizer)

    def evaluate() -> None:
        inputs, labels = task.test
        accuracy(method, task.name, inputs[:_IMAGES], labels[:_IMAGES])

    step()  # the first one makes what later ones use again
    images = len(task.valid[0]) + len(task.test[0])
    scale = images / min(_IMAGES, len(task.test[0]))
    return _timed(step, _STEPS, x.device), scale * _timed(evaluate, 1, x.device)


def _timed(function: Callable[[], None], times: int, device: torch.device) -> float:
    start = time.perf_counter()
    for _ in range(times):
        function()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return (time.perf_counter() - start) / times
