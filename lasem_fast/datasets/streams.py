"""Random numbers: one generator for each purpose, so that no draw depends on another."""

from __future__ import annotations

import zlib

import numpy as np


def stream(purpose: str, *key: int) -> np.random.Generator:
    """The generator of a purpose and its numbers; equal arguments give equal numbers."""
    return np.random.default_rng([zlib.crc32(purpose.encode()), *key])
