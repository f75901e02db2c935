"""Division by a number that is fixed per launch."""

from __future__ import annotations

import random

import pytest
import torch
import triton
import triton.language as tl

from lasem_fast.kernels.division import divided, divisor

_MOST = 2**31 - 1


@triton.jit(do_not_specialize=["d", "factor", "shift"])
def _quotients(n, out, d, factor, shift, WIDE: tl.constexpr, COUNT: tl.constexpr):
    at = tl.arange(0, COUNT)
    value = tl.load(n + at)
    if not WIDE:
        value = value.to(tl.int32)
    tl.store(out + at, divided(value, d, factor, shift, WIDE).to(tl.int64))


def _numbers(d: int) -> list[int]:
    pick = random.Random(d)
    last = _MOST // d * d
    edges = [0, 1, d - 1, d, d + 1, 2 * d - 1, 2 * d, last - 1, last, _MOST - 1, _MOST]
    inside = [n for n in edges if 0 <= n <= _MOST]
    return [*inside, *(pick.randrange(_MOST) for _ in range(64 - len(inside)))]


@pytest.mark.parametrize("wide", [False, True])
@pytest.mark.parametrize("d", [1, 2, 3, 7, 10, 64, 641, 2**16 + 1, 2**30, 2**30 + 1, _MOST])
def test_quotients(d, wide):
    n = torch.tensor(_numbers(d))
    out = torch.empty_like(n)
    _quotients[1,](n, out, d, *divisor(d), WIDE=wide, COUNT=64)
    assert out.tolist() == [number // d for number in n.tolist()]


def test_every_factor_fits_into_32_bits():
    for d in [*range(1, 5000), *(2**k + i for k in range(13, 31) for i in (-1, 0, 1)), _MOST]:
        factor, shift = divisor(d)
        assert -(2**31) <= factor < 2**31
        assert 0 <= shift < 32
        assert all((2 * n * (factor % 2**32) >> 32) >> shift == n // d for n in _numbers(d))
