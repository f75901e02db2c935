"""Kernel launches without a GPU: recorded, compiled as the launcher would, and what came out."""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import triton
from triton.backends.compiler import BaseBackend, GPUTarget
from triton.compiler import ASTSource
from triton.runtime.jit import JITFunction, native_specialize_impl

from bench.sass import MachineCode, read

_CUOBJDUMP = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
OPTIONS = ("num_warps", "num_stages", "maxnreg")


class Launch(NamedTuple):
    """A kernel with everything that its launcher passed."""

    kernel: JITFunction
    arguments: dict[str, Any]
    options: dict[str, int]
    grid: tuple[int, ...]

    @property
    def programs(self) -> int:
        """How many programs it starts."""
        count = 1
        for size in self.grid:
            count *= size
        return count


class Footprint(NamedTuple):
    """What a compiled kernel takes: registers and bytes of stack per thread, bytes of shared."""

    registers: int
    stack: int
    shared: int
    tensor_core: bool


@contextmanager
def recorded() -> Iterator[list[Launch]]:
    """Collects launches instead of running them; tensors may be on the meta device."""
    launches: list[Launch] = []

    def getitem(kernel, grid):
        def launch(*args, **kwargs):
            options = {k: kwargs.pop(k) for k in OPTIONS if k in kwargs}
            arguments = dict(zip(kernel.arg_names, args, strict=False)) | kwargs
            launches.append(Launch(kernel, arguments, options, tuple(grid)))

        return launch

    with ExitStack() as stack:
        stack.enter_context(mock.patch.object(JITFunction, "__getitem__", getitem))
        yield launches


class Specialised(NamedTuple):
    """What one compilation depends on besides its target; equal ones are compiled once."""

    kernel: JITFunction
    signature: tuple[tuple[str, str], ...]
    constants: tuple[tuple[int, Any], ...]
    attributes: tuple[tuple[int, Any], ...]
    options: tuple[tuple[str, int], ...]


def specialised(launch: Launch) -> Specialised:
    """The specialisation that a launch would get."""
    signature, constants, attributes = [], [], []
    for i, parameter in enumerate(launch.kernel.params):
        value = launch.arguments[parameter.name]
        if parameter.is_constexpr:
            kind, key = "constexpr", value
        else:
            special = not parameter.do_not_specialize
            kind, key = native_specialize_impl(BaseBackend, value, False, special, special)
        signature.append((parameter.name, kind))
        if kind == "constexpr":
            constants.append((i, key))
        elif key:
            attributes.append((i, key))
    options = tuple(sorted(launch.options.items()))
    return Specialised(
        launch.kernel, tuple(signature), tuple(constants), tuple(attributes), options
    )


def compile_launch(launch: Launch, capability: int) -> Footprint:
    """Compiles for sm_``capability`` with the specialisation that a launch would get."""
    compiled = _compiled(specialised(launch), capability)
    used = {
        key: int(n)
        for key, n in re.findall(r"(REG|STACK|LOCAL):(\d+)", _dumped(compiled, "-res-usage"))
    }
    return Footprint(
        registers=used["REG"],
        stack=used["STACK"] + used["LOCAL"],
        shared=compiled.metadata.shared,
        tensor_core=bool(re.search(r"\b(wgmma\.mma_async|mma\.sync)", compiled.asm["ptx"])),
    )


def compiled(launch: Launch, capability: int) -> Any:
    """What Triton makes of a launch for sm_``capability``."""
    return _compiled(specialised(launch), capability)


@cache
def machine_code(form: Specialised, capability: int) -> MachineCode:
    """What a kernel's instructions are."""
    return read(_dumped(_compiled(form, capability), "-sass"))


@cache
def _compiled(form: Specialised, capability: int) -> Any:
    source = ASTSource(
        form.kernel, dict(form.signature), {(i,): value for i, value in form.constants},
        {(i,): BaseBackend.parse_attr(key) for i, key in form.attributes},
    )  # fmt: skip
    target = GPUTarget("cuda", capability, 32)
    return triton.compile(source, target=target, options=dict(form.options))


def _dumped(compiled: Any, option: str) -> str:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        command = [_CUOBJDUMP, option, file.name]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout
