"""Images that carry their row number in their pixels, and checks of sequences of tasks."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from lasem_fast.datasets.published import Labelled, Published
from lasem_fast.lifelong import Task


def numbered(y: np.ndarray, channels: int = 3) -> Labelled:
    """For each label an image of 3 x 1 or, with one channel, 1 x 3 pixels."""
    rows = np.arange(len(y))
    digits = np.stack([rows % 256, rows // 256 % 256, rows // 65536], axis=1).astype(np.uint8)
    shape = (-1, 3, 1, 1) if channels == 3 else (-1, 1, 1, 3)
    return Labelled(digits.reshape(shape), y.astype(np.int64))


def rows(x: Tensor) -> np.ndarray:
    """The row numbers of images whose bytes were kept."""
    values = x.flatten(1).round().long().numpy()
    return values @ np.array([1, 256, 65536])


def balanced(n_classes: int, train: int, test: int, names: list[str]) -> Published:
    """So many numbered images of each class, in a random order."""
    rng = np.random.default_rng(0)
    parts = (rng.permutation(np.repeat(np.arange(n_classes), n)) for n in (train, test))
    return Published(*map(numbered, parts), tuple(names))


def as_they_are(x: np.ndarray) -> np.ndarray:
    """In place of standardisation."""
    return x.astype(np.float32)


def same(one: Sequence[Task], other: Sequence[Task]) -> bool:
    """Whether two sequences hold equal tensors."""
    return all(
        torch.equal(a, b)
        for task, again in zip(one, other, strict=True)
        for (_, pair), (_, pair_again) in zip(task.splits(), again.splits(), strict=True)
        for a, b in zip(pair, pair_again, strict=True)
    )


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
