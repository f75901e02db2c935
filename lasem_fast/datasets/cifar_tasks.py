"""The paper's sequences of CIFAR-100 and CIFAR-10."""

from __future__ import annotations

from typing import Any

from lasem_fast.datasets.binary_tasks import N_TASKS as CIFAR10_N_TASKS
from lasem_fast.datasets.binary_tasks import binary_tasks
from lasem_fast.datasets.cifar100_classes import N_TASKS as CIFAR100_N_TASKS
from lasem_fast.datasets.cifar100_classes import task_classes
from lasem_fast.datasets.cifar_files import (
    CIFAR10,
    CIFAR10_TRAIN,
    CIFAR100,
    read_cifar10,
    read_cifar100,
)
from lasem_fast.datasets.description import Description
from lasem_fast.datasets.option_checks import one_of, percentage, seeds
from lasem_fast.datasets.pooled_tasks import pooled_tasks
from lasem_fast.datasets.published import rows_by_class
from lasem_fast.datasets.sizes import cifar10_sizes, cifar100_sizes
from lasem_fast.datasets.source import Root
from lasem_fast.datasets.splits import standardise, training_and_validation
from lasem_fast.datasets.streams import stream
from lasem_fast.lifelong import Task


def cifar100(
    root: Root, *, n_tasks: int = 10, percent: int = 4, trial: int = 0, seed: int = 0
) -> list[Task]:
    """CIFAR-100 in 10, 20 or 40 tasks of 10 classes.

    Of the 500 training images of a class 83 are for validation and 416 to train on, by one random
    split; a task takes the first so many of each. Each split of each task is standardised by
    itself. Inputs are float32 ``[N, 3, 32, 32]``.

    Args:
        root: the folder of the files, or the one above it.
        n_tasks: 10, 20 or 40.
        percent: of the training images; 4 gives 170 to train on, 30 for validation and 1,000 for
            test. All 100 are more than the split leaves.
        trial: draws the order of the images. All trials have the same images.
        seed: draws the split, for all trials.

    Raises:
        TypeError, ValueError: an option is not as described, or a file is damaged.
        FileNotFoundError: a file is missing.
    """
    described = describe_cifar100(n_tasks=n_tasks, percent=percent)
    trial, seed = seeds(trial, seed)
    return pooled_tasks(
        read_cifar100(root), task_classes(described.n_tasks), described.sizes,
        prepare=standardise, trial=trial, seed=seed,
    )  # fmt: skip


def describe_cifar100(*, n_tasks: Any, percent: Any, **_: Any) -> Description:
    """What :func:`cifar100` gives."""
    n_tasks = one_of(n_tasks, "n_tasks", CIFAR100_N_TASKS)
    return Description(
        name="cifar-100",
        title=CIFAR100.title,
        home=CIFAR100.home,
        files=("train", "test"),
        input_shape=(3, 32, 32),
        classes=(10,) * n_tasks,
        sizes=(*cifar100_sizes(percentage(percent)), 1000),
        batch_size=10,
        architecture="cifar100",
        builtin_nets=("cifar-4", "cifar-6", "cifar-8", "residual-17"),
    )


def cifar10(
    root: Root, *, n_tasks: int = 10, percent: int = 4, trial: int = 0, seed: int = 0
) -> list[Task]:
    """CIFAR-10 in 5 tasks of two classes, or 10 of one against all others.

    Of 5,000 training images of a class 833 are for validation and 4,166 to train on, by one random
    split. Each split of each task is standardised by itself. Inputs are float32
    ``[N, 3, 32, 32]``; label 1 is the first of two classes, or the one.

    Args:
        root: the folder of the files, or the one above it.
        n_tasks: 5 or 10.
        percent: of the training images; 4 gives 340 to train on, 60 for validation and 2,000 for
            test.
        trial: draws the images to train on and for validation, and their order.
        seed: draws the split and the test images, for all trials.

    Raises:
        TypeError, ValueError: an option is not as described, or a file is damaged.
        FileNotFoundError: a file is missing.
    """
    described = describe_cifar10(n_tasks=n_tasks, percent=percent)
    trial, seed = seeds(trial, seed)
    published = read_cifar10(root)
    generator = stream("split", seed)
    halves = [
        training_and_validation(rows, generator) for rows in rows_by_class(published.train.y, 10)
    ]
    return binary_tasks(
        published,
        [train for train, _ in halves],
        [valid for _, valid in halves],
        rows_by_class(published.test.y, 10),
        n_tasks=described.n_tasks, sizes=described.sizes, percent=int(percent),
        prepare=standardise, trial=trial, seed=seed,
    )  # fmt: skip


def describe_cifar10(*, n_tasks: Any, percent: Any, **_: Any) -> Description:
    """What :func:`cifar10` gives."""
    n_tasks = one_of(n_tasks, "n_tasks", CIFAR10_N_TASKS)
    return Description(
        name="cifar-10",
        title=CIFAR10.title,
        home=CIFAR10.home,
        files=(*CIFAR10_TRAIN, "test_batch"),
        input_shape=(3, 32, 32),
        classes=(2,) * n_tasks,
        sizes=(*cifar10_sizes(percentage(percent)), 2000),
        batch_size=20,
        architecture="cifar100",
        builtin_nets=("cifar-4",),
    )
