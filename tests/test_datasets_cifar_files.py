"""The readers of pickles and of CIFAR give what the formats say, and refuse what is damaged."""

from __future__ import annotations

import os
import pickle

import numpy as np
import pytest
from published_files import array_opcodes, pixels, python2_pickle

from lasem_fast.datasets.array_pickle import load_arrays
from lasem_fast.datasets.cifar100_classes import COARSE_OF_FINE, FINE_NAMES
from lasem_fast.datasets.cifar_files import CIFAR10_NAMES, read_cifar10, read_cifar100

# Pickles of arrays


def test_what_python_2_pickled_is_read():
    item = {"data": pixels(3, 4), "labels": [3, -1, 250], "name": "a b", "big": np.arange(6) - 3}
    read = load_arrays(python2_pickle(item))
    assert list(read) == list(item)
    assert read["labels"] == [3, -1, 250] and read["name"] == "a b"
    for key in ("data", "big"):
        assert read[key].dtype == item[key].dtype
        np.testing.assert_array_equal(read[key], item[key])


@pytest.mark.parametrize("order", ["C", "F"])
@pytest.mark.parametrize("dtype", [">i4", "<u2", "|u1", "<f8"])
def test_what_python_3_pickles_for_python_2_is_read(order, dtype):
    array = np.asarray(np.arange(6).reshape(2, 3), dtype=dtype, order=order)
    read = load_arrays(pickle.dumps({b"data": array, "raw": b"\xff"}, protocol=2))
    assert read["raw"] == b"\xff"
    assert read["data"].dtype == array.dtype
    np.testing.assert_array_equal(read["data"], array)


class Calls:
    def __init__(self, function, *args):
        self.call = function, args

    def __reduce__(self):
        return self.call


@pytest.mark.parametrize(
    ("item", "named"),
    [
        (Calls(os.system, "touch called"), r"it names (posix|nt).system"),
        (Calls(eval, "open('called', 'w')"), "it names builtins.eval"),
        (Calls(np.load, "called"), "it names numpy.*load"),
        (Calls(bytes.fromhex, "00"), "it names builtins.getattr"),
        (np.array([{}]), "dtype 'O8' is not expected|dtype 'O8'"),
        (np.array(["text"]), "dtype 'U4'"),
        ({1, 2}, "it names builtins.set"),
        (1j, "it names builtins.complex"),
    ],
)
def test_a_pickle_that_names_anything_else_is_refused(item, named, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match=named):
        load_arrays(pickle.dumps(item, protocol=2, fix_imports=False))
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("opcodes", "why"),
    [
        (array_opcodes("u1", (2, 2), b"abc"), r"3 bytes for an array of shape \(2, 2\)"),
        (array_opcodes("u1", (-1, -3), b"abc"), "one unknown dimension"),
        # addresses, taken for objects
        (array_opcodes("O8", (1,), b"12345678"), "dtype 'O8' are not expected"),
        (b"cnumpy\nndarray\n(K\x01tR", "made in an unusual way"),
        (b"cnumpy\nndarray\n(N}U\x01aK\x01stb", "a function with a state"),
        (b"cnumpy\ndtype\n", "a _StandIn is not expected"),
        (b"c_codecs\nencode\n(U\x01aU\x03ziptR", "text in 'zip' is not expected"),
        (b"]q\x00h\x00a", "recursion"),  # a list that holds itself
    ],
)
def test_arrays_that_are_not_as_numpy_writes_them_are_refused(opcodes, why):
    with pytest.raises(ValueError, match=f"not a pickle of arrays.*{why}"):
        load_arrays(b"\x80\x02" + opcodes + b".")


def test_a_pickle_cut_anywhere_is_refused():
    whole = python2_pickle({"data": pixels(2, 3), "labels": [1, 2], "name": "a"})
    load_arrays(whole)
    for end in range(len(whole)):
        with pytest.raises(ValueError, match="not a pickle of arrays"):
            load_arrays(whole[:end])


# CIFAR


def cifar100_parts() -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Two images of each class in the training file, one in the other, in some order."""
    rng = np.random.default_rng(0)
    return {
        "train": (pixels(200, 3, 32, 32), rng.permutation(np.repeat(np.arange(100), 2))),
        "test": (pixels(100, 3, 32, 32, seed=1), rng.permutation(100)),
    }


@pytest.fixture
def cifar100_folder(tmp_path):
    folder = tmp_path / "cifar-100-python"
    folder.mkdir()
    for name, (x, y) in cifar100_parts().items():
        content = {
            "filenames": ["a.png"] * len(x),
            "batch_label": f"{name} batch 1 of 1",
            "fine_labels": y.tolist(),
            "coarse_labels": [COARSE_OF_FINE[label] for label in y],
            "data": x.reshape(len(x), -1),
        }
        (folder / name).write_bytes(python2_pickle(content))
    (folder / "meta").write_bytes(python2_pickle({"fine_label_names": list(FINE_NAMES)}))
    return folder


@pytest.mark.parametrize("from_above", [True, False])
def test_cifar100_in_python_files(cifar100_folder, from_above):
    read = read_cifar100(cifar100_folder.parent if from_above else cifar100_folder)
    assert read.class_names == FINE_NAMES
    for part, (x, y) in zip((read.train, read.test), cifar100_parts().values(), strict=True):
        assert (part.x.dtype, part.y.dtype) == (np.uint8, np.int64)
        np.testing.assert_array_equal(part.x, x)
        np.testing.assert_array_equal(part.y, y)


def test_cifar100_in_binary_files(tmp_path):
    (tmp_path / "cifar-100-binary").mkdir()
    for name, (x, y) in cifar100_parts().items():
        coarse = np.array(COARSE_OF_FINE, dtype=np.uint8)[y]
        records = np.concatenate(
            [coarse[:, None], y.astype(np.uint8)[:, None], x.reshape(len(x), -1)], axis=1
        )
        (tmp_path / "cifar-100-binary" / f"{name}.bin").write_bytes(records.tobytes())
    read = read_cifar100(tmp_path)
    for part, (x, y) in zip((read.train, read.test), cifar100_parts().values(), strict=True):
        np.testing.assert_array_equal(part.x, x)
        np.testing.assert_array_equal(part.y, y)

    path = tmp_path / "cifar-100-binary" / "train.bin"
    whole = path.read_bytes()
    for content, message in (
        (whole[:-1], "train.bin: expected records of 3074 bytes each, got 614799 bytes"),
        (whole[:-3074], "train.bin: expected equally many images of each class, got 1 to 2"),
        (b"", "got 0 bytes in all"),
        (b"\x14" + whole[1:], "train.bin: image 0 has class .* and superclass 20"),
        (whole[:1] + b"\x64" + whole[2:], r"expected labels in 0\.\.99, got 0 to 100"),
    ):
        path.write_bytes(content)
        with pytest.raises(ValueError, match=message) as error:
            read_cifar100(tmp_path)
        assert "https://www.cs.toronto.edu/~kriz/cifar.html" in str(error.value)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"fine_labels": None}, "it has no fine_labels"),
        ({"data": [1, 2]}, r"expected data to be uint8 of shape \[N, 3072\], got list"),
        ({"data": pixels(200, 4)}, r"got uint8 of shape \(200, 4\)"),
        ({"data": np.zeros((200, 3072), np.int32)}, "got int32 of shape"),
        ({"fine_labels": [0] * 199}, "200 images but 199 fine_labels"),
        ({"fine_labels": ["0"] * 200}, "expected fine_labels to be a list of whole numbers"),
        ({"fine_labels": [100] * 200}, r"expected labels in 0\.\.99, got 100 to 100"),
        ({"fine_labels": [-1] * 200}, r"expected labels in 0\.\.99, got -1 to -1"),
        ({"coarse_labels": [0] * 200}, "has class .* and superclass 0"),
        ({"fine_labels": [4] * 200, "coarse_labels": [0] * 200}, "equally many images"),
    ],
)
def test_cifar100_files_of_other_content(cifar100_folder, change, message):
    path = cifar100_folder / "train"
    content = load_arrays(path.read_bytes()) | change
    kept = {key: value for key, value in content.items() if value is not None}
    path.write_bytes(python2_pickle(kept))
    with pytest.raises(ValueError, match=message) as error:
        read_cifar100(cifar100_folder)
    assert str(error.value).startswith(f"{path}: ")


def test_cifar100_files_that_are_cut_missing_or_of_other_classes(cifar100_folder):
    path = cifar100_folder / "test"
    whole = path.read_bytes()
    path.write_bytes(whole[:-100])
    with pytest.raises(ValueError, match=r"test: not a pickle of arrays.*get CIFAR-100 anew from"):
        read_cifar100(cifar100_folder)
    path.unlink()
    with pytest.raises(FileNotFoundError) as error:
        read_cifar100(cifar100_folder)
    for part in ("CIFAR-100: no test in", str(cifar100_folder), "https://", "cifar-100-python.tar"):
        assert part in str(error.value)
    path.write_bytes(whole)
    names = ["fruit", *FINE_NAMES[1:]]
    (cifar100_folder / "meta").write_bytes(python2_pickle({"fine_label_names": names}))
    with pytest.raises(ValueError, match=r"meta: expected fine_label_names apple .*, got .'fruit"):
        read_cifar100(cifar100_folder)


@pytest.mark.parametrize("kind", ["python", "binary"])
def test_cifar10_in_batches(tmp_path, kind):
    folder = tmp_path / ("cifar-10-batches-py" if kind == "python" else "cifar-10-batches-bin")
    folder.mkdir()
    x, y = pixels(60, 3, 32, 32), np.random.default_rng(2).permutation(np.arange(60) % 10)
    y[50:] = np.arange(10)[::-1]
    y[:50] = np.random.default_rng(3).permutation(np.arange(50) % 10)
    names = [*(f"data_batch_{i}" for i in range(1, 6)), "test_batch"]
    for i, name in enumerate(names):
        own = slice(10 * i, 10 * i + 10)
        rows = x[own].reshape(10, -1)
        if kind == "python":
            content = python2_pickle({"data": rows, "labels": y[own].tolist()})
            (folder / name).write_bytes(content)
        else:
            records = np.concatenate([y[own, None].astype(np.uint8), rows], axis=1)
            (folder / f"{name}.bin").write_bytes(records.tobytes())
    read = read_cifar10(tmp_path)
    assert read.class_names == CIFAR10_NAMES
    np.testing.assert_array_equal(read.train.x, x[:50])
    np.testing.assert_array_equal(read.train.y, y[:50])
    np.testing.assert_array_equal(read.test.x, x[50:])
    np.testing.assert_array_equal(read.test.y, y[50:])
    (folder / names[2]).unlink(missing_ok=True)
    (folder / f"{names[2]}.bin").unlink(missing_ok=True)
    with pytest.raises(FileNotFoundError, match=r"CIFAR-10: no data_batch_3 in .*tar.gz"):
        read_cifar10(tmp_path)
