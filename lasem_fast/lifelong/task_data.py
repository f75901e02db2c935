"""The data of a task in a sequence, and what is checked of it before anything is trained."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from lasem_fast._numbers import whole_number
from lasem_fast.networks.checks import is_plain

Split = tuple[Tensor, Tensor]
SPLITS = ("train", "valid", "test")


@dataclass(frozen=True)
class Task:
    """One task: inputs ``[N, ...]`` and int64 labels ``[N]`` in ``0..n_classes-1``, per split."""

    name: str
    train: Split
    valid: Split
    test: Split
    n_classes: int
    note: str = ""

    def to(self, device: torch.device | str) -> Task:
        """The same task with its tensors on ``device``."""
        splits = ((x.to(device), y.to(device)) for x, y in (self.train, self.valid, self.test))
        return Task(self.name, *splits, n_classes=self.n_classes, note=self.note)

    def splits(self) -> Iterator[tuple[str, Split]]:
        """Names and tensors of the three splits."""
        return ((name, getattr(self, name)) for name in SPLITS)


def check_tasks(tasks: Any) -> list[Task]:
    """The tasks of a sequence, all splits looked at, values too.

    Raises:
        TypeError, ValueError: naming the task and the split.
    """
    if not isinstance(tasks, Sequence) or not all(isinstance(task, Task) for task in tasks):
        listed = isinstance(tasks, Sequence) and not isinstance(tasks, str)
        got = [type(t).__name__ for t in tasks] if listed else type(tasks).__name__
        raise TypeError(f"tasks: expected a sequence of Task, got {got}")
    if not tasks:
        raise ValueError("tasks: expected at least one task, got none")
    tasks = [_with_whole_classes(task, f"tasks[{i}]") for i, task in enumerate(tasks)]
    names = [task.name for task in tasks]
    if len(set(names)) != len(names):
        raise ValueError(f"tasks: expected different names, got {names}")
    for task in tasks:
        for split, pair in task.splits():
            _check_split(pair, f"{split} of task {task.name!r}", task.n_classes)
    return tasks


def _with_whole_classes(task: Task, where: str) -> Task:
    """The task with ``n_classes`` as an int."""
    if not isinstance(task.name, str):
        raise TypeError(f"{where}: expected a name (str), got {task.name!r}")
    if not task.name:
        raise ValueError(f"{where}: expected a name, got an empty string")
    classes = whole_number(task.n_classes, f"n_classes of task {task.name!r}")
    return replace(task, n_classes=classes)


def _check_split(pair: Any, where: str, n_classes: int) -> None:
    if not isinstance(pair, (tuple, list)) or not (
        len(pair) == 2 and all(isinstance(part, Tensor) for part in pair)
    ):
        raise TypeError(f"{where}: expected a pair of tensors (x, y), got {_kinds(pair)}")
    x, y = pair
    for name, tensor in (("x", x), ("y", y)):
        if tensor.is_meta or not is_plain(tensor):
            got = "one without values (meta)" if tensor.is_meta else f"layout {tensor.layout}"
            if tensor.is_nested or tensor.is_quantized:
                got = "a nested or quantised one"
            raise TypeError(f"{where}: expected {name} to be a dense tensor, got {got}")
    if x.dim() < 1 or x.shape[0] == 0:
        raise ValueError(
            f"{where}: expected x to hold at least one sample [N, ...], got shape {list(x.shape)}"
        )
    if y.dtype != torch.int64:
        raise TypeError(f"{where}: expected y to be class labels of torch.int64, got {y.dtype}")
    if y.shape != x.shape[:1]:
        raise ValueError(
            f"{where}: expected y of shape [{x.shape[0]}], one label per sample of x, got "
            f"{list(y.shape)}"
        )
    low, high = (int(value) for value in torch.aminmax(y))
    if low < 0 or high >= n_classes:
        raise ValueError(
            f"{where}: expected labels in 0..{n_classes - 1} (n_classes is {n_classes}), got "
            f"labels from {low} to {high}"
        )
    if not bool(torch.isfinite(x).all()):
        bad = int((~torch.isfinite(x)).sum())
        raise ValueError(
            f"{where}: expected finite values in x, got {bad} that are NaN or infinite"
        )


def _kinds(pair: Any) -> str:
    if not isinstance(pair, (tuple, list)):
        return type(pair).__name__
    return f"({', '.join(type(part).__name__ for part in pair)})"
