"""Descriptors of tensors as the engine's tensor copies read them, in place of a CUtensorMap."""

from __future__ import annotations

import struct
from typing import Any

from triton.tools.tensor_descriptor import TensorDescriptor

# Triton's name for the type of such an argument.
TENSOR_MAP = "nvTmaDesc"
_BYTES = 128
_MOST_DIMENSIONS = 5
# As in engine/tensor_copies.h.
_FORMAT, _MARK = "<4IQ5Q5Q5I", 0x70616D74
# Bytes of a line by what the driver calls the swizzles.
_LINES = {0: 0, 1: 32, 2: 64, 3: 128}


class NotEncoded(Exception):
    """A tensor map that the driver would refuse."""


def tensor_map(descriptor: TensorDescriptor, form: dict[str, Any]) -> bytes:
    """What a kernel gets for a descriptor.

    Args:
        descriptor: of a tensor on the host.
        form: what Triton says of it beside the compiled kernel: its swizzle, block and element.

    Raises:
        NotEncoded: see there.
    """
    element, box, line = form["elem_size"], form["block_size"], _LINES[form["swizzle"]]
    sizes, strides = list(descriptor.shape), [element * s for s in descriptor.strides]
    base = descriptor.base.data_ptr()
    _check(base, sizes, strides, box, element, line)
    if descriptor.padding != "zero" or form["fp4_padded"]:
        raise NotEncoded("beyond the border only zeros are known here")
    rank = len(box)

    def innermost_first(values: list[int]) -> list[int]:
        return values[::-1] + [0] * (_MOST_DIMENSIONS - rank)

    lists = [n for values in (sizes, strides, list(box)) for n in innermost_first(values)]
    return struct.pack(_FORMAT, _MARK, rank, element, line, base, *lists).ljust(_BYTES, b"\0")


def _check(
    base: int, sizes: list[int], strides: list[int], box: list[int], element: int, line: int
) -> None:
    rank, inner = len(box), box[-1] * element
    if not len(sizes) == len(strides) == rank <= _MOST_DIMENSIONS:
        raise NotEncoded(f"{len(sizes)} sizes, {len(strides)} strides, a box of {rank}")
    if strides[-1] != element:
        raise NotEncoded(f"a stride of {strides[-1]} bytes between neighbours")
    if base % 16 or any(stride % 16 or not 0 < stride < 2**40 for stride in strides[:-1]):
        raise NotEncoded(f"memory at {base} with strides of {strides} bytes")
    if not all(0 < size <= 2**32 for size in sizes) or not all(0 < side <= 256 for side in box):
        raise NotEncoded(f"a box of {box} of {sizes}")
    if inner % 16 or (line and inner > line):
        raise NotEncoded(f"{inner} bytes side by side in lines of {line}")
    if line and inner != line:
        raise NotEncoded("lines that are not full are not known here")
