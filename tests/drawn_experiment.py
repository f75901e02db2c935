"""A data set, a net and a method as a user's config names them (``drawn_experiment.py:tasks``)."""

from __future__ import annotations

import experiment_cases as cases
from torch import nn

from lasem_fast.lifelong import Task
from lasem_fast.lifelong.methods import Static


def tasks(n: int = 3, trial: int = 0) -> list[Task]:
    """The drawn tasks; a trial leaves out so many of the last samples to train on."""
    found = []
    for task in cases.make_tasks(n):
        x, y = task.train
        keep = len(x) - trial
        found.append(Task(task.name, (x[:keep], y[:keep]), task.valid, task.test, task.n_classes))
    return found


def five() -> int:
    """No tasks."""
    return 5


def net(classes: int) -> tuple[list[nn.Module], nn.Module]:
    """Stages and a head."""
    sizes = (cases.FEATURES, cases.HIDDEN, cases.HIDDEN)
    stages = [
        nn.Sequential(nn.Linear(sizes[i], sizes[i + 1]), nn.Tanh()) for i in range(cases.DEPTH)
    ]
    return stages, nn.Sequential(nn.Dropout(0.5), nn.Linear(cases.HIDDEN, classes))


class Own(Static):
    """A method of the user's own."""

    def __init__(self, net, shared: int = 1) -> None:
        super().__init__(net, {shared})


class Failing(Static):
    """Fails in the second task."""

    def __init__(self, net) -> None:
        super().__init__(net, {1})

    def begin_epoch(self, task, phase) -> None:
        if task.name == "t1" and phase.epoch == 2:
            raise KeyError("as it was asked to")


class NeverSteps(Static):
    """Fails in its first step."""

    def __init__(self, net) -> None:
        super().__init__(net, {1})

    def step(self, x, y, task, optimizer):
        raise RuntimeError("as it was asked to")


class NeverMade(Static):
    """Fails when it is made."""

    def __init__(self, net) -> None:
        raise RuntimeError("as it was asked to")


CONFIG = """
name = "drawn"
seeds = [0, 1]

[data]
name = "{source}:tasks"
n = 3

[net]
name = "{source}:net"

[training]
epochs = 3
batch_size = 8
optimizer = "tf-rmsprop"
lr = 0.02
lr_decay = 0.1
"""
METHODS = """
[[methods]]
method = "lasem"
preset = "release"

[[methods]]
method = "static"
config = ["all", "top-1"]

[[methods]]
method = "single-task"

[[methods]]
method = "brute-force"
tasks = 2
"""


def config(methods: str = METHODS, **changes: str) -> str:
    """The text of a config; ``changes`` replace top-level lines."""
    top = "".join(f"{name} = {value}\n" for name, value in changes.items())
    text = CONFIG.format(source=__file__)
    for name in changes:
        text = "\n".join(line for line in text.splitlines() if not line.startswith(f"{name} = "))
    return top + text + "\n" + methods
