"""CIFAR-100's tasks: standardising, sizes, and which images they have."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from numbered_images import as_they_are, assert_rounded, balanced, by_formula, rows, same
from published_files import pixels

from lasem_fast import datasets
from lasem_fast.datasets import cifar_tasks
from lasem_fast.datasets.cifar100_classes import FINE_NAMES, task_classes
from lasem_fast.datasets.splits import standardise
from lasem_fast.lifelong.task_data import check_tasks

# Standardising


@pytest.mark.parametrize(("scale", "full_scale"), [(1, 255), (4, 255), (64, 255), (16, 16)])
def test_standardising_equals_its_formula_in_float64(scale, full_scale):
    x = pixels(5, 3, 4, 6) // scale
    x[:, 1] //= 2
    assert_rounded(standardise(x, full_scale), by_formula(x, full_scale))


def test_standardising_where_nothing_varies_divides_by_the_floor():
    x = np.full((2, 3, 2, 2), 7, dtype=np.uint8)
    assert not standardise(x).any()
    x[0, 0, 0, 0] = 8  # sd of channel 0 is sqrt(7)/8/255, less than 1/sqrt(8)
    expected = (x[:, 0].astype(np.float64) - 7.125) / 255 * np.sqrt(8)
    assert_rounded(standardise(x)[:, 0], expected)


# CIFAR-100

# Percent: images of a task to train on and for validation (the authors' release).
CIFAR100_SIZES = {
    2: (80, 20), 4: (170, 30), 6: (250, 50), 8: (330, 70), 10: (410, 90), 20: (830, 170),
    25: (1040, 210), 30: (1250, 250), 40: (1670, 330), 50: (2080, 420), 60: (2500, 500),
    70: (2920, 580), 75: (3120, 630), 80: (3330, 670), 90: (3750, 750),
}  # fmt: skip


@pytest.fixture
def cifar100(monkeypatch):
    published = balanced(100, 500, 100, list(FINE_NAMES))
    monkeypatch.setattr(cifar_tasks, "read_cifar100", lambda root: published)
    return published


@pytest.fixture
def raw_cifar100(cifar100, monkeypatch):
    monkeypatch.setattr(cifar_tasks, "standardise", as_they_are)
    return cifar100


@pytest.mark.parametrize(("percent", "sizes"), CIFAR100_SIZES.items())
def test_sizes_of_cifar100(cifar100, percent, sizes):
    tasks = check_tasks(datasets.cifar100("", percent=percent))
    assert datasets.describe("cifar-100", percent=percent).sizes == (*sizes, 1000)
    for task in tasks:
        for (_, (x, y)), size in zip(task.splits(), (*sizes, 1000), strict=True):
            assert y.bincount().tolist() == [size // 10] * 10
            assert (x.dtype, x.shape) == (torch.float32, (size, 3, 1, 1))


@pytest.mark.parametrize(
    ("percent", "sizes"), [(1, (40, 10)), (3, (120, 30)), (15, (620, 130)), (99, (4120, 830))]
)
def test_sizes_between_those_of_the_table(percent, sizes):
    assert datasets.describe("cifar-100", percent=percent).sizes == (*sizes, 1000)
    assert sum(sizes) == 50 * percent


def test_all_of_cifar100_is_more_than_the_split_leaves(cifar100):
    message = "10 classes takes 417 train images of each: class 'beaver' has 416; expected a small"
    with pytest.raises(ValueError, match=message):
        datasets.cifar100("", percent=100)


@pytest.mark.parametrize("n_tasks", [10, 20, 40])
def test_images_of_cifar100(raw_cifar100, n_tasks):
    tasks = datasets.cifar100("", n_tasks=n_tasks, percent=90)
    assert [task.name for task in tasks] == [f"task{i}" for i in range(1, n_tasks + 1)]
    used = {"train": set(), "valid": set(), "test": set()}
    of_class: dict = {}
    for task, classes in zip(tasks, task_classes(n_tasks), strict=True):
        assert task.n_classes == 10
        assert task.note == " ".join(FINE_NAMES[label] for label in classes)
        for name, (x, y) in task.splits():
            source = raw_cifar100.test if name == "test" else raw_cifar100.train
            numbers = rows(x)
            assert len(set(numbers)) == len(numbers)
            assert source.y[numbers].tolist() == [classes[label] for label in y]
            used[name] |= set(numbers)
            for label in range(10):  # a class has the same images in all tasks
                own = frozenset(numbers[y.numpy() == label])
                assert of_class.setdefault((name, classes[label]), own) == own
    assert not used["train"] & used["valid"]
    assert (len(used["train"]), len(used["valid"])) == (37_500, 7_500)
    assert used["test"] == set(range(10_000))


def test_trials_of_cifar100_share_images_and_not_their_order(raw_cifar100):
    first, again = (datasets.cifar100("", trial=0) for _ in range(2))
    other, split = datasets.cifar100("", trial=1), datasets.cifar100("", seed=1)
    assert same(first, again)
    for task, task_of_other, task_of_split in zip(first, other, split, strict=True):
        for name in ("train", "valid", "test"):
            numbers, others, splits = (
                rows(getattr(t, name)[0]) for t in (task, task_of_other, task_of_split)
            )
            assert set(numbers) == set(others)
            assert numbers.tolist() != others.tolist()
            assert (set(numbers) == set(splits)) == (name == "test")
    # mixed, not class by class
    assert all((task.train[1][:17] != task.train[1][0]).any() for task in first)


def test_fewer_images_of_cifar100_are_a_part_of_more(raw_cifar100):
    few, more = (datasets.cifar100("", percent=percent) for percent in (4, 10))
    for task, larger in zip(few, more, strict=True):
        for name in ("train", "valid"):
            assert set(rows(getattr(task, name)[0])) < set(rows(getattr(larger, name)[0]))


def test_each_split_of_each_task_of_cifar100_is_standardised_by_itself(cifar100, monkeypatch):
    tasks = datasets.cifar100("", n_tasks=20)
    monkeypatch.setattr(cifar_tasks, "standardise", as_they_are)
    for task, raw in zip(tasks, datasets.cifar100("", n_tasks=20), strict=True):
        for (_, (x, y)), (_, (raw_x, raw_y)) in zip(task.splits(), raw.splits(), strict=True):
            assert torch.equal(y, raw_y)
            assert_rounded(x.numpy(), by_formula(raw_x.numpy()))
