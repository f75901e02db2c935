"""Planted bugs: each one passes the bare interpreter and is caught by the sanitiser."""

from __future__ import annotations

import pytest
import torch
import triton
import triton.language as tl
from triton.runtime.errors import InterpreterError


@triton.jit
def _copy(source, target, size, stride, MASK_LOAD: tl.constexpr, OTHER: tl.constexpr,
          MASK_STORE: tl.constexpr, BLOCK: tl.constexpr):  # fmt: skip
    at = tl.program_id(0) * stride + tl.arange(0, BLOCK)
    inside = at < size
    if MASK_LOAD and OTHER:
        value = tl.load(source + at, mask=inside, other=0)
    elif MASK_LOAD:
        value = tl.load(source + at, mask=inside)
    else:
        value = tl.load(source + at)
    if MASK_STORE:
        tl.store(target + at, value, mask=inside)
    else:
        tl.store(target + at, value)


@triton.jit
def _sum(source, target, size, OTHER: tl.constexpr, BLOCK: tl.constexpr):
    at = tl.arange(0, BLOCK)
    if OTHER:
        value = tl.load(source + at, mask=at < size, other=0)
    else:
        value = tl.load(source + at, mask=at < size)
    tl.store(target, tl.sum(value.to(tl.float32), axis=0))


@triton.jit
def _product(a, b, c, BLOCK: tl.constexpr):
    at = tl.arange(0, BLOCK)[:, None] * BLOCK + tl.arange(0, BLOCK)[None, :]
    product = tl.dot(tl.load(a + at), tl.load(b + at), input_precision="ieee")
    tl.store(c + at, (product + 1).to(c.dtype.element_ty))


@triton.jit
def _arithmetic(a, b, out, BLOCK: tl.constexpr):
    at = tl.arange(0, BLOCK)
    x, y = tl.load(a + at), tl.load(b + at)
    tl.store(out + at, tl.where(x > y, x * y + x, tl.abs(y) - x))


def _run_copy(load=True, other=True, store=True, stride=8, size=13):
    # views of larger memory: what lies behind them is there, but is not theirs
    source, target = torch.arange(32.0)[:size], torch.zeros(32)[:size]
    _copy[2,](source, target, size, stride, load, other, store, 8)
    return source, target


def test_a_right_kernel_passes():
    source, target = _run_copy()
    assert torch.equal(source, target)


@pytest.mark.parametrize(
    ("bug", "message"),
    [
        ({"load": False}, "load out of bounds in 3 of 8 lanes"),
        ({"store": False}, "store out of bounds in 3 of 8 lanes"),
        ({"stride": 5}, "store of what another program has written"),
    ],
)
def test_planted_bugs_are_caught(bug, message):
    with pytest.raises(InterpreterError, match=message):
        _run_copy(**bug)


def test_a_race_between_reading_and_writing_is_caught():
    memory = torch.arange(16.0)
    with pytest.raises(InterpreterError, match=r"what another program has (read|written)"):
        _copy[2,](memory[:12], memory[4:], 12, 8, True, True, True, 8)


def test_lanes_of_one_store_may_not_meet():
    with pytest.raises(InterpreterError, match="several lanes to one address"):
        _meet[1,](torch.zeros(8), 8)


@triton.jit
def _meet(target, BLOCK: tl.constexpr):
    at = tl.arange(0, BLOCK)
    tl.store(target + at // 2, at.to(tl.float32))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_a_missing_other_shows(dtype):
    source, out = torch.ones(8, dtype=dtype), torch.zeros(1)
    _sum[1,](source[:5], out, 5, True, 8)
    assert out.item() == 5
    _sum[1,](source[:5], out, 5, False, 8)
    assert out.isnan().item()


def test_memory_that_was_not_written_is_poison():
    assert torch.empty(3).isnan().all()
    assert (torch.empty(3, dtype=torch.uint8) == 255).all()


def test_bfloat16_is_computed_as_pytorch_does():
    a, b = (torch.randn(16, 16).bfloat16() for _ in range(2))
    c = torch.empty(16, 16, dtype=torch.bfloat16)
    _product[1,](a, b, c, 16)
    assert torch.equal(c, (a.float() @ b.float() + 1).bfloat16())
    x, y = a.flatten(), b.flatten()
    out = torch.empty(256, dtype=torch.bfloat16)
    _arithmetic[1,](x, y, out, 256)
    assert torch.equal(out, torch.where(x > y, x * y + x, y.abs() - x))


@triton.jit
def _share(parts, total, arrivals, WAITS: tl.constexpr, FIRST: tl.constexpr, BLOCK: tl.constexpr):
    """The sum of what all programs store, by the last of them to come."""
    at = tl.arange(0, BLOCK)
    part = tl.program_id(0)
    if not FIRST:
        tl.store(parts + part * BLOCK + at, at + part)
    last = tl.atomic_add(arrivals, 1) == tl.num_programs(0) - 1
    if FIRST:
        tl.store(parts + part * BLOCK + at, at + part)
    if last or not WAITS:
        for other in range(tl.num_programs(0)):
            value = tl.load(parts + other * BLOCK + at)
            if last:
                tl.store(total + at, value + tl.load(total + at))


def test_the_last_to_come_may_read_what_the_others_stored():
    """Not one who comes before, nor what is stored after an arrival; nor the count by itself."""
    parts, arrivals = (torch.zeros(n, dtype=torch.int32) for n in (24, 1))
    total = torch.zeros(8, dtype=torch.int32)
    _share[3,](parts, total, arrivals, True, False, 8)
    assert torch.equal(total, 3 * torch.arange(8, dtype=torch.int32) + 3)
    for waits, first in ((False, False), (True, True)):
        with pytest.raises(InterpreterError, match=r"what another program has (read|written)"):
            _share[3,](torch.zeros_like(parts), total, arrivals.zero_(), waits, first, 8)
    with pytest.raises(InterpreterError, match="atomics of what another program has"):
        _share[3,](parts, total, parts, True, False, 8)
