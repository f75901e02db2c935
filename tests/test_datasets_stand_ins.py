"""Fashion-MNIST and the digits as sequences like those of CIFAR-100."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from numbered_images import as_they_are, assert_rounded, by_formula, same
from published_files import pixels, write_idx_pairs

from lasem_fast import datasets
from lasem_fast.datasets import stand_in_tasks
from lasem_fast.datasets.idx_files import GARMENTS
from lasem_fast.lifelong.task_data import check_tasks

DEBIAN_FOLDER = Path("/usr/share/datasets/fashion-mnist")
TRAIN, TEST = pixels(600, 28, 28), pixels(2500, 28, 28, seed=1)


@pytest.fixture
def fashion_folder(tmp_path):
    """Image i is of class i % 10."""
    write_idx_pairs(tmp_path, (TRAIN, np.arange(600) % 10), (TEST, np.arange(2500) % 10))
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
    monkeypatch.setattr(stand_in_tasks, "standardise", as_they_are)
    row_of = {
        part: {image.tobytes(): row for row, image in enumerate(x)}
        for part, x in (("train", TRAIN), ("test", TEST))
    }
    used: dict = {"train": set(), "valid": set(), "test": set()}
    for task in datasets.fashion_mnist(fashion_folder):
        names = task.note.split()
        for name, (x, y) in task.splits():
            of_file = row_of["test" if name == "test" else "train"]
            found = [of_file[image.byte().numpy().tobytes()] for image in x]
            assert [GARMENTS[row % 10] for row in found] == [names[label] for label in y]
            used[name].update(found)
    assert not used["train"] & used["valid"]
    assert used["test"] == set(range(2000))  # the first 200 of each class


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
    monkeypatch.setattr(stand_in_tasks, "standardise", as_they_are)
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
    monkeypatch.setattr(stand_in_tasks, "standardise", lambda x, full_scale: as_they_are(x))
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
