"""Division by a number that is fixed per launch: a multiplication and a shift in place of a dozen
instructions, and no compilation per divisor.

Granlund and Montgomery, Division by Invariant Integers using Multiplication, PLDI 1994, theorem
4.2 with N = 31: for d >= 1, l = ceil(log2 d) and m = floor(2^(31 + l) / d) + 1 < 2^32, the
quotient of any n < 2^31 is floor(m n / 2^(31 + l)).
"""

from __future__ import annotations

import triton
import triton.language as tl


def divisor(d: int) -> tuple[int, int]:
    """What :func:`divided` needs of a divisor: its factor, as a signed 32-bit number, and shift."""
    shift = (d - 1).bit_length() if d > 0 else 0  # nothing is divided by 0
    factor = 2 ** (31 + shift) // max(1, d) + 1
    return factor - 2**32, shift  # it is above 2^31


@triton.jit
def divided(n, d, factor, shift, WIDE: tl.constexpr):
    """``n // d`` for ``n >= 0``, with the numbers of :func:`divisor`; below 2^31 unless WIDE."""
    if WIDE:
        quotient = n // d
    else:
        high = tl.umulhi(n.to(tl.uint32) * 2, factor.to(tl.uint32, bitcast=True))
        quotient = (high >> shift).to(tl.int32)
    return quotient
