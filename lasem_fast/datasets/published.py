"""What a data set's files hold, as they were published: bytes and class numbers."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np


class Labelled(NamedTuple):
    """Images ``[N, channels, height, width]`` uint8 and their classes ``[N]`` int64."""

    x: np.ndarray
    y: np.ndarray


@dataclass(frozen=True)
class Published:
    """The two parts of a data set, and the names of its classes in the order of their numbers."""

    train: Labelled
    test: Labelled
    class_names: tuple[str, ...]


def rows_by_class(y: np.ndarray, n_classes: int) -> list[np.ndarray]:
    """For each class the rows that hold it, in the order of the file."""
    return [np.flatnonzero(y == label) for label in range(n_classes)]
