"""Sequences of small, diverse image tasks in the manner of the paper's STL-10 set.

Each task has a few classes in random order, in a combination no other task has; Gaussian noise
with a mean and a standard deviation drawn for the task, then clipped to the pixel range; and one
fixed transformation of the picture. Some transformations keep what early stages need (inversion
keeps edges), some what late stages need, and a permutation of all pixels neither: which stages
are worth sharing differs from task to task.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from lasem_fast.datasets.idx_files import read_fashion_mnist
from lasem_fast.datasets.published import Labelled
from lasem_fast.lifelong import Task

NOISE_MEANS = (-0.1, -0.05, 0.0, 0.05)
NOISE_SDS = (0.0, 0.1, 0.2)
TEST_PER_CLASS = 75  # at most: all of the digits, and evaluation stays cheap on larger images


@dataclass(frozen=True)
class Images:
    """Grey images ``[N, 1, side, side]`` float32 in [-0.5, 0.5] and labels ``[N]`` int64."""

    train: tuple[Tensor, Tensor]
    valid: tuple[Tensor, Tensor]
    test: tuple[Tensor, Tensor]
    class_names: tuple[str, ...]

    @property
    def side(self) -> int:
        return self.train[0].shape[-1]


def digits(seed: int) -> Images:
    """scikit-learn's 1,797 digits of 8 x 8 pixels, split 40% / 20% / 40% within each class."""
    from sklearn.datasets import load_digits

    bunch = load_digits()
    x = torch.from_numpy(bunch.images).float().div(16).sub(0.5).unsqueeze(1)
    y = torch.from_numpy(bunch.target).long()
    generator = torch.Generator().manual_seed(seed)
    parts: tuple[list[Tensor], ...] = ([], [], [])
    for label in range(10):
        rows = _shuffled((y == label).nonzero().flatten(), generator)
        n_train, n_valid = int(0.4 * len(rows)), int(0.2 * len(rows))
        sizes = [n_train, n_valid, len(rows) - n_train - n_valid]
        for part, chosen in zip(parts, rows.split(sizes), strict=True):
            part.append(chosen)
    train, valid, test = (torch.cat(part) for part in parts)
    names = tuple(str(label) for label in range(10))
    return Images((x[train], y[train]), (x[valid], y[valid]), (x[test], y[test]), names)


def fashion_mnist(root: str | Path, seed: int) -> Images:
    """Fashion-MNIST (28 x 28) from its four idx files in ``root``, gzipped or not.

    A tenth of the 60,000 training images, drawn at random, is for validation. Raises
    ``FileNotFoundError`` or ``ValueError`` where a file is missing or is not what it should be.
    """
    published = read_fashion_mnist(root)
    x, y = _tensors(published.train)
    order = _shuffled(torch.arange(len(x)), torch.Generator().manual_seed(seed))
    valid, train = order.split([len(x) // 10, len(x) - len(x) // 10])
    return Images(
        (x[train], y[train]), (x[valid], y[valid]), _tensors(published.test), published.class_names
    )


def make_tasks(
    images: Images,
    n_tasks: int,
    *,
    seed: int,
    classes_per_task: int = 4,
    train_per_class: int = 10,
    valid_per_class: int = 20,
    transforms: Sequence[str] | None = None,
) -> list[Task]:
    """Draw ``n_tasks`` tasks; equal arguments give equal tensors.

    A task's training images come from ``images.train`` only, and so on, so that no image a task
    is tested on was ever trained on, by any task. Transformations are dealt like cards: all of
    ``transforms`` (names from `TRANSFORMS`; None: all of these) once before any of them again. A
    task's note names its classes in the order of their labels, its transformation, and mean and
    standard deviation of its noise.

    Raises:
        ValueError: there are not so many classes or tasks, or no such transformation.
    """
    n_classes = len(images.class_names)
    if not 1 <= classes_per_task <= n_classes:
        raise ValueError(f"classes_per_task must be in [1, {n_classes}], got {classes_per_task}")
    if not 1 <= n_tasks <= math.comb(n_classes, classes_per_task):
        raise ValueError(
            f"n_tasks must be in [1, {math.comb(n_classes, classes_per_task)}] for different "
            f"sets of {classes_per_task} out of {n_classes} classes, got {n_tasks}"
        )
    names = list(TRANSFORMS) if transforms is None else list(transforms)
    if not names or not set(names) <= set(TRANSFORMS):
        raise ValueError(
            f"transforms: expected some of {', '.join(map(repr, TRANSFORMS))}, got {transforms!r}"
        )
    generator = torch.Generator().manual_seed(seed)
    used: set[frozenset[int]] = set()
    deck: list[str] = []
    tasks = []
    for number in range(1, n_tasks + 1):
        while frozenset(classes := _draw(n_classes, classes_per_task, generator)) in used:
            pass
        used.add(frozenset(classes))
        deck = deck or [names[i] for i in _draw(len(names), None, generator)]
        transform = deck.pop()
        mean = NOISE_MEANS[_draw(len(NOISE_MEANS), 1, generator)[0]]
        sd = NOISE_SDS[_draw(len(NOISE_SDS), 1, generator)[0]]
        alter = TRANSFORMS[transform](images.side, generator)

        splits = []
        for (x, y), per_class in (
            (images.train, train_per_class),
            (images.valid, valid_per_class),
            (images.test, TEST_PER_CLASS),
        ):
            rows = [
                _shuffled((y == label).nonzero().flatten(), generator)[:per_class]
                for label in classes
            ]
            picked = x[torch.cat(rows)]
            noise = mean + sd * torch.randn(picked.shape, generator=generator)
            labels = torch.cat([torch.full_like(row, i) for i, row in enumerate(rows)])
            splits.append((alter((picked + noise).clamp(-0.5, 0.5)).contiguous(), labels))
        shown = " ".join(images.class_names[label] for label in classes)
        note = f"{shown}, {transform}, {mean:+.2f}±{sd:.1f}"
        tasks.append(Task(f"task{number}", *splits, n_classes=classes_per_task, note=note))
    return tasks


# Each entry: (side, generator) -> a function of images [N, 1, side, side] that is fixed once made.
Alter = Callable[[Tensor], Tensor]


def _mixed_rows(side: int, generator: torch.Generator) -> Alter:
    order = torch.randperm(side, generator=generator)
    return lambda x: x[:, :, order]


def _mixed_pixels(side: int, generator: torch.Generator) -> Alter:
    order = torch.randperm(side * side, generator=generator)
    return lambda x: x.flatten(2)[:, :, order].view_as(x)


TRANSFORMS: dict[str, Callable[[int, torch.Generator], Alter]] = {
    "as is": lambda side, generator: lambda x: x,
    "mirrored": lambda side, generator: lambda x: x.flip(3),
    "quarter turn": lambda side, generator: lambda x: x.rot90(1, (2, 3)),
    "half turn": lambda side, generator: lambda x: x.rot90(2, (2, 3)),
    "inverted": lambda side, generator: lambda x: -x,
    "rows mixed": _mixed_rows,
    "pixels mixed": _mixed_pixels,
}


def _draw(n: int, k: int | None, generator: torch.Generator) -> list[int]:
    return torch.randperm(n, generator=generator)[:k].tolist()


def _shuffled(rows: Tensor, generator: torch.Generator) -> Tensor:
    return rows[torch.randperm(len(rows), generator=generator)]


def _tensors(images: Labelled) -> tuple[Tensor, Tensor]:
    x = torch.from_numpy(images.x.astype(np.float32))
    return x.div(255).sub(0.5), torch.from_numpy(images.y)
