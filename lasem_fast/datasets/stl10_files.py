"""STL-10 as it is published: bytes, column by column, and labels from 1."""

from __future__ import annotations

import numpy as np

from lasem_fast.datasets.published import Labelled, Published
from lasem_fast.datasets.source import Root, Source

STL10 = Source(
    "STL-10",
    "https://cs.stanford.edu/~acoates/stl10/",
    ("", "stl10_binary", "stl-10", "STL-10", "stl10"),
    "unpack stl10_binary.tar.gz there",
)
STL10_NAMES = (
    "airplane", "bird", "car", "cat", "deer", "dog", "horse", "monkey", "ship", "truck",
)  # fmt: skip
FILES = ("train_X.bin", "train_y.bin", "test_X.bin", "test_y.bin")
_SIDE = 96


def read_stl10(root: Root) -> Published:
    """STL-10's labelled images, 96 x 96 in colour: 500 and 800 of each class.

    Raises:
        FileNotFoundError, ValueError: a file is missing, or is not as it was published.
    """
    return Published(_read_part(root, "train"), _read_part(root, "test"), STL10_NAMES)


def _read_part(root: Root, part: str) -> Labelled:
    images, labels = STL10.find(root, f"{part}_X.bin"), STL10.find(root, f"{part}_y.bin")
    raw = np.frombuffer(images.read_bytes(), np.uint8)
    pixels = 3 * _SIDE * _SIDE
    if len(raw) == 0 or len(raw) % pixels:
        raise STL10.damaged(images, f"expected images of {pixels} bytes, got {len(raw)} in all")
    y = np.frombuffer(labels.read_bytes(), np.uint8).astype(np.int64) - 1
    if len(y) != len(raw) // pixels:
        raise STL10.damaged(
            labels, f"{len(y)} labels for the {len(raw) // pixels} images beside it"
        )
    if y.min() < 0 or y.max() > 9:
        raise STL10.damaged(labels, f"expected labels in 1..10, got {y.min() + 1} to {y.max() + 1}")
    counts = np.bincount(y, minlength=10)
    if counts.min() != counts.max():  # a broken download, cut between two images
        raise STL10.damaged(
            labels, f"expected equally many images of each class, got {counts.tolist()}"
        )
    # a column of the image follows the other
    return Labelled(raw.reshape(-1, 3, _SIDE, _SIDE).transpose(0, 1, 3, 2), y)
