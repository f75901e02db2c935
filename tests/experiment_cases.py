"""Small drawn tasks and nets, and the ways to train them, for the tests of methods and runs."""

from __future__ import annotations

from functools import partial

import torch
from torch import nn

import lasem_fast as lf
from lasem_fast.lifelong import Task, train_sequence
from lasem_fast.lifelong.methods import BruteForce, Search, SingleTask, Static

FEATURES, HIDDEN, CLASSES, DEPTH = 4, 6, 3, 2
EPOCHS, TASKS = 3, 3


def make_tasks(n: int = TASKS, dtype: torch.dtype = torch.float32) -> list[Task]:
    """Tasks that a linear map of the inputs defines, a different one for each."""
    generator = torch.Generator().manual_seed(7)
    tasks = []
    for number in range(n):
        rule = torch.randn(FEATURES, CLASSES, generator=generator)
        splits = []
        for size in (21, 16, 25):
            x = torch.randn(size, FEATURES, generator=generator)
            splits.append((x.to(dtype), (x @ rule).argmax(1)))
        tasks.append(Task(f"t{number}", *splits, n_classes=CLASSES))
    return tasks


def make_net(transfer: str = "hps") -> lf.TransferNet:
    sizes = (FEATURES, HIDDEN, HIDDEN)
    stages = [nn.Sequential(nn.Linear(sizes[i], sizes[i + 1]), nn.Tanh()) for i in range(DEPTH)]
    return lf.TransferNet(stages, transfer=transfer)


def make_conv_net(transfer: str) -> lf.TransferNet:
    """For images ``[N, 1, 4, 4]``."""
    stages = [nn.Sequential(nn.Conv2d(c, 3, 3, padding=1), nn.Tanh()) for c in (1, 3)]
    return lf.TransferNet(stages, transfer=transfer)


def make_head(task: Task) -> nn.Module:
    return nn.Sequential(nn.Dropout(0.5), nn.Linear(HIDDEN, task.n_classes))


def static(make_net):
    return Static(make_net(), {2})


def brute_force(make_net):
    return BruteForce(make_net())


def release(make_net):
    return Search(lf.LASEM.reference(make_net()))


METHODS = {
    "lasem": "lasem",
    "all": "all",
    "release": release,
    "static": static,
    "single": SingleTask,
    "brute": brute_force,
}


def run(method="lasem", **changes):
    """A run of the cases' own settings; what is changed replaces them."""
    options = {
        "method": METHODS[method] if isinstance(method, str) else method,
        "epochs": EPOCHS,
        "batch_size": 8,
        "optimizer": partial(lf.optim.TFRMSprop, lr=0.02),
        "schedule": lambda epoch: 1 / (1 + 0.1 * epoch),
    }
    tasks = changes.pop("tasks", None) or make_tasks()
    head = changes.pop("make_head", make_head)
    return train_sequence(changes.pop("make_net", make_net), head, tasks, **{**options, **changes})


def without_times(record) -> dict:
    plain = record.to_dict()
    del plain["seconds"]
    return plain
