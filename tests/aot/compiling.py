"""Compiles a launch ahead of time, as the launcher would have it, and reads what came out."""

from __future__ import annotations

import re
import subprocess
import tempfile
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import triton
from triton.backends.compiler import BaseBackend, GPUTarget
from triton.compiler import ASTSource
from triton.runtime.jit import JITFunction, native_specialize_impl

_CUOBJDUMP = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
OPTIONS = ("num_warps", "num_stages")


class Launch(NamedTuple):
    """A kernel with everything that its launcher passed."""

    kernel: JITFunction
    arguments: dict[str, Any]
    options: dict[str, int]


class Footprint(NamedTuple):
    """What a compiled kernel takes: registers and bytes of stack per thread, bytes of shared."""

    registers: int
    stack: int
    shared: int
    tensor_core: bool


@contextmanager
def recorded():
    """Collects launches instead of running them; tensors may be on the meta device."""
    launches: list[Launch] = []

    def getitem(kernel, grid):
        def launch(*args, **kwargs):
            options = {k: kwargs.pop(k) for k in OPTIONS if k in kwargs}
            arguments = dict(zip(kernel.arg_names, args, strict=False)) | kwargs
            launches.append(Launch(kernel, arguments, options))

        return launch

    with ExitStack() as stack:
        stack.enter_context(mock.patch.object(JITFunction, "__getitem__", getitem))
        yield launches


def compile_launch(launch: Launch, capability: int) -> Footprint:
    """What a launch takes, compiled with the specialisation that it would get."""
    return _footprint(compiled(launch, capability))


def compiled(launch: Launch, capability: int):
    """Triton's compiled kernel with the specialisation that a launch would get."""
    signature, constants, attributes = {}, {}, {}
    for i, parameter in enumerate(launch.kernel.params):
        value = launch.arguments[parameter.name]
        if parameter.is_constexpr:
            kind, key = "constexpr", value
        else:
            specialised = not parameter.do_not_specialize
            kind, key = native_specialize_impl(BaseBackend, value, False, specialised, specialised)
        signature[parameter.name] = kind
        if kind == "constexpr":
            constants[(i,)] = key
        elif key:
            attributes[(i,)] = BaseBackend.parse_attr(key)
    source = ASTSource(launch.kernel, signature, constants, attributes)
    target = GPUTarget("cuda", capability, 32)
    return triton.compile(source, target=target, options=launch.options)


def _footprint(kernel) -> Footprint:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(kernel.asm["cubin"])
        file.flush()
        report = subprocess.run(
            [_CUOBJDUMP, "-res-usage", file.name], capture_output=True, text=True, check=True
        ).stdout
    used = {key: int(n) for key, n in re.findall(r"(REG|STACK|LOCAL):(\d+)", report)}
    return Footprint(
        registers=used["REG"],
        stack=used["STACK"] + used["LOCAL"],
        shared=kernel.metadata.shared,
        tensor_core=bool(re.search(r"\b(wgmma\.mma_async|mma\.sync)", kernel.asm["ptx"])),
    )
