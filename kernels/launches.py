"""Launches that are made again and again with other tensors.

Before every launch Triton finds out which of its compiled kernels the arguments ask for, which
takes longer than a small kernel runs. What is not a tensor is worked out once per shape here, and
the kernel is looked up once for every way that tensors can be read.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import reduce
from operator import attrgetter, or_
from typing import Any

import torch
from torch import Tensor
from triton.compiler import CompiledKernel
from triton.tools.tensor_descriptor import TensorDescriptor

# Bytes that Triton compiles a pointer to a multiple of in a kernel of its own.
_ALIGNMENT = 16
_dtype = attrgetter("dtype")


class Launch:
    """A kernel on a grid, with all of its arguments but the tensors.

    Args:
        kernel: whose arguments are tensors, then numbers, then constants.
        grid: how many programs, in up to three directions.
        numbers: the arguments behind the tensors.
        blocks: for each of the first tensors, sides of the boxes that it is read in.
        constants: by name, and how it is compiled.
    """

    def __init__(
        self,
        kernel: Any,
        grid: Sequence[int],
        numbers: Sequence[int | float],
        blocks: Sequence[Sequence[int]] = (),
        **constants: Any,
    ) -> None:
        self._kernel, self._grid, self._numbers = kernel, tuple(grid), tuple(numbers)
        self._three = (*grid, 1, 1)[:3]
        self._blocks, self._constants = [list(block) for block in blocks], constants
        self._compiled: dict[tuple[Any, ...], Any] = {}
        self._described: list[dict[str, Any]] = []
        self._behind: tuple[Any, ...] = ()

    def __call__(self, *tensors: Tensor) -> None:
        """Runs the kernel on the tensors' device, on its current stream."""
        device = tensors[0].device
        with torch.cuda.device_of(tensors[0]):
            # what is compiled depends on the dtypes, and on which addresses are multiples
            form = (device, *map(_dtype, tensors))
            aligned = reduce(or_, map(Tensor.data_ptr, tensors)) % _ALIGNMENT == 0
            compiled = self._compiled.get(form) if aligned else None
            if compiled is not None:
                boxed = map(_described_again, tensors, self._described)
                compiled[self._three](*boxed, *tensors[len(self._blocks) :], *self._behind)
                return
            boxed = [
                TensorDescriptor(tensor, tensor.shape, tensor.stride(), block)
                for tensor, block in zip(tensors, self._blocks, strict=False)
            ]
            arguments = (*boxed, *tensors[len(boxed) :], *self._numbers)
            found = self._kernel[self._grid](*arguments, **self._constants)
        if aligned and isinstance(found, CompiledKernel):
            self._behind = (*self._numbers, *self._constants_of(len(tensors)))
            self._described = [{**vars(descriptor), "base": None} for descriptor in boxed]
            self._compiled[form] = found

    def _constants_of(self, tensors: int) -> list[Any]:
        """The constants in the kernel's order."""
        names = self._kernel.arg_names[tensors + len(self._numbers) :]
        return [self._constants[name] for name in names]


def _described_again(tensor: Tensor, like: dict[str, Any]) -> TensorDescriptor:
    """As another one was described, without the checks, which take longer than the launch.

    What they would find the driver refuses when it makes the copy's map.
    """
    descriptor = object.__new__(TensorDescriptor)
    vars(descriptor).update(like, base=tensor, shape=tensor.shape, strides=tensor.stride())
    return descriptor
