"""Writes small files in the formats in which the data sets are published, opcode by opcode."""

from __future__ import annotations

import struct
from pathlib import Path
from typing import Any

import numpy as np


def python2_pickle(item: Any) -> bytes:
    """Protocol 2 as Python 2 and its NumPy wrote it: text is bytes, arrays live in numpy.core."""
    return b"\x80\x02" + _opcodes(item) + b"."


def _opcodes(item: Any) -> bytes:
    if isinstance(item, dict):
        pairs = (_opcodes(key) + _opcodes(value) for key, value in item.items())
        return b"}(" + b"".join(pairs) + b"u"
    if isinstance(item, list):
        return b"](" + b"".join(map(_opcodes, item)) + b"e"
    if isinstance(item, str):
        return b"U" + bytes([len(item)]) + item.encode("latin1")
    if isinstance(item, (int, np.integer)):
        return b"J" + struct.pack("<i", int(item))
    if isinstance(item, np.ndarray):
        return array_opcodes(item.dtype.str[1:], item.shape, item.tobytes())
    raise TypeError(item)


def array_opcodes(dtype: str, shape: tuple[int, ...], content: bytes) -> bytes:
    """An array of that dtype and shape; ``content`` may be of another length."""
    code = b"U" + bytes([len(dtype)]) + dtype.encode()
    empty = b"cnumpy.core.multiarray\n_reconstruct\ncnumpy\nndarray\n" + b"K\x00\x85U\x01b\x87R"
    kind = b"cnumpy\ndtype\n" + code + b"K\x00K\x01\x87R"
    order = "|" if dtype == "u1" else "<"
    kind += b"(K\x03U\x01" + order.encode() + b"NNN" + 2 * _opcodes(-1) + b"K\x00tb"
    sizes = b"(" + b"".join(map(_opcodes, shape)) + b"t"
    raw = b"T" + struct.pack("<i", len(content)) + content
    return empty + b"(K\x01" + sizes + kind + b"\x89" + raw + b"tb"


def idx(values: np.ndarray) -> bytes:
    """MNIST's format, of unsigned bytes."""
    sizes = struct.pack(f">{values.ndim}I", *values.shape)
    return bytes([0, 0, 8, values.ndim]) + sizes + values.astype(np.uint8).tobytes()


def write_idx_pairs(folder: Path, train: tuple, test: tuple) -> None:
    """The four files of MNIST; images ``[N, height, width]``, labels ``[N]``."""
    for part, (x, y) in (("train", train), ("t10k", test)):
        (folder / f"{part}-images-idx3-ubyte").write_bytes(idx(x))
        (folder / f"{part}-labels-idx1-ubyte").write_bytes(idx(y))


def pixels(*shape: int, seed: int = 0) -> np.ndarray:
    """Random uint8 values."""
    return np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)
