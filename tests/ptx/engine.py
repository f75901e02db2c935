"""Builds the engine and runs programs on the host's memory."""

from __future__ import annotations

import ctypes
import hashlib
import os
import subprocess
import tempfile
from collections.abc import Sequence
from functools import cache
from pathlib import Path

from parsing import SPECIAL, NotTranslated, Program
from tensor_maps import TENSOR_MAP
from torch import Tensor

_SOURCES = Path(__file__).parent / "engine"
_FLAGS = ("-std=c++20", "-O2", "-ffp-contract=off", "-shared", "-fPIC")


class Fault(Exception):
    """What a GPU would do wrong, or might."""


@cache
def _library() -> ctypes.CDLL:
    """The engine, built once for its sources and kept among temporary files."""
    sources = sorted(_SOURCES.glob("*"))
    digest = hashlib.sha256(b"".join(map(Path.read_bytes, sources))).hexdigest()[:16]
    built = Path(tempfile.gettempdir()) / f"lasem-fast-ptx-engine-{os.getuid()}" / f"{digest}.so"
    if not built.exists():
        built.parent.mkdir(mode=0o700, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=built.parent) as directory:
            fresh = Path(directory) / built.name
            compiler = os.environ.get("CXX", "g++")
            command = [compiler, *_FLAGS, "-o", fresh, _SOURCES / "engine.cpp"]
            subprocess.run(command, check=True)
            fresh.replace(built)
    library = ctypes.CDLL(built)
    library.ptx_program.restype = ctypes.c_void_p
    return library


class Executable:
    """A program that the engine has taken.

    Raises:
        NotTranslated: it has instructions that the engine does not know, naming all of them.
    """

    def __init__(self, program: Program) -> None:
        self.program = program
        code = program.instructions
        words = []
        for i in code:
            words += [i.predicate, i.negated, i.line, len(i.operands), *i.operands]
        special = {name: number for number, name in program.special.items()}
        error = ctypes.create_string_buffer(4096)
        self._handle = _library().ptx_program(
            (ctypes.c_char_p * len(code))(*(i.name.encode() for i in code)),
            (ctypes.c_int * len(words))(*words), len(code),
            (ctypes.c_int * len(program.constants))(*program.constants),
            (ctypes.c_uint64 * len(program.constants))(*program.constants.values()),
            len(program.constants),
            (ctypes.c_int * len(SPECIAL))(*(special.get(name, -1) for name in SPECIAL)),
            program.registers, program.threads, error, len(error),
        )  # fmt: skip
        if not self._handle:
            raise NotTranslated(error.value.decode())

    def __del__(self) -> None:
        if getattr(self, "_handle", None):
            _library().ptx_free(ctypes.c_void_p(self._handle))

    def run(
        self,
        grid: Sequence[int],
        shared: int,
        arguments: Sequence[tuple[str, object]],
        tensors: Sequence[Tensor],
        *,
        seed: int = 0,
    ) -> None:
        """One launch.

        Args:
            grid: up to three numbers of blocks.
            shared: bytes of shared memory of a block.
            arguments: Triton's type and the value of every parameter, in order.
            tensors: what the kernel may read and write.
            seed: 0: blocks and warps one after another; else in an order drawn from it.

        Raises:
            Fault: an access or an order of accesses that is wrong on a GPU.
        """
        values = _packed(self.program, arguments)
        spans = [_span(tensor) for tensor in tensors]
        error = ctypes.create_string_buffer(512)
        failed = _library().ptx_launch(
            ctypes.c_void_p(self._handle), (ctypes.c_uint32 * 3)(*grid, *[1] * (3 - len(grid))),
            shared, values, len(values),
            (ctypes.c_uint64 * len(spans))(*(begin for begin, _ in spans)),
            (ctypes.c_uint64 * len(spans))(*(end for _, end in spans)), len(spans),
            seed, error, len(error),
        )  # fmt: skip
        if failed:
            raise Fault(f"{self.program.name}: {error.value.decode()}")


def _span(tensor: Tensor) -> tuple[int, int]:
    if tensor.numel() == 0:
        return 0, 0
    last = sum((n - 1) * s for n, s in zip(tensor.shape, tensor.stride(), strict=True))
    return tensor.data_ptr(), tensor.data_ptr() + (last + 1) * tensor.element_size()


def _packed(program: Program, arguments: Sequence[tuple[str, object]]) -> bytes:
    """The parameters as they lie in memory; two pointers to scratch memory follow, both null."""
    given = [*arguments, ("*i8", 0), ("*i8", 0)]
    if len(given) != len(program.parameters):
        raise NotTranslated(f"{len(program.parameters)} parameters for {len(given)} arguments")
    data = bytearray(program.parameters[-1].offset + program.parameters[-1].size)
    for (kind, value), (offset, size) in zip(given, program.parameters, strict=True):
        if isinstance(value, Tensor):
            value = value.data_ptr()
        if kind == TENSOR_MAP:
            packed = (ctypes.c_char * len(value)).from_buffer_copy(value)
        elif kind == "fp32":
            packed = ctypes.c_float(value)
        elif kind[0] == "*" or kind in ("i64", "u64"):
            packed = ctypes.c_uint64(value)
        elif kind in ("i32", "u32"):
            packed = ctypes.c_uint32(value)
        else:
            raise NotTranslated(f"an argument of type {kind}")
        if ctypes.sizeof(packed) != size:
            raise NotTranslated(f"{size} bytes for an argument of type {kind}")
        data[offset : offset + size] = bytes(packed)
    return bytes(data)
