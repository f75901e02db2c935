"""Makes Triton's interpreter fail where a GPU would read or write what it must not.

Every lane of a load or store has to lie inside a tensor that the kernel was given; no program may
read or write what another one has written in the same launch, nor write what it has read, unless
the other one had arrived before at a counter in memory at which this one arrived since; a lane that
is masked off without ``other`` gets NaN (or the largest integer). The interpreter's bfloat16, which
is kept as 16 raw bits, is repaired: it is computed with in float32 and rounded to nearest even.
"""

from __future__ import annotations

from contextlib import ExitStack, contextmanager
from unittest import mock

import numpy as np
import torch
import triton.language as tl
from triton.runtime import interpreter
from triton.runtime.interpreter import GridExecutor, InterpreterBuilder, TensorHandle

from lasem_fast.backends import triton_level

_NOBODY = -1
_SEVERAL = -2
_ATOMICS = -3


_also_reached: list[torch.Tensor] = []


@contextmanager
def reached(*tensors: torch.Tensor):
    """A context in which kernels may reach these by addresses that they read in memory."""
    _also_reached.extend(tensors)
    try:
        yield
    finally:
        _also_reached.clear()


class Fault(Exception):
    """Something that goes wrong on a GPU, or depends on its timing."""


class _Memory:
    """The tensors of one launch and which programs have touched them."""

    def __init__(self, tensors: list[torch.Tensor]) -> None:
        self.spans = []
        self.touched = {}
        # the last arrival, by number, of every program: at a counter, and as a program has seen it
        self.arrived: dict[int, dict[int, int]] = {}
        self.seen: dict[int, dict[int, int]] = {}
        for tensor in (t for t in tensors if t.numel() > 0):
            last = sum((n - 1) * s for n, s in zip(tensor.shape, tensor.stride(), strict=True))
            begin = tensor.data_ptr()
            self.spans.append((begin, begin + (last + 1) * tensor.element_size()))
            storage = tensor.untyped_storage()
            both = (np.full(storage.nbytes(), _NOBODY, np.int64) for _ in range(2))
            after = np.zeros(storage.nbytes(), np.int8)  # so many arrivals it was written
            self.touched.setdefault(storage.data_ptr(), (*both, after))

    def check(self, kind: str, pointers: np.ndarray, mask: np.ndarray, size: int) -> None:
        """Checks the active lanes of a load, a store or atomics by the program that is running."""
        at = np.broadcast_to(pointers, np.broadcast_shapes(pointers.shape, mask.shape))
        lanes = np.broadcast_to(mask, at.shape).astype(bool)  # the interpreter has masks of 0 and 1
        at = at[lanes].astype(np.int64)
        inside = np.zeros(at.shape, bool)
        for begin, end in self.spans:
            inside |= (at >= begin) & (at + size <= end)
        if not inside.all():
            raise Fault(f"{kind} out of bounds in {(~inside).sum()} of {at.size} lanes")
        if kind == "store" and np.unique(at).size < at.size:
            raise Fault("store of several lanes to one address")
        program = _program()
        for begin, (readers, writers, after) in self.touched.items():
            here = at[(at >= begin) & (at < begin + readers.size)] - begin
            if kind == "atomics":
                _check("read", readers[here], [_NOBODY], kind)
                _check("written", writers[here], [_NOBODY, _ATOMICS], kind)
                writers[here] = _ATOMICS
                continue
            mine, seen = [_NOBODY, program], self.seen.get(program, {})
            for other in np.unique(writers[here]):
                unseen = after[here][writers[here] == other].max() >= seen.get(int(other), 0)
                if other not in mine and unseen:
                    raise Fault(f"{kind} of what another program has written")
            if kind == "store":
                _check("read", readers[here], mine, kind)
                writers[here] = program
                after[here] = seen.get(program, 0)
            else:
                alone = np.isin(readers[here], mine)
                readers[here] = np.where(alone, program, _SEVERAL)

    def arrive(self, counter: int) -> None:
        """The running program sees all who came to a counter before, and is seen by who follows."""
        here = self.arrived.setdefault(counter, {})
        seen = self.seen.setdefault(_program(), {})
        seen[_program()] = seen.get(_program(), 0) + 1
        for other, number in here.items():
            seen[other] = max(seen.get(other, 0), number)
        here.update(seen)


def _program() -> int:
    x, y, z = interpreter.interpreter_builder.grid_idx
    return (x << 40) + (y << 20) + z


def _check(did: str, programs: np.ndarray, allowed: list[int], kind: str) -> None:
    if not np.isin(programs, allowed).all():
        raise Fault(f"{kind} of what another program has {did}")


def _widened(handle: TensorHandle) -> TensorHandle:
    """A bfloat16 handle in float32; any other one as it is."""
    if handle.dtype.scalar != tl.bfloat16 or handle.data.dtype != np.uint16:
        return handle
    return TensorHandle((handle.data.astype(np.uint32) << 16).view(np.float32), tl.float32)


def _narrowed(data: np.ndarray) -> TensorHandle:
    """float32 values as bfloat16, rounded to nearest even."""
    bits = torch.from_numpy(np.ascontiguousarray(data)).bfloat16().view(torch.int16)
    return TensorHandle(bits.numpy().view(np.uint16).reshape(data.shape), tl.bfloat16)


@contextmanager
def sanitised():
    """Runs kernels under the checks; a fault is the cause of Triton's ``InterpreterError``."""
    memory: list[_Memory] = []
    plain = {
        name: getattr(InterpreterBuilder, name)
        for name in ("create_masked_load", "create_masked_store", "create_atomic_rmw",
                     "cast_impl", "create_fp_to_fp", "binary_op", "unary_op", "create_dot",
                     "create_fma")
    }  # fmt: skip
    call = GridExecutor.__call__

    def launch(self, *args, **kwargs):
        given = *args, *kwargs.values(), *_also_reached
        values = [getattr(value, "base", value) for value in given]
        memory.append(_Memory([value for value in values if isinstance(value, torch.Tensor)]))
        try:
            return call(self, *args, **kwargs)
        finally:
            memory.pop()

    def load(self, pointers, mask, other, *rest, **named):
        element = pointers.get_element_ty()
        size = interpreter._get_np_dtype(element).itemsize
        memory[-1].check("load", pointers.data, mask.data, size)
        result = plain["create_masked_load"](self, pointers, mask, other, *rest, **named)
        if other is None and not mask.data.all():
            poison = np.nan if element.is_floating() else np.iinfo(result.data.dtype).max
            if element == tl.bfloat16:
                poison = _narrowed(np.float32([poison])).data
            lanes = np.broadcast_to(mask.data, result.data.shape)
            result.data = np.where(lanes, result.data, poison).astype(result.data.dtype)
        return result

    def store(self, pointers, value, mask, *rest):
        size = interpreter._get_np_dtype(pointers.get_element_ty()).itemsize
        memory[-1].check("store", pointers.data, mask.data, size)
        return plain["create_masked_store"](self, pointers, value, mask, *rest)

    def atomic(self, operation, pointers, value, mask, order, scope):
        size = interpreter._get_np_dtype(pointers.get_element_ty()).itemsize
        memory[-1].check("atomics", pointers.data, mask.data, size)
        if order == interpreter._ir.MEM_SEMANTIC.ACQUIRE_RELEASE and pointers.data.size == 1:
            memory[-1].arrive(int(pointers.data.item()))
        return plain["create_atomic_rmw"](self, operation, pointers, value, mask, order, scope)

    def cast(self, source, target, *rounding):
        if tl.bfloat16 not in (source.dtype.scalar, target.scalar):
            name = "create_fp_to_fp" if rounding else "cast_impl"
            return plain[name](self, source, target, *rounding)
        wide = _widened(source)
        if target.scalar == tl.bfloat16:
            return _narrowed(wide.data.astype(np.float32))
        return TensorHandle(wide.data.astype(interpreter._get_np_dtype(target)), target.scalar)

    def computed(name):
        def operation(self, *args):
            if all(_widened(arg) is arg for arg in args if isinstance(arg, TensorHandle)):
                return plain[name](self, *args)
            args = [_widened(arg) if isinstance(arg, TensorHandle) else arg for arg in args]
            result = plain[name](self, *args)
            if name == "create_dot":
                return result
            if result.data.dtype == np.bool_:
                return TensorHandle(result.data, tl.bfloat16)  # as the interpreter marks it
            return _narrowed(result.data)

        return operation

    patches = {"create_masked_load": load, "create_masked_store": store}
    patches["create_atomic_rmw"] = atomic
    patches |= {name: cast for name in ("cast_impl", "create_fp_to_fp")}
    patches |= {n: computed(n) for n in ("binary_op", "unary_op", "create_dot", "create_fma")}
    with ExitStack() as stack:
        stack.enter_context(mock.patch.object(GridExecutor, "__call__", launch))
        stack.enter_context(mock.patch.object(triton_level, "_INTERPRETS_BFLOAT16", True))
        for name, replacement in patches.items():
            stack.enter_context(mock.patch.object(InterpreterBuilder, name, replacement))
        yield
