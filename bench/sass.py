"""Machine code as ``cuobjdump -sass`` prints it: the loop in which a kernel spends its time."""

from __future__ import annotations

import re
from typing import NamedTuple

# ``/*0a10*/  @!P0 BRA 0xa00 ;``, also with ``(*"BRANCH_TARGETS ..."*)`` behind
_LINE = re.compile(
    r"^\s+/\*([0-9a-f]{4,})\*/\s+(?:@!?U?P\w+\s+)?([A-Z][A-Za-z0-9_.]*)([^;]*);", re.M
)
_TARGET = re.compile(r"\b0x([0-9a-f]+)")
# m, n, k of a product: HMMA.16816 is 16x8x16, HMMA.1688 16x8x8; HGMMA.64x64x16 says it itself
_HMMA = re.compile(r"^HMMA\.(16816|1688|1684)\.")
_HGMMA = re.compile(r"^HGMMA\.(\d+)x(\d+)x(\d+)\.")
_SHAPES = {"16816": (16, 8, 16), "1688": (16, 8, 8), "1684": (16, 8, 4)}
_WARPS_OF_A_GROUP = 4


class Loop(NamedTuple):
    """One pass of a loop.

    Attributes:
        instructions: that a warp issues.
        flops: floating-point operations of its matrix products, a multiply and an add each, of all
            lanes of a warp.
    """

    instructions: int
    flops: int


class MachineCode(NamedTuple):
    """A kernel's instructions.

    Attributes:
        instructions: how many there are.
        loop: the innermost loop with the most matrix products, None without one.
        opcodes: their kinds.
    """

    instructions: int
    loop: Loop | None
    opcodes: frozenset[str]


def read(sass: str) -> MachineCode:
    """What a dump of one kernel says."""
    code = [
        (int(address, 16), opcode, arguments)
        for address, opcode, arguments in _LINE.findall(sass)
        if opcode != "NOP"
    ]
    spans = []
    for address, opcode, arguments in code:
        target = _TARGET.search(arguments) if opcode.split(".")[0] == "BRA" else None
        # a branch to itself ends the kernel
        if target and int(target[1], 16) < address:
            spans.append((int(target[1], 16), address))
    innermost = [
        (a, b) for a, b in spans
        if not any((a, b) != (c, d) and a <= c and d <= b for c, d in spans)
    ]  # fmt: skip
    loops = [_loop([op for at, op, _ in code if a <= at <= b]) for a, b in innermost]
    busy = max((loop for loop in loops if loop.flops), key=lambda loop: loop.flops, default=None)
    return MachineCode(len(code), busy, frozenset(op.split(".")[0] for _, op, _ in code))


def _loop(opcodes: list[str]) -> Loop:
    return Loop(len(opcodes), sum(map(_flops, opcodes)))


def _flops(opcode: str) -> int:
    if found := _HMMA.match(opcode):
        m, n, k = _SHAPES[found[1]]
        return 2 * m * n * k
    if found := _HGMMA.match(opcode):
        m, n, k = map(int, found.groups())
        return 2 * m * n * k // _WARPS_OF_A_GROUP
    return 64 if opcode.split(".")[0] == "FFMA" else 0
