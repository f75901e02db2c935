"""The paper's sequences of MNIST."""

from __future__ import annotations

from typing import Any

from lasem_fast.datasets.binary_tasks import N_TASKS, binary_tasks
from lasem_fast.datasets.description import Description
from lasem_fast.datasets.idx_files import FILES, MNIST, read_mnist
from lasem_fast.datasets.option_checks import one_of, percentage, seeds
from lasem_fast.datasets.published import rows_by_class
from lasem_fast.datasets.sizes import mnist_sizes
from lasem_fast.datasets.source import Root
from lasem_fast.datasets.splits import unit_range
from lasem_fast.lifelong import Task

N_VALID = 5000  # the first of the training file, as TensorFlow's reader has it


def mnist(
    root: Root, *, n_tasks: int = 10, percent: int = 10, trial: int = 0, seed: int = 0
) -> list[Task]:
    """MNIST in 5 tasks of two digits, or 10 of one digit against all others.

    The first 5,000 images of the training file are for validation. Inputs are float32
    ``[N, 1, 28, 28]`` in [0, 1]; label 1 is the first of two digits, or the one.

    Args:
        root: the folder of the files, or the one above it.
        n_tasks: 5 or 10.
        percent: 10 gives 1,000 to train on, 200 (10 tasks: 100) for validation and 1,800 (2,000)
            for test. Two digits have too few images for validation from 50 on.
        trial: draws the images to train on and for validation, and their order.
        seed: draws the test images, for all trials.

    Raises:
        TypeError, ValueError: an option is not as described, or a file is damaged.
        FileNotFoundError: a file is missing.
    """
    described = describe_mnist(n_tasks=n_tasks, percent=percent)
    trial, seed = seeds(trial, seed)
    published = read_mnist(root)
    by_class = rows_by_class(published.train.y, 10)
    return binary_tasks(
        published,
        [rows[rows >= N_VALID] for rows in by_class],
        [rows[rows < N_VALID] for rows in by_class],
        rows_by_class(published.test.y, 10),
        n_tasks=described.n_tasks, sizes=described.sizes, percent=int(percent),
        prepare=unit_range, trial=trial, seed=seed,
    )  # fmt: skip


def describe_mnist(*, n_tasks: Any, percent: Any, **_: Any) -> Description:
    """What :func:`mnist` gives."""
    n_tasks = one_of(n_tasks, "n_tasks", N_TASKS)
    n_test = 1800 if n_tasks == 5 else 2000
    return Description(
        name="mnist",
        title=MNIST.title,
        home=MNIST.home,
        files=FILES,
        input_shape=(1, 28, 28),
        classes=(2,) * n_tasks,
        sizes=(*mnist_sizes(percentage(percent), n_tasks), n_test),
        batch_size=10,
    )
