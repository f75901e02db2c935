"""Data sets by name: from files to tasks, options and their messages, what is known beforehand."""

from __future__ import annotations

import inspect
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from published_files import pixels, python2_pickle, write_idx_pairs

import lasem_fast as lf
from lasem_fast import datasets
from lasem_fast.datasets.cifar100_classes import COARSE_OF_FINE
from lasem_fast.datasets.streams import stream
from lasem_fast.lifelong.task_data import check_tasks
from lasem_fast.tools.builtin import NETS

FUNCTIONS = {
    "cifar-100": datasets.cifar100, "cifar-10": datasets.cifar10, "mnist": datasets.mnist,
    "office-home": datasets.office_home, "stl-10": datasets.stl10,
    "fashion-mnist": datasets.fashion_mnist, "digits": datasets.digits,
}  # fmt: skip


def check_as_described(tasks, name: str, **options) -> None:
    described = datasets.describe(name, **options)
    assert [task.n_classes for task in check_tasks(tasks)] == list(described.classes)
    assert described.n_tasks == len(tasks)
    for task in tasks:
        for (_, (x, y)), size in zip(task.splits(), described.sizes, strict=True):
            assert x.shape == (size, *described.input_shape)
            assert (x.dtype, y.dtype) == (torch.float32, torch.int64)


def test_cifar100_from_files(tmp_path):
    folder = tmp_path / "cifar-100-python"
    folder.mkdir()
    for name, n, seed in (("train", 12, 0), ("test", 100, 1)):
        y = np.random.default_rng(seed).permutation(np.repeat(np.arange(100), n))
        content = {
            "data": pixels(len(y), 3072, seed=seed),
            "fine_labels": y.tolist(),
            "coarse_labels": [COARSE_OF_FINE[label] for label in y],
        }
        (folder / name).write_bytes(python2_pickle(content))
    tasks = datasets.load("cifar-100", str(tmp_path), percent=2)
    check_as_described(tasks, "cifar-100", percent=2)


def test_mnist_from_files(tmp_path):
    labels = np.random.default_rng(0).permutation(np.arange(9000) % 10)
    train, test = (pixels(6000, 28, 28), labels[:6000]), (pixels(9000, 28, 28), labels)
    write_idx_pairs(tmp_path, train, test)
    options = {"n_tasks": 5, "percent": 1, "trial": 2}
    check_as_described(datasets.load("mnist", tmp_path, **options), "mnist", **options)


def test_stl10_from_files(tmp_path):
    for part, per_class in (("train", 20), ("test", 3)):
        y = np.repeat(np.arange(1, 11), per_class)
        (tmp_path / f"{part}_y.bin").write_bytes(y.astype(np.uint8).tobytes())
        (tmp_path / f"{part}_X.bin").write_bytes(pixels(len(y), 3, 96, 96).tobytes())
    tasks = check_tasks(datasets.load("stl-10", tmp_path, n_tasks=15, test_per_class=2))
    for task in tasks:
        # a tenth of 20, half of that for validation
        for (_, (x, y)), per_class in zip(task.splits(), (1, 1, 2), strict=True):
            assert x.shape == (5 * per_class, *datasets.describe("stl-10").input_shape)
            assert y.bincount().tolist() == [per_class] * 5


def test_digits_need_no_files():
    pytest.importorskip("sklearn")
    options = {"n_tasks": 2, "classes_per_task": 3}
    check_as_described(datasets.load("digits", **options), "digits", **options)


@pytest.mark.parametrize("name", datasets.NAMES)
def test_what_is_described_fits_the_nets(name):
    described = datasets.describe(name)
    assert described.name == name and described.home.startswith("https://")
    if described.architecture is not None:
        arch = getattr(lf.nets, described.architecture)()
        assert arch.input_shape == described.input_shape
        assert name == "cifar-10" or arch.batch_size == described.batch_size
    for net in described.builtin_nets:
        assert NETS[net].sample == described.input_shape
    assert (described.architecture is None) == (described.builtin_nets == ())


def test_the_paper_s_mini_batches():
    assert {name: datasets.describe(name).batch_size for name in datasets.NAMES} == {
        "cifar-100": 10, "cifar-10": 20, "mnist": 10, "office-home": 16, "stl-10": 10,
        "fashion-mnist": 10, "digits": 10,
    }  # fmt: skip


def test_streams_of_random_numbers_are_apart_and_take_large_seeds():
    keys = [("a",), ("b",), ("a", 0), ("a", 1), ("a", 2**32), ("a", 1, 2**63 - 1), ("a", 2**63 - 1)]
    drawn = {stream(*key).integers(2**62) for key in keys}
    assert len(drawn) == len(keys)
    assert stream("a", 5, 7).integers(2**62) == stream("a", 5, 7).integers(2**62)


def test_padded_fashion_mnist_fits_the_nets_of_cifar():
    described = datasets.describe("fashion-mnist", as_cifar=True)
    assert described.input_shape == lf.nets.cifar100().input_shape
    assert described.architecture == "cifar100"


@pytest.mark.parametrize("name", datasets.NAMES)
def test_options_by_name_are_those_of_the_function(name):
    parameters = inspect.signature(FUNCTIONS[name]).parameters
    assert datasets.options(name) == {
        option: p.default for option, p in parameters.items() if option != "root"
    }
    assert datasets.options(name)["trial"] == 0


@pytest.mark.parametrize(
    ("name", "options", "error", "message"),
    [
        ("cifar", {}, ValueError, "name: expected one of cifar-100, cifar-10, .*got 'cifar'"),
        (["mnist"], {}, ValueError, r"name: expected one of .*got \['mnist'\]"),
        ("cifar-100", {"tasks": 10}, TypeError, "has no option 'tasks'; it has n_tasks, percent"),
        ("cifar-100", {"n_tasks": 30}, ValueError, "n_tasks: expected one of 10, 20, 40, got 30"),
        ("cifar-100", {"n_tasks": True}, ValueError, "n_tasks: expected one of .* got True"),
        ("cifar-100", {"percent": 0}, ValueError, "percent: expected a whole number of at least 1"),
        (
            "cifar-100",
            {"percent": 101},
            ValueError,
            "percent: expected a .* from 1 to 100, got 101",
        ),
        ("cifar-100", {"percent": 2.5}, TypeError, "percent: expected a whole number"),
        ("cifar-10", {"n_tasks": 20}, ValueError, "n_tasks: expected one of 5, 10, got 20"),
        ("mnist", {"n_tasks": "5"}, ValueError, "n_tasks: expected one of 5, 10, got '5'"),
        ("mnist", {"trial": -1}, ValueError, r"trial: expected a number in 0\.\.2\^63 - 1"),
        (
            "mnist",
            {"trial": 2**63},
            ValueError,
            "trial: expected a number in .* 9223372036854",
        ),
        ("mnist", {"seed": None}, TypeError, "seed: expected a whole number, got None"),
        ("office-home", {"incremental": 1}, TypeError, "incremental: expected True or False"),
        ("office-home", {"seed": 1}, TypeError, "no option 'seed'; it has incremental, trial"),
        ("stl-10", {"n_tasks": 10}, ValueError, "n_tasks: expected one of 20, 15, got 10"),
        ("stl-10", {"test_per_class": 0}, ValueError, "test_per_class: expected a whole number"),
        ("fashion-mnist", {"as_cifar": 1}, TypeError, "as_cifar: expected True or False, got 1"),
        ("fashion-mnist", {"classes_per_task": 1}, ValueError, "classes_per_task: .* at least 2"),
        ("fashion-mnist", {"classes_per_task": 11}, ValueError, "expected at most 10, got 11"),
        ("fashion-mnist", {"n_tasks": 253}, ValueError, "n_tasks: expected at most 252"),
        ("digits", {"n_tasks": 0}, ValueError, "n_tasks: expected a whole number of at least 1"),
    ],
)
def test_options_that_are_refused_before_a_file_is_looked_for(name, options, error, message):
    with pytest.raises(error, match=message):
        datasets.describe(name, **options)
    root = None if name == "digits" else "nowhere"
    with pytest.raises(error, match=message):
        datasets.load(name, root, **options)
    if name in datasets.NAMES:
        with pytest.raises((error, TypeError)):
            FUNCTIONS[name](*([root] if root else []), **options)


@pytest.mark.parametrize("name", [name for name in datasets.NAMES if name != "digits"])
def test_files_that_are_not_there(name, tmp_path):
    if name == "office-home":
        pytest.importorskip("PIL")
    with pytest.raises(FileNotFoundError) as error:
        datasets.load(name, tmp_path)
    for part in (datasets.describe(name).title, datasets.describe(name).home, str(tmp_path)):
        assert part in str(error.value)
    with pytest.raises(TypeError, match=f"root: expected the folder of {name}'s files, got None"):
        datasets.load(name)


def test_a_root_for_what_has_no_files(tmp_path):
    with pytest.raises(TypeError, match="root: expected None, since digits has no files"):
        datasets.load("digits", tmp_path)


BLOCKED = """
import sys
sys.modules["PIL"] = sys.modules["sklearn"] = None
import lasem_fast as lf
for name, root in (("digits", None), ("office-home", ".")):
    try:
        lf.datasets.load(name, root)
    except ModuleNotFoundError as error:
        print(error)
"""


def test_without_the_optional_packages_the_rest_works():
    done = subprocess.run(
        [sys.executable, "-c", BLOCKED], cwd=Path(__file__).parent.parent,
        capture_output=True, text=True,
    )  # fmt: skip
    assert done.stdout.splitlines() == [
        "digits needs scikit-learn: pip install lasem_fast[data]",
        "Office-Home needs pillow: pip install lasem_fast[data]",
    ], done.stderr
