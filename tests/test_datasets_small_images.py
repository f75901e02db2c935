"""Sequences of CIFAR-100, CIFAR-10, MNIST and the stand-ins: who has which images, and how many."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from numbered_images import as_they_are, balanced, numbered, rows
from published_files import pixels, write_idx_pairs

from lasem_fast import datasets
from lasem_fast.datasets import cifar_tasks, mnist_tasks, standin_tasks
from lasem_fast.datasets.cifar100_classes import FINE_NAMES, task_classes
from lasem_fast.datasets.idx_files import GARMENTS
from lasem_fast.datasets.published import Published
from lasem_fast.datasets.splits import standardise
from lasem_fast.lifelong.task_data import check_tasks

DEBIAN_FOLDER = Path("/usr/share/datasets/fashion-mnist")


def same(one, other) -> bool:
    """Whether two sequences hold equal tensors."""
    return all(
        torch.equal(a, b)
        for task, again in zip(one, other, strict=True)
        for (_, pair), (_, pair_again) in zip(task.splits(), again.splits(), strict=True)
        for a, b in zip(pair, pair_again, strict=True)
    )


# Standardising


def by_formula(x: np.ndarray, full_scale: int = 255) -> np.ndarray:
    """Standardised in float64, channel by channel, as the release does it."""
    channels = []
    for values in x.swapaxes(0, 1).astype(np.float64) / full_scale:
        sd = max(values.std(), 1 / np.sqrt(values.size))
        channels.append((values - values.mean()) / sd)
    return np.stack(channels, axis=1)


def assert_rounded(ours: np.ndarray, exact: np.ndarray) -> None:
    """Equal but for the rounding to float32."""
    assert ours.dtype == np.float32
    np.testing.assert_allclose(ours, exact, rtol=2**-23, atol=1e-12)


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


# Two classes at a time

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


def test_pairs_of_digits_for_which_validation_has_too_few(mnist):
    with pytest.raises(ValueError, match=r"percent: at 50 task2 takes 1000 valid .* 488 and 493"):
        datasets.mnist("", n_tasks=5, percent=50)


# Fashion-MNIST and the digits


@pytest.fixture
def fashion_folder(tmp_path):
    train, test = np.arange(600) % 10, np.arange(2000) % 10
    write_idx_pairs(tmp_path, (pixels(600, 28, 28), train), (pixels(2000, 28, 28, seed=1), test))
    return tmp_path


def test_fashion_mnist_has_the_sizes_of_cifar100(fashion_folder):
    tasks = check_tasks(datasets.fashion_mnist(fashion_folder))
    assert len(tasks) == 10
    assert len({frozenset(task.note.split()) for task in tasks}) == 10
    for task in tasks:
        for (_, (x, y)), size in zip(task.splits(), (170, 30, 1000), strict=True):
            assert x.shape == (size, 1, 28, 28)
            assert y.bincount().tolist() == [size // 5] * 5
    every = " ".join(task.note for task in tasks).split()
    assert {every.count(name) for name in GARMENTS} == {5}


def test_images_of_fashion_mnist(fashion_folder, monkeypatch):
    monkeypatch.setattr(standin_tasks, "standardise", as_they_are)
    label_of = {}
    for part, (x, n) in {"train": (pixels(600, 28, 28), 600), "test": (None, 2000)}.items():
        x = pixels(2000, 28, 28, seed=1) if x is None else x
        label_of[part] = {x[i].tobytes(): GARMENTS[i % 10] for i in range(n)}
    apart: dict = {"train": set(), "valid": set()}
    for task in datasets.fashion_mnist(fashion_folder):
        for name, (x, y) in task.splits():
            images = [image.byte().numpy().tobytes() for image in x]
            names = label_of["test" if name == "test" else "train"]
            assert [names[image] for image in images] == [task.note.split()[label] for label in y]
            apart.get(name, set()).update(images)
    assert not apart["train"] & apart["valid"]


def test_trials_and_seeds_of_fashion_mnist(fashion_folder):
    first, other = (datasets.fashion_mnist(fashion_folder, trial=trial) for trial in (0, 1))
    assert same(first, datasets.fashion_mnist(fashion_folder))
    for task, again in zip(first, other, strict=True):
        assert task.note == again.note
        assert not torch.equal(task.train[0], again.train[0])
        for label in range(5):
            images, others = (
                {image.numpy().tobytes() for image in t.train[0][t.train[1] == label]}
                for t in (task, again)
            )
            assert images == others
    drawn = datasets.fashion_mnist(fashion_folder, seed=1)
    assert [task.note for task in drawn] != [task.note for task in first]


def test_fashion_mnist_padded_for_the_nets_of_cifar(fashion_folder, monkeypatch):
    tasks = datasets.fashion_mnist(fashion_folder, as_cifar=True, n_tasks=2)
    monkeypatch.setattr(standin_tasks, "standardise", as_they_are)
    plain = datasets.fashion_mnist(fashion_folder, n_tasks=2)
    for task, raw in zip(tasks, plain, strict=True):
        for (_, (x, y)), (_, (raw_x, raw_y)) in zip(task.splits(), raw.splits(), strict=True):
            assert x.shape == (len(y), 3, 32, 32) and torch.equal(y, raw_y)
            padded = np.zeros((len(y), 1, 32, 32))
            padded[:, :, 2:30, 2:30] = raw_x.numpy()
            expected = by_formula(padded)
            for channel in range(3):
                assert_rounded(x[:, channel].numpy(), expected[:, 0])


def test_images_too_large_for_the_nets_of_cifar(tmp_path):
    x, y = pixels(600, 33, 33), np.arange(600) % 10
    write_idx_pairs(tmp_path, (x, y), (x, y))
    with pytest.raises(ValueError, match=r"at most 32 x 32, got \[33, 33\]"):
        datasets.fashion_mnist(tmp_path, as_cifar=True, classes_per_task=10, n_tasks=1)


@pytest.mark.parametrize(
    ("classes_per_task", "sizes"), [(2, (170, 30, 1000)), (3, (168, 30, 999)), (7, (168, 28, 994))]
)
def test_other_numbers_of_classes(classes_per_task, sizes):
    described = datasets.describe("fashion-mnist", classes_per_task=classes_per_task, n_tasks=3)
    assert described.sizes == sizes and described.classes == (classes_per_task,) * 3


@pytest.mark.skipif(not DEBIAN_FOLDER.is_dir(), reason="package dataset-fashion-mnist is missing")
def test_fashion_mnist_of_debian():
    tasks = check_tasks(datasets.load("fashion-mnist", DEBIAN_FOLDER, n_tasks=2, percent=100))
    assert [len(y) for _, (_, y) in tasks[0].splits()] == [4170, 830, 1000]


def test_digits_of_scikit_learn(monkeypatch):
    load_digits = pytest.importorskip("sklearn.datasets").load_digits
    tasks = check_tasks(datasets.digits())
    for task in tasks:
        for (_, (x, y)), size in zip(task.splits(), (170, 30, 250), strict=True):
            assert x.shape == (size, 1, 8, 8)
            assert y.bincount().tolist() == [size // 5] * 5
            assert abs(x.double().mean()) < 1e-6
            assert abs(x.double().std(correction=0) - 1) < 1e-6
    monkeypatch.setattr(standin_tasks, "standardise", lambda x, full_scale: as_they_are(x))
    bunch = load_digits()
    label_of = dict(zip(map(bytes, bunch.images.astype(np.uint8)), bunch.target, strict=True))
    assert len(label_of) == 1797
    used: dict = {"train": set(), "valid": set(), "test": set()}
    for task in datasets.digits(trial=1):
        for name, (x, y) in task.splits():
            images = [bytes(image.byte().numpy()) for image in x]
            assert [str(label_of[image]) for image in images] == [
                task.note.split()[label] for label in y
            ]
            used[name] |= set(images)
    for one, other in pairwise([*used.values(), used["train"]]):
        assert not one & other
    with pytest.raises(ValueError, match=r"class '.' has .*; expected a smaller percent"):
        datasets.digits(percent=12)
    datasets.digits(percent=11)
