"""Which rows of a level its backward has to look at."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor


@dataclass
class Liveness:
    """The rows that count in a level's backward; decided between forward and backward.

    Attributes:
        live: bool ``[R]`` on the level's device; None: all.
        followed: whether the backward of everything on this level looks at it.
    """

    live: Tensor | None = None
    followed: bool = True


def passed_over(liveness: Liveness | None) -> None:
    """Notes that something's backward runs on all rows."""
    if liveness is not None:
        liveness.followed = False
