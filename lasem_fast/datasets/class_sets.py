"""Which classes each task has, where they are drawn."""

from __future__ import annotations

import itertools
import math

import numpy as np


def different_class_sets(
    n_tasks: int, per_task: int, n_classes: int, generator: np.random.Generator
) -> list[tuple[int, ...]]:
    """Classes in the order of their labels; no two tasks have the same set of them.

    Raises:
        ValueError: there are not so many different sets.
    """
    check_class_sets(n_tasks, per_task, n_classes)
    drawn: dict[frozenset[int], tuple[int, ...]] = {}
    while len(drawn) < n_tasks:
        classes = tuple(generator.permutation(n_classes)[:per_task].tolist())
        drawn.setdefault(frozenset(classes), classes)
    return list(drawn.values())


def balanced_class_sets(
    n_tasks: int, per_task: int, n_classes: int, generator: np.random.Generator
) -> list[tuple[int, ...]]:
    """As :func:`different_class_sets`, with every class in about as many tasks as any other.

    Each task has one of the sets whose classes occurred least before.
    """
    check_class_sets(n_tasks, per_task, n_classes)
    unused = list(itertools.combinations(range(n_classes), per_task))
    occurrences = np.zeros(n_classes, dtype=np.int64)
    drawn = []
    for _ in range(n_tasks):
        before = occurrences[np.array(unused)].sum(axis=1)
        classes = unused.pop(int(generator.choice(np.flatnonzero(before == before.min()))))
        occurrences[list(classes)] += 1
        drawn.append(tuple(generator.permutation(classes).tolist()))
    return drawn


def check_class_sets(n_tasks: int, per_task: int, n_classes: int) -> None:
    """Raises ``ValueError`` where there are not so many different sets."""
    if per_task > n_classes:
        raise ValueError(f"classes_per_task: expected at most {n_classes}, got {per_task}")
    if n_tasks > math.comb(n_classes, per_task):
        raise ValueError(
            f"n_tasks: expected at most {math.comb(n_classes, per_task)}, the number of different "
            f"sets of {per_task} out of {n_classes} classes, got {n_tasks}"
        )
