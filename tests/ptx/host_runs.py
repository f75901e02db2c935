"""Runs the launches of the library on the host: what Triton compiled, on tensors of the CPU."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from typing import Any
from unittest import mock

from engine import Executable
from parsing import NotTranslated, parse
from tensor_maps import TENSOR_MAP, tensor_map
from torch import Tensor
from triton.runtime.jit import JITFunction
from triton.tools.tensor_descriptor import TensorDescriptor

from bench.compiling import OPTIONS, Launch, compiled


@contextmanager
def on_host(
    capability: int,
    *,
    seed: int = 0,
    change: Callable[[str, str], str] = lambda name, ptx: ptx,
    reached: Sequence[Tensor] = (),
) -> Iterator[list[Launch]]:
    """Kernels that are launched in here run on the host; they are listed as they are.

    Args:
        capability: of the GPU that Triton compiles for, such as 80 or 90.
        seed: see :meth:`engine.Executable.run`.
        change: takes a kernel's name and PTX, and gives the PTX that is run.
        reached: tensors whose addresses kernels read in memory.

    Raises:
        engine.Fault: see there.
        parsing.NotTranslated: PTX that the engine cannot run.
    """

    launches: list[Launch] = []

    def getitem(kernel, grid):
        def launch(*args, **kwargs):
            options = {k: kwargs.pop(k) for k in OPTIONS if k in kwargs}
            arguments = dict(zip(kernel.arg_names, args, strict=False)) | kwargs
            launches.append(Launch(kernel, arguments, options, tuple(grid)))
            built = compiled(launches[-1], capability)
            ptx = change(kernel.__name__, built.asm["ptx"])
            _executable(ptx).run(
                grid,
                built.metadata.shared,
                _given(built, arguments),
                [*_tensors(arguments), *reached],
                seed=seed,
            )

        return launch

    with mock.patch.object(JITFunction, "__getitem__", getitem):
        yield launches


@cache
def _executable(ptx: str) -> Executable:
    return Executable(parse(ptx))


def _given(built, arguments: dict[str, Any]) -> list[tuple[str, Any]]:
    """Types and values of what is left at run time."""
    given, forms = [], iter(built.metadata.tensordesc_meta or ())
    for name, kind in built.src.signature.items():
        if kind.startswith("tensordesc"):
            given += _of_descriptor(arguments[name], next(forms, None))
        elif kind != "constexpr":
            given.append((kind, arguments[name]))
    return given


def _of_descriptor(descriptor: TensorDescriptor, form: dict[str, Any] | None):
    """The tensor map, and sizes and strides again, as Triton's launcher hands them over."""
    if form is None:
        raise NotTranslated("a tensor descriptor that is not read by copies")
    sizes = [("i32", size) for size in descriptor.shape]
    strides = [("i64", stride) for stride in descriptor.strides]
    return [(TENSOR_MAP, tensor_map(descriptor, form)), *sizes, *strides]


def _tensors(arguments: dict[str, Any]) -> list[Tensor]:
    values = arguments.values()
    bases = [value.base for value in values if isinstance(value, TensorDescriptor)]
    return bases + [value for value in values if isinstance(value, Tensor)]
