"""The demo's data are what they claim, and errors say what to do."""

import gzip
import struct
from pathlib import Path

import pytest
import torch

pytest.importorskip("sklearn")

from lasem_fast.demo import data

DEBIAN_FOLDER = Path("/usr/share/datasets/fashion-mnist")


@pytest.fixture(scope="module")
def digits():
    return data.digits(seed=0)


def rows(split) -> set[bytes]:
    return {image.numpy().tobytes() for image in split[0]}


# The data


def test_digits_are_split_without_overlap(digits):
    assert digits.side == 8
    splits = (digits.train, digits.valid, digits.test)
    assert sum(len(y) for _, y in splits) == 1797
    assert sum(len(rows(split)) for split in splits) == len(set().union(*map(rows, splits)))
    for x, y in splits:
        assert x.shape == (len(y), 1, 8, 8)
        assert (x.dtype, y.dtype) == (torch.float32, torch.int64)
        assert (x.min(), x.max()) == (-0.5, 0.5)
        assert set(y.tolist()) == set(range(10))


def test_tasks_are_small_diverse_and_within_range(digits):
    tasks = data.make_tasks(digits, 14, seed=0)
    class_sets = [frozenset(task.note.partition(",")[0].split()) for task in tasks]
    assert len(set(class_sets)) == 14
    assert all(len(classes) == 4 for classes in class_sets)
    names = [task.note.split(", ")[1] for task in tasks]
    assert set(names[:7]) == set(names[7:]) == set(data.TRANSFORMS)
    for task in tasks:
        for (x, y), per_class in ((task.train, 10), (task.valid, 20)):
            assert y.bincount().tolist() == [per_class] * 4
            assert x.shape == (4 * per_class, 1, 8, 8)
        for x, _ in (task.train, task.valid, task.test):
            assert x.min() >= -0.5
            assert x.max() <= 0.5


def test_tasks_follow_from_the_seed(digits):
    one, same = data.make_tasks(digits, 3, seed=1), data.make_tasks(digits, 3, seed=1)
    other = data.make_tasks(digits, 3, seed=2)
    for a, b in zip(one, same, strict=True):
        assert a.note == b.note
        for (x, y), (x_again, y_again) in zip(
            (a.train, a.valid, a.test), (b.train, b.valid, b.test), strict=True
        ):
            assert torch.equal(x, x_again)
            assert torch.equal(y, y_again)
    assert [task.note for task in one] != [task.note for task in other]


def test_tasks_with_some_transformations_only(digits):
    chosen = ("inverted", "as is")
    tasks = data.make_tasks(digits, 6, seed=0, transforms=chosen)
    names = [task.note.split(", ")[1] for task in tasks]
    assert all(set(names[i : i + 2]) == set(chosen) for i in (0, 2, 4))
    everything = data.make_tasks(digits, 6, seed=0, transforms=list(data.TRANSFORMS))
    default = data.make_tasks(digits, 6, seed=0)
    assert [task.note for task in everything] == [task.note for task in default]
    assert all(torch.equal(a.test[0], b.test[0]) for a, b in zip(everything, default, strict=True))


def test_noise_is_clipped_and_labels_follow_the_order_of_the_note(digits, monkeypatch):
    monkeypatch.setattr(data, "TRANSFORMS", {"as is": data.TRANSFORMS["as is"]})
    monkeypatch.setattr(data, "NOISE_MEANS", (0.0,))
    monkeypatch.setattr(data, "NOISE_SDS", (0.0,))
    (clean,) = data.make_tasks(digits, 1, seed=0)
    label_of = dict(zip(map(bytes, map(_bytes, digits.train[0])), digits.train[1], strict=True))
    classes = [int(name) for name in clean.note.partition(",")[0].split()]
    x, y = clean.train
    assert [label_of[_bytes(image)] for image in x] == [classes[label] for label in y]

    monkeypatch.setattr(data, "NOISE_MEANS", (0.25,))
    (brighter,) = data.make_tasks(digits, 1, seed=0)
    assert torch.equal(brighter.train[0], (x + 0.25).clamp(-0.5, 0.5))


def _bytes(image) -> bytes:
    return image.numpy().tobytes()


@pytest.mark.parametrize("name", data.TRANSFORMS)
def test_transformations_are_fixed_and_lose_nothing(name):
    side = 5
    x = torch.arange(2 * side * side, dtype=torch.float32).view(2, 1, side, side)
    alter = data.TRANSFORMS[name](side, torch.Generator().manual_seed(0))
    once = alter(x)
    assert once.shape == x.shape
    assert torch.equal(once, alter(x))
    assert torch.equal(once.abs().flatten(1).sort(1).values, x.flatten(1))
    assert torch.equal(once, x) == (name == "as is")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"classes_per_task": 11}, r"classes_per_task must be in \[1, 10\], got 11"),
        ({"classes_per_task": 10, "n_tasks": 2}, r"n_tasks must be in \[1, 1\]"),
        ({"n_tasks": 0}, r"n_tasks must be in \[1, 210\]"),
        ({"transforms": ()}, r"transforms: expected some of 'as is', .*'pixels mixed', got \(\)"),
        ({"transforms": ("as is", "upside down")}, r"got \('as is', 'upside down'\)"),
        ({"transforms": "as is"}, r"transforms: expected some of .*, got 'as is'"),
    ],
)
def test_impossible_sequences(digits, options, message):
    with pytest.raises(ValueError, match=message):
        data.make_tasks(digits, **{"n_tasks": 1, "seed": 0, **options})


# Fashion-MNIST


def idx(values: torch.Tensor) -> bytes:
    shape = struct.pack(f">{values.dim()}I", *values.shape)
    return bytes([0, 0, 8, values.dim()]) + shape + values.to(torch.uint8).numpy().tobytes()


@pytest.fixture
def folder(tmp_path):
    for part, n in (("train", 20), ("t10k", 10)):
        images = (torch.arange(n * 16) % 256).view(n, 4, 4)
        images_file = tmp_path / f"{part}-images-idx3-ubyte.gz"
        images_file.write_bytes(gzip.compress(idx(images)))
        (tmp_path / f"{part}-labels-idx1-ubyte").write_bytes(idx(torch.arange(n) % 10))
    return tmp_path


def test_idx_files_gzipped_or_not(folder):
    images = data.fashion_mnist(folder, seed=0)
    assert [len(y) for _, y in (images.train, images.valid, images.test)] == [18, 2, 10]
    x, y = images.test
    assert y.tolist() == list(range(10))
    expected = (torch.arange(160) % 256 / 255 - 0.5).view(10, 1, 4, 4)
    assert torch.equal(x, expected)


@pytest.mark.parametrize(
    ("name", "content", "error", "message"),
    [
        ("t10k-labels-idx1-ubyte", None, FileNotFoundError, "Debian's package"),
        ("t10k-labels-idx1-ubyte", b"PNG", ValueError, "not an idx file of bytes with 1 dim"),
        ("t10k-labels-idx1-ubyte", idx(torch.arange(10))[:-1], ValueError, "9 values for shape"),
        ("t10k-labels-idx1-ubyte", idx(torch.arange(9)), ValueError, "10 t10k images but 9 label"),
        ("t10k-images-idx3-ubyte.gz", b"plain", ValueError, "idx3-ubyte.gz: Not a gzipped file"),
    ],
)
def test_broken_folder(folder, name, content, error, message):
    if content is None:
        (folder / name).unlink()
    else:
        (folder / name).write_bytes(content)
    with pytest.raises(error, match=message):
        data.fashion_mnist(folder, seed=0)


@pytest.mark.skipif(not DEBIAN_FOLDER.is_dir(), reason="package dataset-fashion-mnist is missing")
def test_fashion_mnist_of_debian():
    images = data.fashion_mnist(DEBIAN_FOLDER, seed=0)
    assert images.train[0].shape == (54_000, 1, 28, 28)
    assert images.test[1].bincount().tolist() == [1000] * 10
