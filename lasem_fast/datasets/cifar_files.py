"""CIFAR-10 and CIFAR-100 as they are published: pickles of Python 2, or plain records of bytes.

A row is an image of 32 x 32 pixels, 1,024 bytes of red, then of green, then of blue.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from lasem_fast.datasets.array_pickle import load_arrays
from lasem_fast.datasets.cifar100_classes import COARSE_OF_FINE, FINE_NAMES
from lasem_fast.datasets.published import Labelled, Published
from lasem_fast.datasets.source import Root, Source

_HOME = "https://www.cs.toronto.edu/~kriz/cifar.html"
CIFAR100 = Source(
    "CIFAR-100",
    _HOME,
    ("", "cifar-100-python", "cifar-100-binary"),
    "unpack cifar-100-python.tar.gz (or cifar-100-binary.tar.gz) there",
)
CIFAR10 = Source(
    "CIFAR-10",
    _HOME,
    ("", "cifar-10-batches-py", "cifar-10-batches-bin"),
    "unpack cifar-10-python.tar.gz (or cifar-10-binary.tar.gz) there",
)
CIFAR10_NAMES = (
    "airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck",
)  # fmt: skip
CIFAR10_TRAIN = tuple(f"data_batch_{i}" for i in range(1, 6))
_PIXELS = 3 * 32 * 32


def read_cifar100(root: Root) -> Published:
    """CIFAR-100: 500 and 100 images of each class. Classes are the fine labels.

    Raises:
        FileNotFoundError, ValueError: a file is missing, or is not as it was published.
    """
    _check_names(CIFAR100, root, "meta", "fine_label_names", FINE_NAMES)
    parts = []
    for name in ("train", "test"):
        if _is_binary(CIFAR100, root, name):
            path = CIFAR100.find(root, f"{name}.bin")
            x, labels = _read_records(CIFAR100, path, n_labels=2)
            coarse, fine = labels.T
        else:
            path = CIFAR100.find(root, name)
            x, (coarse, fine) = _read_pickle(CIFAR100, path, "coarse_labels", "fine_labels")
        _check_labels(CIFAR100, path, fine, 100)
        wrong = np.flatnonzero(np.asarray(COARSE_OF_FINE)[fine] != coarse)
        if len(wrong):
            first = int(wrong[0])
            raise CIFAR100.damaged(
                path, f"image {first} has class {fine[first]} and superclass {coarse[first]}"
            )
        _check_balance(CIFAR100, path, fine, 100)
        parts.append(Labelled(x, fine))
    return Published(*parts, FINE_NAMES)


def read_cifar10(root: Root) -> Published:
    """CIFAR-10: 5,000 and 1,000 images of each class; raises as :func:`read_cifar100` does."""
    _check_names(CIFAR10, root, "batches.meta", "label_names", CIFAR10_NAMES)
    parts = []
    for names in (CIFAR10_TRAIN, ("test_batch",)):
        batches = []
        for name in names:
            if _is_binary(CIFAR10, root, name):
                path = CIFAR10.find(root, f"{name}.bin")
                x, labels = _read_records(CIFAR10, path, n_labels=1)
                y = labels[:, 0]
            else:
                path = CIFAR10.find(root, name)
                x, (y,) = _read_pickle(CIFAR10, path, "labels")
            _check_labels(CIFAR10, path, y, 10)
            batches.append((x, y))
        x, y = (np.concatenate(columns) for columns in zip(*batches, strict=True))
        _check_balance(CIFAR10, path, y, 10)
        parts.append(Labelled(x, y))
    return Published(*parts, CIFAR10_NAMES)


def _is_binary(source: Source, root: Root, name: str) -> bool:
    return not source.has(root, name) and source.has(root, f"{name}.bin")


def _read_pickle(
    source: Source, path: Path, *labels: str
) -> tuple[np.ndarray, tuple[np.ndarray, ...]]:
    x, *columns = _items(source, path, "data", *labels)
    if not (isinstance(x, np.ndarray) and x.dtype == np.uint8 and x.shape[1:] == (_PIXELS,)):
        got = f"{x.dtype} of shape {x.shape}" if isinstance(x, np.ndarray) else type(x).__name__
        raise source.damaged(path, f"expected data to be uint8 of shape [N, {_PIXELS}], got {got}")
    named = zip(labels, columns, strict=True)
    return x.reshape(-1, 3, 32, 32), tuple(
        _integers(source, path, values, key, len(x)) for key, values in named
    )


def _items(source: Source, path: Path, *keys: str) -> list[Any]:
    try:
        content = load_arrays(path.read_bytes())
    except ValueError as error:
        raise source.damaged(path, str(error)) from error
    if not isinstance(content, dict):
        raise source.damaged(path, f"expected a dict, got {type(content).__name__}")
    missing = [key for key in keys if key not in content]
    if missing:
        raise source.damaged(path, f"it has no {' and no '.join(missing)}")
    return [content[key] for key in keys]


def _check_names(
    source: Source, root: Root, name: str, key: str, expected: tuple[str, ...]
) -> None:
    """The file that names the classes is not needed, but if it is there, it has to agree."""
    if source.has(root, name):
        path = source.find(root, name)
        (names,) = _items(source, path, key)
        if names != list(expected):
            raise source.damaged(path, f"expected {key} {' '.join(expected)}, got {names}")


def _integers(source: Source, path: Path, values: Any, key: str, n: int) -> np.ndarray:
    if isinstance(values, np.ndarray):
        values = values.tolist()
    if not isinstance(values, list) or not all(
        type(value) is int and abs(value) < 2**31 for value in values
    ):
        raise source.damaged(path, f"expected {key} to be a list of whole numbers")
    if len(values) != n:
        raise source.damaged(path, f"{n} images but {len(values)} {key}")
    return np.array(values, dtype=np.int64)


def _read_records(source: Source, path: Path, n_labels: int) -> tuple[np.ndarray, np.ndarray]:
    raw = np.frombuffer(path.read_bytes(), np.uint8)
    length = n_labels + _PIXELS
    if len(raw) == 0 or len(raw) % length:
        raise source.damaged(
            path, f"expected records of {length} bytes each, got {len(raw)} bytes in all"
        )
    records = raw.reshape(-1, length)
    x = np.ascontiguousarray(records[:, n_labels:]).reshape(-1, 3, 32, 32)
    return x, records[:, :n_labels].astype(np.int64)


def _check_labels(source: Source, path: Path, y: np.ndarray, n_classes: int) -> None:
    if len(y) and (y.min() < 0 or y.max() >= n_classes):
        raise source.damaged(
            path, f"expected labels in 0..{n_classes - 1}, got {y.min()} to {y.max()}"
        )


def _check_balance(source: Source, path: Path, y: np.ndarray, n_classes: int) -> None:
    """Of every class equally many: records that a broken download lacks show nowhere else."""
    counts = np.bincount(y, minlength=n_classes)
    if counts.min() != counts.max() or not counts.min():
        raise source.damaged(
            path, f"expected equally many images of each class, got {counts.min()} to "
            f"{counts.max()} (this file, and those before it)",
        )  # fmt: skip
