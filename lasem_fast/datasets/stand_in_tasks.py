"""Real images that are at hand, made into sequences by the rules of the paper's CIFAR-100.

Fashion-MNIST is a Debian package, the digits come with scikit-learn. The classes of the tasks are
drawn: no two tasks have the same set, and all classes occur about equally often.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from lasem_fast._numbers import whole_number
from lasem_fast.datasets.class_sets import balanced_class_sets, check_class_sets
from lasem_fast.datasets.description import Description
from lasem_fast.datasets.idx_files import DIGITS, FASHION_MNIST, FILES, read_fashion_mnist
from lasem_fast.datasets.option_checks import flag, optional_module, percentage, seeds
from lasem_fast.datasets.pooled_tasks import pooled_tasks
from lasem_fast.datasets.published import Labelled, Published, rows_by_class
from lasem_fast.datasets.sizes import cifar100_sizes
from lasem_fast.datasets.source import Root
from lasem_fast.datasets.splits import standardise
from lasem_fast.datasets.streams import stream
from lasem_fast.lifelong import Task

_CIFAR_SIDE = 32
_DIGITS_FULL_SCALE = 16


def fashion_mnist(
    root: Root,
    *,
    n_tasks: int = 10,
    classes_per_task: int = 5,
    percent: int = 4,
    as_cifar: bool = False,
    trial: int = 0,
    seed: int = 0,
) -> list[Task]:
    """Fashion-MNIST with the sizes of CIFAR-100's tasks and treated like it.

    Of 6,000 training images of a class 1,000 are for validation and 5,000 to train on, by one
    random split; a task takes the first so many of each. Each split of each task is standardised
    by itself. Inputs are float32 ``[N, 1, 28, 28]``.

    Args:
        root: the folder of the files, or the one above it.
        n_tasks: number of tasks.
        classes_per_task: number of classes of each, of 10.
        percent: 4 gives 170 images to train on, 30 for validation and 1,000 for test.
        as_cifar: pad images with black to 32 x 32 and repeat them in 3 channels, before they are
            standardised, so that the paper's nets for CIFAR take them.
        trial: draws the order of the images. All trials have the same images.
        seed: draws the split and the classes of the tasks, for all trials.

    Raises:
        TypeError, ValueError: an option is not as described, or a file is damaged.
        FileNotFoundError: a file is missing.
    """
    described = describe_fashion_mnist(
        n_tasks=n_tasks, classes_per_task=classes_per_task, percent=percent, as_cifar=as_cifar
    )
    trial, seed = seeds(trial, seed)
    return pooled_tasks(
        read_fashion_mnist(root), _class_lists(described, seed), described.sizes,
        prepare=_as_cifar if as_cifar else standardise, trial=trial, seed=seed,
    )  # fmt: skip


def describe_fashion_mnist(
    *, n_tasks: Any, classes_per_task: Any, percent: Any, as_cifar: Any, **_: Any
) -> Description:
    """What :func:`fashion_mnist` gives."""
    as_cifar = flag(as_cifar, "as_cifar")
    classes = _n_classes(n_tasks, classes_per_task)
    nets = ("cifar-4", "cifar-6", "cifar-8", "residual-17")
    return Description(
        name="fashion-mnist",
        title=FASHION_MNIST.title,
        home=FASHION_MNIST.home,
        files=FILES,
        input_shape=(3, _CIFAR_SIDE, _CIFAR_SIDE) if as_cifar else (1, 28, 28),
        classes=classes,
        sizes=_sizes(percent, classes[0], n_test=1000),
        batch_size=10,
        architecture="cifar100" if as_cifar else None,
        builtin_nets=nets if as_cifar else (),
    )


def digits(
    *,
    n_tasks: int = 10,
    classes_per_task: int = 5,
    percent: int = 4,
    trial: int = 0,
    seed: int = 0,
) -> list[Task]:
    """scikit-learn's 1,797 digits of 8 x 8 pixels, as :func:`fashion_mnist` does it.

    A third of each digit, drawn at random, is for test. Inputs are float32 ``[N, 1, 8, 8]``.

    Args:
        n_tasks: number of tasks.
        classes_per_task: number of classes of each, of 10.
        percent: 4 gives 170 images to train on, 30 for validation and 250 (50 of each class) for
            test; tasks of 5 classes can have 11 at most.
        trial: draws the order of the images. All trials have the same images.
        seed: draws the splits and the classes of the tasks, for all trials.

    Raises:
        TypeError, ValueError: an option is not as described.
        ModuleNotFoundError: scikit-learn is not installed.
    """
    described = describe_digits(n_tasks=n_tasks, classes_per_task=classes_per_task, percent=percent)
    trial, seed = seeds(trial, seed)
    bunch = optional_module("sklearn.datasets", "scikit-learn", "digits").load_digits()
    x, y = bunch.images.astype(np.uint8)[:, None], bunch.target.astype(np.int64)
    generator = stream("test", seed)
    held_out = np.concatenate(
        [generator.permutation(rows)[: len(rows) // 3] for rows in rows_by_class(y, 10)]
    )
    rest = np.setdiff1d(np.arange(len(y)), held_out)
    published = Published(Labelled(x[rest], y[rest]), Labelled(x[held_out], y[held_out]), DIGITS)
    return pooled_tasks(
        published, _class_lists(described, seed), described.sizes,
        prepare=_standardise_digits, trial=trial, seed=seed,
    )  # fmt: skip


def describe_digits(*, n_tasks: Any, classes_per_task: Any, percent: Any, **_: Any) -> Description:
    """What :func:`digits` gives."""
    classes = _n_classes(n_tasks, classes_per_task)
    return Description(
        name="digits",
        title="scikit-learn's digits",
        home="https://scikit-learn.org/stable/modules/generated/sklearn.datasets.load_digits.html",
        files=(),
        input_shape=(1, 8, 8),
        classes=classes,
        sizes=_sizes(percent, classes[0], n_test=50 * classes[0]),
        batch_size=10,
    )


def _class_lists(described: Description, seed: int) -> list[tuple[int, ...]]:
    per_task = described.classes[0]
    return balanced_class_sets(described.n_tasks, per_task, 10, stream("classes", seed))


def _n_classes(n_tasks: Any, classes_per_task: Any) -> tuple[int, ...]:
    n_tasks = whole_number(n_tasks, "n_tasks")
    per_task = whole_number(classes_per_task, "classes_per_task", least=2)
    check_class_sets(n_tasks, per_task, 10)
    return (per_task,) * n_tasks


def _sizes(percent: Any, n_classes: int, n_test: int) -> tuple[int, int, int]:
    """CIFAR-100's, equally many of each class."""
    wanted = (*cifar100_sizes(percentage(percent)), n_test)
    train, valid, test = (size - size % n_classes for size in wanted)
    return train, valid, test


def _as_cifar(x: np.ndarray) -> np.ndarray:
    if max(x.shape[2:]) > _CIFAR_SIDE:
        raise ValueError(f"as_cifar: expected images of at most 32 x 32, got {list(x.shape[2:])}")
    before = (_CIFAR_SIDE - x.shape[-1]) // 2
    sides = (before, _CIFAR_SIDE - x.shape[-1] - before)
    return standardise(np.pad(x, ((0, 0), (0, 0), sides, sides)).repeat(3, axis=1))


def _standardise_digits(x: np.ndarray) -> np.ndarray:
    return standardise(x, _DIGITS_FULL_SCALE)
