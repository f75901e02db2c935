"""The readers of idx, STL-10 and Office-Home, and what they say of files that are damaged."""

from __future__ import annotations

import gzip
import io
from pathlib import Path

import numpy as np
import pytest
from published_files import idx, pixels, write_idx_pairs

from lasem_fast.datasets.idx_files import read_fashion_mnist, read_mnist
from lasem_fast.datasets.office_home_images import CLASSES, read_domain
from lasem_fast.datasets.stl10_files import read_stl10


def rewritten(path: Path, change) -> None:
    path.write_bytes(change(path.read_bytes()))


# idx


@pytest.mark.parametrize("read", [read_mnist, read_fashion_mnist])
@pytest.mark.parametrize("kind", ["plain", "gz", "dotted"])
@pytest.mark.parametrize("below", ["", "raw"])
def test_idx_files(tmp_path, read, kind, below):
    folder = tmp_path / below
    folder.mkdir(exist_ok=True)
    train, test = (pixels(7, 5, 4), np.arange(7)), (pixels(3, 5, 4, seed=1), np.array([9, 0, 9]))
    write_idx_pairs(folder, train, test)
    for path in list(folder.glob("*ubyte")):
        if kind == "gz":
            path.with_name(f"{path.name}.gz").write_bytes(gzip.compress(path.read_bytes()))
            path.unlink()
        elif kind == "dotted":
            path.rename(path.with_name(path.name.replace("-idx", ".idx")))
    published = read(tmp_path)
    for part, (x, y) in ((published.train, train), (published.test, test)):
        assert (part.x.dtype, part.y.dtype) == (np.uint8, np.int64)
        np.testing.assert_array_equal(part.x, x[:, None])
        np.testing.assert_array_equal(part.y, y)


LABELS = idx(np.arange(7))


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("train-labels-idx1-ubyte", LABELS[:-1], r"train-labels.*6 values for shape \(7,\)"),
        ("train-labels-idx1-ubyte", LABELS + b"0", r"8 values for shape \(7,\)"),
        ("train-labels-idx1-ubyte", LABELS[:6], "not an idx file of bytes with 1 dimensions"),
        ("train-labels-idx1-ubyte", b"\0\0\x0d\1" + LABELS[4:], "not an idx file of bytes"),
        ("train-images-idx3-ubyte", LABELS, "train-images.*not an idx file .* 3 dimensions"),
        ("train-labels-idx1-ubyte", idx(np.arange(6)), "7 train images but 6 labels"),
        ("train-labels-idx1-ubyte", idx(np.arange(7) + 4), r"expected labels in 0\.\.9, got 10"),
        ("train-labels-idx1-ubyte.gz", gzip.compress(LABELS)[:-9], "gz: Compressed file ended"),
        ("train-labels-idx1-ubyte.gz", gzip.compress(LABELS)[:-8] + bytes(8), "CRC check failed"),
    ],
)
def test_idx_files_that_are_damaged(tmp_path, name, content, message):
    write_idx_pairs(tmp_path, (pixels(7, 5, 4), np.arange(7)), (pixels(3, 5, 4), np.arange(3)))
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=message):
        read_mnist(tmp_path)


def test_idx_files_that_are_missing(tmp_path):
    with pytest.raises(FileNotFoundError) as error:
        read_mnist(tmp_path / "nowhere")
    for part in ("MNIST: no train-images-idx3-ubyte.gz or", "no such folder", "yann.lecun.com"):
        assert part in str(error.value)
    with pytest.raises(
        TypeError, match="root: expected the folder of Fashion-MNIST's files, got 3"
    ):
        read_fashion_mnist(3)


# STL-10


@pytest.fixture
def stl10_folder(tmp_path):
    folder = tmp_path / "stl10_binary"
    folder.mkdir()
    for part, per_class in (("train", 2), ("test", 1)):
        y = np.random.default_rng(per_class).permutation(np.repeat(np.arange(1, 11), per_class))
        (folder / f"{part}_y.bin").write_bytes(y.astype(np.uint8).tobytes())
        # on the disk a column follows the other
        x = pixels(len(y), 3, 96, 96, seed=per_class)
        (folder / f"{part}_X.bin").write_bytes(x.swapaxes(2, 3).tobytes())
    return folder


def test_stl10(stl10_folder):
    read = read_stl10(stl10_folder.parent)
    for part, per_class in ((read.train, 2), (read.test, 1)):
        np.testing.assert_array_equal(part.x, pixels(10 * per_class, 3, 96, 96, seed=per_class))
        expected = np.random.default_rng(per_class).permutation(np.repeat(np.arange(10), per_class))
        np.testing.assert_array_equal(part.y, expected)
    assert read.class_names[0] == "airplane" and read.class_names[9] == "truck"


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("train_X.bin", lambda raw: raw[:-1], "train_X.bin: expected images of 27648 bytes"),
        ("train_X.bin", lambda raw: b"", "got 0 in all"),
        ("test_X.bin", lambda raw: raw[27648:], "test_y.bin: 10 labels for the 9 images"),
        ("test_y.bin", lambda raw: b"\0" + raw[1:], r"expected labels in 1\.\.10, got 0 to"),
        ("test_y.bin", lambda raw: b"\x0b" + raw[1:], r"expected labels in 1\.\.10, got .* to 11"),
        ("test_y.bin", lambda raw: bytes([3] * 10), "equally many images of each class"),
    ],
)
def test_stl10_files_that_are_damaged(stl10_folder, name, change, message):
    rewritten(stl10_folder / name, change)
    with pytest.raises(ValueError, match=message):
        read_stl10(stl10_folder)


def test_stl10_files_that_are_missing(stl10_folder):
    (stl10_folder / "test_y.bin").unlink()
    with pytest.raises(FileNotFoundError, match=r"no test_y.bin in .*acoates/stl10.*stl10_binary"):
        read_stl10(stl10_folder.parent)


# Office-Home


@pytest.fixture
def pillow():
    return pytest.importorskip("PIL.Image")


def encoded(pillow, array: np.ndarray, kind: str) -> bytes:
    stream = io.BytesIO()
    pillow.fromarray(array).save(stream, format=kind)
    return stream.getvalue()


@pytest.mark.parametrize("spelling", ["Real World", "RealWorld", "Real_World"])
def test_office_home_finds_its_folders_and_sorts_its_images(tmp_path, pillow, spelling):
    folder = tmp_path / "OfficeHomeDataset_10072016" / spelling / "alarm_clock"
    folder.mkdir(parents=True)
    for i, name in enumerate(("00010.jpg", "00002.JPG", "00001.png", "._1.jpg")):
        image = np.full((20 + i, 30, 3), 40 * i + 10, dtype=np.uint8)
        (folder / name).write_bytes(encoded(pillow, image, "PNG"))
    images = read_domain(tmp_path, "Real World", [CLASSES.index("Alarm_Clock")])
    assert images[0].shape == (3, 3, 128, 128) and images[0].dtype == np.uint8
    assert [set(image.flat) for image in images[0]] == [{90}, {50}, {10}]


def test_office_home_reduces_with_anti_aliasing(tmp_path, pillow):
    folder = tmp_path / "Product" / "Bed"
    folder.mkdir(parents=True)
    image = pixels(256, 256, 3)
    (folder / "00001.png").write_bytes(encoded(pillow, image, "PNG"))
    ((found,),) = read_domain(tmp_path, "Product", [3]).values()
    # A linear filter twice as wide at half the size: weights by distance 1.5, 0.5, 0.5, 1.5 of 2.
    weights = np.array([0.25, 0.75, 0.75, 0.25]) / 2
    for axis in (0, 1):
        windows = np.lib.stride_tricks.sliding_window_view(image, 4, axis=axis)
        reduced = windows[(slice(None),) * axis + (slice(1, None, 2),)] @ weights
        image = np.pad(reduced, [(1, 1) if a == axis else (0, 0) for a in range(3)])
    inner = (slice(None), slice(1, -1), slice(1, -1))
    error = np.abs(found.astype(float) - image.transpose(2, 0, 1))[inner]
    assert error.max() <= 1  # rounded to bytes twice


def test_office_home_in_grey_or_with_transparency_is_read_in_colour(tmp_path, pillow):
    folder = tmp_path / "Product" / "Bed"
    folder.mkdir(parents=True)
    (folder / "1.png").write_bytes(encoded(pillow, np.full((9, 9), 7, np.uint8), "PNG"))
    (folder / "2.png").write_bytes(encoded(pillow, np.full((9, 9, 4), 8, np.uint8), "PNG"))
    images = read_domain(tmp_path, "Product", [3])[3]
    assert [set(image.flat) for image in images] == [{7}, {8}]


def test_office_home_that_is_damaged_or_missing(tmp_path, pillow):
    with pytest.raises(FileNotFoundError, match="no Real World or RealWorld or Real_World in"):
        read_domain(tmp_path, "Real World", [3])
    (tmp_path / "Product").mkdir()
    with pytest.raises(FileNotFoundError, match=r"no folder Bed in .*hemanthdv"):
        read_domain(tmp_path, "Product", [3])
    (tmp_path / "Product" / "Bed").mkdir()
    with pytest.raises(ValueError, match="Bed: no image"):
        read_domain(tmp_path, "Product", [3])
    path = tmp_path / "Product" / "Bed" / "00001.jpg"
    whole = encoded(pillow, pixels(64, 64, 3), "JPEG")
    for content in (b"", b"text", whole[: len(whole) // 2]):
        path.write_bytes(content)
        with pytest.raises(ValueError, match=r"00001\.jpg: not an image that can be read"):
            read_domain(tmp_path, "Product", [3])
