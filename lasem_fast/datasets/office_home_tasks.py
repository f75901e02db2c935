"""The paper's sequence of Office-Home, and the release's incremental one."""

from __future__ import annotations

from typing import Any

import numpy as np

from lasem_fast.datasets.description import Description
from lasem_fast.datasets.office_home_images import CLASSES, OFFICE_HOME, SIDE, read_domain
from lasem_fast.datasets.option_checks import flag, seeds
from lasem_fast.datasets.published import Labelled
from lasem_fast.datasets.source import Root
from lasem_fast.datasets.splits import labels_of, split_of, task_of, unit_range
from lasem_fast.datasets.streams import stream
from lasem_fast.lifelong import Task

# Drawn at random by the paper's authors, once.
GROUPS = (
    (63, 54, 55, 59, 47, 8, 5, 56, 18, 50, 3, 57, 13),
    (62, 19, 21, 35, 64, 46, 27, 10, 39, 17, 22, 34, 30),
    (48, 15, 51, 6, 40, 31, 4, 36, 45, 41, 16, 14, 11),
    (9, 29, 1, 44, 33, 26, 25, 32, 53, 12, 43, 38, 60),
    (28, 2, 49, 37, 20, 23, 58, 24, 52, 61, 7, 0, 42),
)
_INCREMENTS = (13, 58, 41, 11, 6, 38, 3, 62)
INCREMENTAL = tuple(_INCREMENTS[:n] for n in range(3, 9))


def office_home(root: Root, *, incremental: bool = False, trial: int = 0) -> list[Task]:
    """Office-Home: 5 tasks of 13 product images' classes, then 5 of photographs.

    Of the n images of a class int(0.6 n) are to train on, int(0.1 n) for validation and
    int(0.3 n) for test, drawn anew in each trial. Inputs are float32 ``[N, 3, 128, 128]`` in
    [0, 1]. The ten tasks take about 1.7 GB.

    Args:
        root: the folder that holds Product and Real World, or the one above it.
        incremental: 6 tasks of product images instead, of 3 classes and one more in each; images
            are drawn anew in each task.
        trial: draws the split and the order.

    Raises:
        TypeError, ValueError: an option is not as described, or an image is damaged.
        FileNotFoundError: a folder is missing.
        ModuleNotFoundError: Pillow is not installed.
    """
    flag(incremental, "incremental")
    trial, _ = seeds(trial)
    domains = ("Product",) if incremental else ("Product", "Real World")
    lists = INCREMENTAL if incremental else GROUPS
    wanted = sorted({label for classes in lists for label in classes})
    tasks: list[Task] = []
    for domain in domains:
        images = read_domain(root, domain, wanted)
        tasks += [
            _task(domain, images, classes, len(tasks) + i, trial) for i, classes in enumerate(lists)
        ]
    return tasks


def describe_office_home(*, incremental: Any, **_: Any) -> Description:
    """What :func:`office_home` gives."""
    lists = INCREMENTAL if flag(incremental, "incremental") else GROUPS * 2
    return Description(
        name="office-home",
        title=OFFICE_HOME.title,
        home=OFFICE_HOME.home,
        files=("Product/",) if incremental else ("Product/", "Real World/"),
        input_shape=(3, SIDE, SIDE),
        classes=tuple(len(classes) for classes in lists),
        sizes=None,
        batch_size=16,
        architecture="office_home",
        builtin_nets=("office-home-4",),
    )


def _task(
    domain: str,
    images: dict[int, np.ndarray],
    classes: tuple[int, ...],
    number: int,
    trial: int,
) -> Task:
    x = np.concatenate([images[label] for label in classes])
    y = labels_of([images[label] for label in classes])
    generator = stream("office-home", trial, number)
    parts: list[list[np.ndarray]] = [[], [], []]
    for label in range(len(classes)):
        rows = generator.permutation(np.flatnonzero(y == label))
        sizes = [len(rows) * tenths // 10 for tenths in (6, 1, 3)]
        if not all(sizes):
            name = CLASSES[classes[label]]
            raise ValueError(
                f"Office-Home: expected at least 10 images of {name} in {domain}, got {len(rows)}"
            )
        for part, start, size in zip(parts, np.cumsum([0, *sizes]), sizes, strict=False):
            part.append(rows[start : start + size])
    splits = []
    for part in parts:
        rows = generator.permutation(np.concatenate(part))
        splits.append(split_of(Labelled(x, y), rows, y[rows], unit_range))
    names = " ".join(CLASSES[label] for label in classes)
    return task_of(number + 1, splits, len(classes), f"{domain}: {names}")
