"""Tasks of several classes, from images of each class that all trials and tasks share.

This is what the authors' release (github.com/Lifelong-ML/LASEM) does for CIFAR-100: of every class
one random split into a pool to train on and one for validation; a task takes the first so many of
the pools of its classes, and of the test images. Trials differ in the order of the images only.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from lasem_fast.datasets.published import Published, rows_by_class
from lasem_fast.datasets.splits import (
    Prepare,
    labels_of,
    split_of,
    task_of,
    training_and_validation,
)
from lasem_fast.datasets.streams import stream
from lasem_fast.lifelong import Task
from lasem_fast.lifelong.task_data import SPLITS


def pooled_tasks(
    published: Published,
    class_lists: Sequence[Sequence[int]],
    sizes: tuple[int, int, int],
    *,
    prepare: Prepare,
    trial: int,
    seed: int,
) -> list[Task]:
    """One task for each list of classes; a label is the position in the list.

    Args:
        published: the images.
        class_lists: the classes of each task.
        sizes: how many images a task has to train on, for validation and for test: equally many
            of each class, rounded down.
        prepare: what is done with the images of a split.
        trial: draws the order of the images.
        seed: draws the split, for all trials.

    Raises:
        ValueError: a class has too few images.
    """
    n_classes = len(published.class_names)
    generator = stream("split", seed)
    halves = [
        training_and_validation(rows, generator)
        for rows in rows_by_class(published.train.y, n_classes)
    ]
    train_pools, valid_pools = ([half[i] for half in halves] for i in (0, 1))
    parts = (
        (published.train, train_pools),
        (published.train, valid_pools),
        (published.test, rows_by_class(published.test.y, n_classes)),
    )
    tasks = []
    for number, classes in enumerate(class_lists):
        splits = []
        for which, (images, pools) in enumerate(parts):
            per_class = sizes[which] // len(classes)
            for label in classes:
                if len(pools[label]) < per_class:
                    raise ValueError(
                        f"a task of {len(classes)} classes takes {per_class} {SPLITS[which]} "
                        f"images of each: class {published.class_names[label]!r} has "
                        f"{len(pools[label])}; expected a smaller percent, or more images"
                    )
            chosen = [pools[label][:per_class] for label in classes]
            order = stream("order", trial, number, which).permutation(per_class * len(classes))
            rows, labels = np.concatenate(chosen)[order], labels_of(chosen)[order]
            splits.append(split_of(images, rows, labels, prepare))
        note = " ".join(published.class_names[label] for label in classes)
        tasks.append(task_of(number + 1, splits, len(classes), note))
    return tasks
