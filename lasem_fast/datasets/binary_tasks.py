"""Tasks that tell one class from another, or one from all others (MNIST, CIFAR-10).

Each trial draws its own images to train on and for validation; the test images are drawn once.
"""

from __future__ import annotations

import numpy as np

from lasem_fast.datasets.published import Published
from lasem_fast.datasets.splits import Prepare, labels_of, split_of, task_of
from lasem_fast.datasets.streams import stream
from lasem_fast.lifelong import Task
from lasem_fast.lifelong.task_data import SPLITS

N_TASKS = (5, 10)
Pools = list[np.ndarray]  # rows of each of ten classes


def binary_tasks(
    published: Published,
    train_pools: Pools,
    valid_pools: Pools,
    test_pools: Pools,
    *,
    n_tasks: int,
    sizes: tuple[int, int, int],
    percent: int,
    prepare: Prepare,
    trial: int,
    seed: int,
) -> list[Task]:
    """5 tasks: class 2t (label 1) against 2t + 1 (label 0). 10 tasks: class t (1) against all (0).

    Half of a split has label 1, as far as there are images. Against all others, a trial first
    draws ``percent`` of each class, and all its tasks draw from that.

    Raises:
        ValueError: the classes have too few images.
    """
    if n_tasks == 10:
        train_pools, valid_pools = (
            _part(pools, percent, trial, seed, which)
            for which, pools in enumerate((train_pools, valid_pools))
        )
    parts = (
        (published.train, train_pools),
        (published.train, valid_pools),
        (published.test, test_pools),
    )
    names = published.class_names
    tasks = []
    for number in range(n_tasks):
        splits = []
        for which, (images, pools) in enumerate(parts):
            if which == 2:  # the same in all trials
                generator = stream("test", seed, number)
            else:
                generator = stream("draw", seed, trial, number, which)
            no, yes = _sides(pools, number, n_tasks)
            n_yes = _count_of_yes(len(no), len(yes), sizes[which])
            if n_yes is None:
                raise ValueError(
                    f"percent: at {percent} task{number + 1} takes {sizes[which]} {SPLITS[which]} "
                    f"images, but its classes have {len(yes)} and {len(no)}; expected a smaller one"
                )
            n_no = sizes[which] - n_yes
            chosen = [generator.permutation(no)[:n_no], generator.permutation(yes)[:n_yes]]
            order = generator.permutation(sizes[which])
            rows, labels = np.concatenate(chosen)[order], labels_of(chosen)[order]
            splits.append(split_of(images, rows, labels, prepare))
        if n_tasks == 5:
            note = f"{names[2 * number]} against {names[2 * number + 1]}"
        else:
            note = f"{names[number]} against all others"
        tasks.append(task_of(number + 1, splits, 2, note))
    return tasks


def _part(pools: Pools, percent: int, trial: int, seed: int, which: int) -> Pools:
    generator = stream("part", seed, trial, which)
    return [generator.permutation(rows)[: len(rows) * percent // 100] for rows in pools]


def _sides(pools: Pools, number: int, n_tasks: int) -> tuple[np.ndarray, np.ndarray]:
    """Rows with label 0, rows with label 1."""
    if n_tasks == 5:
        return pools[2 * number + 1], pools[2 * number]
    return np.concatenate(pools[:number] + pools[number + 1 :]), pools[number]


def _count_of_yes(n_no: int, n_yes: int, size: int) -> int | None:
    """Half, or what makes up for a side that has fewer; None where both cannot do it."""
    wanted = max(min(size // 2, n_yes), size - n_no)
    return wanted if wanted <= n_yes else None
