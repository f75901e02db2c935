"""Reading machine code: the loop with the products, its instructions and their FLOPs."""

from __future__ import annotations

from bench.sass import Loop, read

# As cuobjdump prints it, shortened: a loop of two levels, of which the inner one has the products.
_DUMP = """
\t\tFunction : some_kernel
        /*0000*/                   LDC R1, c[0x0][0x28] ; /* 0x00 */
 /* 0x00 */
        /*0010*/                   S2R R0, SR_TID.X ; /* 0x00 */
        /*0020*/                   IADD3 R2, R2, 0x1, RZ ; /* 0x00 */
        /*0030*/                   LDGSTS.E.BYPASS.128 [R4], desc[UR8][R6.64] ; /* 0x00 */
        /*0040*/                   HMMA.16816.F32.BF16 R8, R4, R6, R8 ; /* 0x00 */
        /*0050*/                   HMMA.1688.F32.TF32 R8, R4, R6, R8 ; /* 0x00 */
        /*0060*/                   HGMMA.64x64x16.F32.BF16 R24, gdesc[UR4], R24, gsb0 ; /* 0x00 */
        /*0070*/                   FFMA R3, R3, R4, R5 ; /* 0x00 */
        /*0080*/              @!P0 BRA 0x30 ; /* 0x00 */
        /*0090*/               @P1 BRA 0x20 ; /* 0x00 */
        /*00a0*/                   EXIT ; /* 0x00 */
        /*00b0*/                   BRA 0xb0; /* 0x00 */
        /*00c0*/                   NOP; /* 0x00 */
"""


def test_the_innermost_loop_with_products():
    code = read(_DUMP)
    assert code.instructions == 12
    products = 2 * 16 * 8 * 16 + 2 * 16 * 8 * 8 + 2 * 64 * 64 * 16 // 4 + 2 * 32
    assert code.loop == Loop(instructions=6, flops=products)
    assert {"HMMA", "HGMMA", "LDGSTS", "FFMA"} <= code.opcodes
    assert "NOP" not in code.opcodes


def test_a_kernel_without_products():
    lines = [line for line in _DUMP.splitlines() if "MMA" not in line and "FFMA" not in line]
    code = read("\n".join(lines))
    assert (code.instructions, code.loop) == (8, None)
