"""MNIST's file format, idx: MNIST itself and Fashion-MNIST."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np

from lasem_fast.datasets.published import Labelled, Published
from lasem_fast.datasets.source import Root, Source

MNIST = Source(
    "MNIST",
    "https://yann.lecun.com/exdb/mnist/",
    ("", "mnist", "MNIST", "MNIST/raw", "raw"),
    "put its four idx files, gzipped or not, into that folder",
)
DIGITS = tuple("0123456789")

FASHION_MNIST = Source(
    "Fashion-MNIST",
    "https://github.com/zalandoresearch/fashion-mnist",
    ("", "fashion-mnist", "fashion_mnist", "FashionMNIST/raw", "raw"),
    "pass the folder of its four idx files, gzipped or not (Debian's package "
    "dataset-fashion-mnist puts them in /usr/share/datasets/fashion-mnist)",
)
GARMENTS = (
    "T-shirt", "trouser", "pullover", "dress", "coat",
    "sandal", "shirt", "sneaker", "bag", "boot",
)  # fmt: skip

FILES = tuple(
    f"{part}-{kind}-ubyte[.gz]"
    for part in ("train", "t10k")
    for kind in ("images-idx3", "labels-idx1")
)


def read_mnist(root: Root) -> Published:
    """MNIST, 28 x 28 grey pixels: 60,000 and 10,000 images.

    Raises:
        FileNotFoundError, ValueError: a file is missing, or is not as it was published.
    """
    return Published(_read_pair(MNIST, root, "train"), _read_pair(MNIST, root, "t10k"), DIGITS)


def read_fashion_mnist(root: Root) -> Published:
    """Fashion-MNIST, of the same format and sizes; raises as :func:`read_mnist` does."""
    train, test = (_read_pair(FASHION_MNIST, root, part) for part in ("train", "t10k"))
    return Published(train, test, GARMENTS)


def _read_pair(source: Source, root: Root, part: str) -> Labelled:
    x = _read_idx(source, root, f"{part}-images", n_dims=3)
    y = _read_idx(source, root, f"{part}-labels", n_dims=1)
    labels = _find(source, root, f"{part}-labels", n_dims=1)
    if len(x) != len(y):
        raise source.damaged(labels, f"{len(x)} {part} images but {len(y)} labels")
    if y.max(initial=0) > 9:
        raise source.damaged(labels, f"expected labels in 0..9, got {y.max()}")
    return Labelled(x[:, None], y.astype(np.int64))


def _find(source: Source, root: Root, stem: str, n_dims: int) -> Path:
    name = f"{stem}-idx{n_dims}-ubyte"
    return source.find(root, f"{name}.gz", name, f"{stem}.idx{n_dims}-ubyte")


def _read_idx(source: Source, root: Root, stem: str, n_dims: int) -> np.ndarray:
    """One idx file of unsigned bytes: 00 00 08 <dims>, big-endian sizes, then the values."""
    path = _find(source, root, stem, n_dims)
    raw = source.read(path)
    start = 4 + 4 * n_dims
    if raw[:4] != bytes([0, 0, 8, n_dims]) or len(raw) < start:
        raise source.damaged(path, f"not an idx file of bytes with {n_dims} dimensions")
    shape = tuple(np.frombuffer(raw, ">u4", n_dims, offset=4).tolist())
    if len(raw) - start != math.prod(shape):
        raise source.damaged(path, f"{len(raw) - start} values for shape {shape}")
    return np.frombuffer(raw, np.uint8, offset=start).reshape(shape)
