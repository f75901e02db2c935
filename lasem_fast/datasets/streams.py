"""Random numbers: one generator for each purpose, so that no draw depends on another."""

from __future__ import annotations

import zlib

import numpy as np


def stream(purpose: str, *key: int) -> np.random.Generator:
    """The generator of a purpose and its numbers in 0..2^63 - 1.

    Equal arguments give equal numbers, and whatever differs gives others.
    """
    words = [zlib.crc32(purpose.encode()), len(key)]  # NumPy takes missing words for zeros
    for number in key:
        words += [number & 0xFFFFFFFF, number >> 32]  # always two, so that keys stay apart
    return np.random.default_rng(words)
