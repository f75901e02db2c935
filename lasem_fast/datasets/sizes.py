"""How many images a task has to train on and for validation, by percentage of the training set.

The authors' release (github.com/Lifelong-ML/LASEM) has a table for each data set; percentages that
are not in it follow its rule.
"""

from __future__ import annotations


def cifar100_sizes(percent: int) -> tuple[int, int]:
    """Of a task of 10 classes with 500 images each: validation is a sixth, rounded to tens."""
    return _a_sixth(50 * percent, 10, exceptions={500: 90})


def cifar10_sizes(percent: int) -> tuple[int, int]:
    """Of a task of 2 classes with 5,000 images each: validation is a sixth, rounded to twenties."""
    return _a_sixth(100 * percent, 20, exceptions={10_000: 1670})


def mnist_sizes(percent: int, n_tasks: int) -> tuple[int, int]:
    """Of a task of two digits (5 tasks), or of one against all others (10 tasks)."""
    return 100 * percent, min(20 * percent, 1000) if n_tasks == 5 else 10 * percent


def _a_sixth(total: int, step: int, exceptions: dict[int, int]) -> tuple[int, int]:
    valid = exceptions.get(total, (total + 3 * step) // (6 * step) * step)
    return total - valid, valid
