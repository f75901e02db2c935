"""CIFAR-10's and MNIST's tasks of two classes, or of one class against all others."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from numbered_images import as_they_are, balanced, numbered, rows, same

from lasem_fast import datasets
from lasem_fast.datasets import cifar_tasks, mnist_tasks
from lasem_fast.datasets.published import Published
from lasem_fast.lifelong.task_data import check_tasks

CIFAR10_SIZES = {
    2: (160, 40), 4: (340, 60), 6: (500, 100), 8: (660, 140), 10: (840, 160), 30: (2500, 500),
    50: (4160, 840), 70: (5840, 1160), 90: (7500, 1500), 100: (8330, 1670),
}  # fmt: skip


@pytest.fixture(scope="module")
def ten_classes():
    return balanced(10, 5000, 1000, list("abcdefghij"))


@pytest.fixture
def cifar10(ten_classes, monkeypatch):
    monkeypatch.setattr(cifar_tasks, "read_cifar10", lambda root: ten_classes)
    monkeypatch.setattr(cifar_tasks, "standardise", as_they_are)
    return ten_classes


def test_sizes_of_cifar10():
    for n_tasks in (5, 10):
        for percent, sizes in CIFAR10_SIZES.items():
            described = datasets.describe("cifar-10", n_tasks=n_tasks, percent=percent)
            assert described.sizes == (*sizes, 2000)


def test_pairs_of_cifar10(cifar10):
    tasks, other = (check_tasks(datasets.cifar10("", n_tasks=5, trial=t)) for t in (0, 1))
    assert same(tasks, datasets.cifar10("", n_tasks=5, trial=0))
    for t, (task, task_of_other) in enumerate(zip(tasks, other, strict=True)):
        assert task.note == f"{'acegi'[t]} against {'bdfhj'[t]}"
        for (name, (x, y)), size in zip(task.splits(), (340, 60, 2000), strict=True):
            source = cifar10.test if name == "test" else cifar10.train
            numbers = rows(x)
            assert len(set(numbers)) == size
            assert y.bincount().tolist() == [size // 2] * 2
            assert source.y[numbers].tolist() == (2 * t + 1 - y).tolist()
            others = rows(getattr(task_of_other, name)[0])
            assert (numbers.tolist() == others.tolist()) == (name == "test")
            assert (set(numbers) == set(others)) == (name == "test")


def test_splits_of_cifar10_are_apart_in_all_trials(cifar10):
    used = {"train": set(), "valid": set()}
    for n_tasks in (5, 10):
        for trial in range(3):
            for task in datasets.cifar10("", n_tasks=n_tasks, percent=50, trial=trial):
                for name, numbers in used.items():
                    numbers |= set(rows(getattr(task, name)[0]))
    assert not used["train"] & used["valid"]


def test_one_class_of_cifar10_against_all(cifar10):
    tasks = check_tasks(datasets.cifar10(""))
    of_class: dict = {label: set() for label in range(10)}
    for t, task in enumerate(tasks):
        assert task.note == f"{'abcdefghij'[t]} against all others"
        # 4% of 4,166 and of 833 images of a class are fewer than half of 340, more than of 60
        for (name, (x, y)), ones in zip(task.splits(), (166, 30, 1000), strict=True):
            source = cifar10.test if name == "test" else cifar10.train
            labels = source.y[rows(x)]
            assert len(set(rows(x))) == len(y)
            assert y.bincount().tolist() == [len(y) - ones, ones]
            assert (labels == t).tolist() == y.bool().tolist()
            if name != "valid":  # where 30 images may miss a class
                assert set(labels) == set(range(10))
        for number in rows(task.train[0]):
            of_class[cifar10.train.y[number]].add(number)
    # all tasks of a trial draw from the same 4%
    assert [len(numbers) for numbers in of_class.values()] == [166] * 10


def test_too_few_images_for_two_classes(cifar10):
    message = "percent: at 100 task1 takes 1670 valid images, but its classes have 833 and 833"
    with pytest.raises(ValueError, match=message):
        datasets.cifar10("", n_tasks=5, percent=100)
    (task, *_) = datasets.cifar10("", n_tasks=10, percent=100)
    assert task.valid[1].bincount().tolist() == [837, 833]


# Images of each digit in MNIST: in the training file behind its first 5,000, in those, for test.
MNIST_TRAIN = (5444, 6179, 5470, 5638, 5307, 4987, 5417, 5715, 5389, 5454)
MNIST_VALID = (479, 563, 488, 493, 535, 434, 501, 550, 462, 495)
MNIST_TEST = (980, 1135, 1032, 1010, 982, 892, 958, 1028, 974, 1009)


@pytest.fixture
def mnist(monkeypatch):
    rng = np.random.default_rng(0)
    valid, train, test = (
        rng.permutation(np.repeat(np.arange(10), counts))
        for counts in (MNIST_VALID, MNIST_TRAIN, MNIST_TEST)
    )
    for part, border in ((valid, -1), (train, 0)):  # zeros where the one ends and the other begins
        zero = np.flatnonzero(part == 0)[0]
        part[[zero, border]] = part[[border, zero]]
    published = Published(
        numbered(np.concatenate([valid, train]), 1), numbered(test, 1), tuple("0123456789")
    )
    assert [len(part.y) for part in (published.train, published.test)] == [60_000, 10_000]
    monkeypatch.setattr(mnist_tasks, "read_mnist", lambda root: published)
    return published


@pytest.mark.parametrize(
    ("n_tasks", "percent", "sizes"),
    [
        (5, 1, (100, 20, 1800)), (5, 10, (1000, 200, 1800)), (5, 30, (3000, 600, 1800)),
        (5, 90, (9000, 1000, 1800)), (10, 1, (100, 10, 2000)), (10, 10, (1000, 100, 2000)),
        (10, 90, (9000, 900, 2000)),
    ],
)  # fmt: skip
def test_sizes_of_mnist(n_tasks, percent, sizes):
    assert datasets.describe("mnist", n_tasks=n_tasks, percent=percent).sizes == sizes


def test_pairs_of_digits(mnist):
    tasks = check_tasks(datasets.mnist("", n_tasks=5))
    for t, task in enumerate(tasks):
        for name, (x, y) in task.splits():
            assert x.min() == 0 and x.max() <= 1  # x / 255
            source, numbers = (mnist.test if name == "test" else mnist.train), rows(x * 255)
            assert source.y[numbers].tolist() == (2 * t + 1 - y).tolist()
            assert name == "test" or ((numbers < 5000) == (name == "valid")).all()
        assert task.train[1].bincount().tolist() == [500, 500]
        assert task.valid[1].bincount().tolist() == [100, 100]
    # There are 892 fives for test, fewer than half of 1,800: fours make up for it.
    assert [task.test[1].bincount().tolist() for task in tasks] == [
        [900, 900], [900, 900], [892, 908], [900, 900], [900, 900],
    ]  # fmt: skip


def test_one_digit_against_all(mnist):
    tasks = check_tasks(datasets.mnist(""))
    for t, task in enumerate(tasks):
        for name, (x, y) in task.splits():
            source, numbers = (mnist.test if name == "test" else mnist.train), rows(x * 255)
            assert (source.y[numbers] == t).tolist() == y.bool().tolist()
            assert name == "test" or ((numbers < 5000) == (name == "valid")).all()
    # half, or all that a tenth of the digit's images are
    ones = [[int(y.sum()) for _, (_, y) in task.splits()] for task in tasks]
    assert ones == [
        [min(500, a // 10), min(50, b // 10), min(1000, c)]
        for a, b, c in zip(MNIST_TRAIN, MNIST_VALID, MNIST_TEST, strict=True)
    ]
    other = datasets.mnist("", trial=1)
    assert all(torch.equal(a.test[0], b.test[0]) for a, b in zip(tasks, other, strict=True))
    assert not any(torch.equal(a.train[0], b.train[0]) for a, b in zip(tasks, other, strict=True))


def test_validation_of_mnist_is_the_first_5000_of_the_training_file(mnist):
    task, *_ = datasets.mnist("", percent=100)
    zeros = rows(task.valid[0][task.valid[1] == 1] * 255)  # fewer than half of 1,000: all there are
    assert sorted(zeros) == np.flatnonzero(mnist.train.y[:5000] == 0).tolist()
    assert zeros.max() == 4999 and mnist.train.y[5000] == 0


def test_pairs_of_digits_for_which_validation_has_too_few(mnist):
    with pytest.raises(ValueError, match=r"percent: at 50 task2 takes 1000 valid .* 488 and 493"):
        datasets.mnist("", n_tasks=5, percent=50)
