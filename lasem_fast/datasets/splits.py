"""From rows of published images to the tensors of a task's split."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch

from lasem_fast.datasets.published import Labelled
from lasem_fast.lifelong import Task
from lasem_fast.lifelong.task_data import Split

# From uint8 images [N, C, H, W] to float32 ones.
Prepare = Callable[[np.ndarray], np.ndarray]


def training_and_validation(
    rows: np.ndarray, generator: np.random.Generator
) -> tuple[np.ndarray, np.ndarray]:
    """A random split of a class's n rows: 5n // 6 to train on, n // 6 for validation.

    The ratio of validation to training is 0.2: 416 and 83 of CIFAR-100's 500.
    """
    shuffled = generator.permutation(rows)
    n_valid, n_train = len(rows) // 6, 5 * len(rows) // 6
    return shuffled[n_valid : n_valid + n_train], shuffled[:n_valid]


def split_of(images: Labelled, rows: np.ndarray, labels: np.ndarray, prepare: Prepare) -> Split:
    """The tensors (x float32, y int64) of these rows, with a task's own labels."""
    x = np.ascontiguousarray(prepare(images.x[rows]), dtype=np.float32)
    return torch.from_numpy(x), torch.from_numpy(labels.astype(np.int64))


def labels_of(parts: list[np.ndarray]) -> np.ndarray:
    """0 for each row of the first part, 1 for each of the second, ..."""
    return np.repeat(np.arange(len(parts)), [len(part) for part in parts])


def task_of(number: int, splits: list[Split], n_classes: int, note: str) -> Task:
    """The task of this number, counted from 1, with splits in the order train, valid, test."""
    train, valid, test = splits
    return Task(f"task{number}", train, valid, test, n_classes=n_classes, note=note)


def standardise(x: np.ndarray, full_scale: int = 255) -> np.ndarray:
    """(x - mean) / max(sd, 1 / sqrt(n)) per channel of ``[N, C, H, W]``, as float32.

    ``x`` is uint8 and counts as x / full_scale; mean and sd are taken over all n = N * H * W
    values of the channel, and sd is the population's. The order of images does not matter.
    """
    levels = np.arange(256.0)  # of a pixel; what becomes of each is found once
    standardised = np.empty(x.shape, dtype=np.float32)
    for channel in range(x.shape[1]):
        counts = np.bincount(x[:, channel].ravel(), minlength=256)
        n = counts.sum()
        away = levels - counts @ levels / n
        sd = np.sqrt(counts @ away**2 / n)
        becomes = (away / max(sd, full_scale / np.sqrt(n))).astype(np.float32)
        standardised[:, channel] = becomes[x[:, channel]]
    return standardised


def unit_range(x: np.ndarray) -> np.ndarray:
    """x / 255 as float32."""
    return x.astype(np.float32) / 255
