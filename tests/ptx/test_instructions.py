"""The engine on programs of a few lines, with numbers worked by hand, and what it refuses."""

from __future__ import annotations

import pytest
import torch
from engine import Executable, Fault
from parsing import NotTranslated, parse

_HEAD = """
.version 8.7
.target sm_90a
.address_size 64
.extern .shared .align 16 .b8 global_smem[];
.visible .entry kernel(
    .param .u64 .ptr .global .align 1 kernel_param_0,
    .param .u64 .ptr .global .align 1 kernel_param_1,
    .param .u64 .ptr .global .align 1 kernel_param_2,
    .param .u64 .ptr .global .align 1 kernel_param_3
)
.reqntid %d
{
    .reg .pred %%p<9>;
    .reg .b16 %%rs<9>;
    .reg .b32 %%r<99>;
    .reg .b64 %%rd<19>;
    ld.param.b64 %%rd1, [kernel_param_0];
    ld.param.b64 %%rd2, [kernel_param_1];
    mov.u32 %%r1, %%tid.x;
    mul.wide.u32 %%rd3, %%r1, 4;
    add.s64 %%rd4, %%rd1, %%rd3;  // this thread's input
    add.s64 %%rd5, %%rd2, %%rd3;  // and its output
    shl.b32 %%r2, %%r1, 2;
"""
_TAIL = "ret;\n}\n"

LANES = range(32)


def run(code: str, values=LANES, threads=32, blocks=1, **options) -> list[int]:
    """What ``code`` leaves in every thread's output, int32."""
    given = torch.tensor(list(values), dtype=torch.int32)
    out = torch.full((len(given),), -1, dtype=torch.int32)
    arguments = [("*i32", given), ("*i32", out)]
    Executable(parse(_HEAD % threads + code + _TAIL)).run(
        (blocks,), 1024, arguments, [given, out], **options
    )
    return out.tolist()


def of(code: str, value: int) -> int:
    """What ``code`` makes of %r3 = ``value`` in %r4."""
    body = f"ld.global.b32 %r3, [%rd4];\n{code}\nst.global.b32 [%rd5], %r4;\n"
    return run(body, [value] * 32)[0]


@pytest.mark.parametrize(
    ("code", "value", "expected"),
    [
        ("shl.b32 %r4, %r3, 32;", 1, 0),
        ("shr.s32 %r4, %r3, 40;", -8, -1),
        ("shr.u32 %r4, %r3, 28;", -1, 15),
        ("bfe.u32 %r4, %r3, 4, 8;", 0x12345, 0x34),
        ("bfe.s32 %r4, %r3, 4, 8;", 0xF81, -8),
        ("prmt.b32 %r4, %r3, 0x11223344, 0x7510;", 0x55667788, 0x11337788),
        ("prmt.b32 %r4, %r3, 0, 0x8888;", 0x80, -1),
        ("div.s32 %r4, %r3, 4;", -7, -1),
        ("rem.s32 %r4, %r3, 4;", -7, -3),
        ("mul.hi.u32 %r4, %r3, 8;", -1, 7),
        ("mul.hi.s32 %r4, %r3, 8;", -1, -1),
        ("mad.lo.s32 %r4, %r3, 3, -1;", 5, 14),
        ("cvt.s32.s8 %r4, %r3;", 0x1FF, -1),
        ("mov.b32 {%rs1, %rs2}, %r3; cvt.u32.u16 %r4, %rs2;", 0x30002, 3),
        ("mov.b32 {%rs1, %rs2}, %r3; mov.b32 %r4, {%rs2, %rs1};", 0x30002, 0x20003),
        # 1 + 2^-8 lies between two bfloat16s: to the even one
        ("cvt.rn.bf16x2.f32 %r4, %r3, 0f3FC00000;", 0x3F808000, 0x3F803FC0),
        ("cvt.rn.bf16x2.f32 %r4, %r3, %r3;", 0x3F818000, 0x3F823F82),
        ("setp.gtu.f32 %p1, %r3, 0f00000000; selp.b32 %r4, 1, 2, %p1;", 0x7FC00000, 1),
        ("setp.ne.f32 %p1, %r3, 0f00000000; selp.b32 %r4, 1, 2, %p1;", 0x7FC00000, 2),
        ("redux.sync.max.s32 %r4, %r1, -1;", 0, 31),
        ("shfl.sync.bfly.b32 %r4, %r1, 5, 31, -1;", 0, 5),
        ("shfl.sync.idx.b32 %r4, %r1, 7, 31, -1;", 0, 7),
    ],
)
def test_worked_by_hand(code, value, expected):
    assert of(code, value) == expected


@pytest.mark.parametrize(
    ("compared", "of_nan", "of_equals"),
    [("ne", 0, 0), ("neu", 1, 0), ("gtu", 1, 0), ("nan", 1, 0)],
)
@pytest.mark.parametrize(("dtype", "one"), [("bf16", 0x3F80), ("f16", 0x3C00)])
def test_comparisons_of_halves(compared, of_nan, of_equals, dtype, one):
    """Where one of two is NaN, where both are 1, and of a pair the lower one first."""
    both = "selp.b32 %r4, 1, 0, %p1; @%p2 add.s32 %r4, %r4, 2;"
    pair = f"setp.{compared}.{dtype}x2 %p1|%p2, %r3, {one << 16 | one}; {both}"
    assert of(pair, 0x7FFF << 16 | one) == of_equals + 2 * of_nan
    single = f"mov.b16 %rs2, {one}; setp.{compared}.{dtype} %p1, %rs1, %rs2;"
    for value, expected in ((0x7FFF, of_nan), (one, of_equals)):
        assert of(f"cvt.u16.u32 %rs1, %r3; {single} selp.b32 %r4, 1, 0, %p1;", value) == expected


def test_lanes_that_branch_apart_meet_again():
    got = run("""
        and.b32 %r3, %r1, 1;
        setp.eq.b32 %p1, %r3, 0;
        @%p1 bra $even;
        mov.b32 %r4, 100;
        bra.uni $met;
    $even:
        mov.b32 %r4, 200;
    $met:
        shfl.sync.idx.b32 %r5, %r4, 1, 31, -1;
        add.s32 %r4, %r4, %r5;
        st.global.b32 [%rd5], %r4;
    """)
    assert got == [300, 200] * 16


def test_a_loop_of_another_length_in_every_lane():
    got = run("""
        mov.b32 %r4, 0;
        mov.b32 %r5, 0;
    $loop:
        add.s32 %r4, %r4, %r5;
        add.s32 %r5, %r5, 1;
        setp.le.s32 %p1, %r5, %r1;
        @%p1 bra $loop;
        st.global.b32 [%rd5], %r4;
    """)
    assert got == [n * (n + 1) // 2 for n in range(32)]


def test_a_row_of_a_times_a_column_of_b():
    """A has 1 at (row 3, k 5), B has 2 at (k 5, column 6): C has 2 at (3, 6), added to its own 1.

    Element (3, 5) of A is the upper half of register 0 of lane 3 * 4 + 2; (5, 6) of B is the upper
    half of register 0 of lane 6 * 4 + 2; (3, 6) of C is register 0 of lane 3 * 4 + 3.
    """
    got = run(
        """
        setp.eq.b32 %p1, %r1, 14;
        selp.b32 %r3, 0x3F800000, 0, %p1;
        setp.eq.b32 %p2, %r1, 26;
        selp.b32 %r4, 0x40000000, 0, %p2;
        mov.b32 %r5, 0f3F800000;
        mov.b32 %r6, 0;
        """
        "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 { %r7, %r8, %r9, %r10 }, "
        "{ %r3, %r6, %r6, %r6 }, { %r4, %r6 }, { %r5, %r6, %r6, %r6 };\n"
        "st.global.b32 [%rd5], %r7;\n"
    )
    one, three = 0x3F800000, 0x40400000
    assert got == [three if lane == 15 else one for lane in range(32)]


def test_ldmatrix_gives_rows_and_columns():
    """Row i of the matrix is i * 8 + 0..7; lane 5 holds (1, 2..3), transposed (2..3, 1)."""
    write = "".join(
        f"add.s32 %r5, %r4, {2 * j}; add.s32 %r6, %r5, 1; shl.b32 %r6, %r6, 16; "
        f"or.b32 %r6, %r6, %r5; @%p1 st.shared.b32 [%r3+{4 * j}], %r6;\n"
        for j in range(4)
    )
    code = f"""
        setp.lt.u32 %p1, %r1, 8;
        shl.b32 %r3, %r1, 4;
        shl.b32 %r4, %r1, 3;
        {write}
        bar.sync 0;
        ldmatrix.sync.aligned.m8n8.x1%s.shared.b16 {{%%r7}}, [%%r3];
        st.global.b32 [%%rd5], %%r7;
    """.replace("%%", "%")
    assert run(code.replace("%s", ""))[5] == 10 | 11 << 16
    assert run(code.replace("%s", ".trans"))[5] == 17 | 25 << 16


_COPY = """
    shl.b32 %r3, %r1, 2;
    cp.async.ca.shared.global [%r3], [%rd4], 0x4, 4;
    cp.async.commit_group;
    cp.async.wait_group {wait};
    {barrier}
    xor.b32 %r4, %r3, {flip};
    ld.shared.b32 %r5, [%r4];
    st.global.b32 [%rd5], %r5;
    cp.async.wait_group 0;
"""


def test_a_copy_that_is_waited_for():
    code = _COPY.format(wait=0, barrier="bar.sync 0;", flip=4)
    assert run(code) == [lane ^ 1 for lane in range(32)]
    assert run(code, range(64), threads=64, seed=3) == [lane ^ 1 for lane in range(64)]


@pytest.mark.parametrize(
    ("code", "message"),
    [
        (_COPY.format(wait=1, barrier="bar.sync 0;", flip=4), "a copy is still writing"),
        (_COPY.format(wait=0, barrier="", flip=4), "no barrier after the write by thread"),
        ("cp.async.ca.shared.global [%r2], [%rd4], 4, 4;", "never waited for"),
        ("st.global.b32 [%rd5+4], %r1;", "outside of all tensors, by 4 bytes"),
        ("ld.global.b32 %r3, [%rd4+-4];", "outside of all tensors, by -4 bytes"),
        ("ld.global.b64 %rd6, [%rd4];", "not a multiple of 8"),
        ("st.shared.b32 [%r2+1000], %r1;", "past the 1024 bytes"),
        ("ld.shared.b32 %r3, [%r2]; st.shared.b32 [0], %r1;", "no barrier after"),
        ("setp.lt.u32 %p1, %r1, 8; @%p1 bar.sync 0;", "by lanes 000000ff"),
        ("setp.lt.u32 %p1, %r1, 8; @%p1 bra $end; bar.sync 0; $wait: bra $end2; $end: "
         "shfl.sync.idx.b32 %r3, %r1, 0, 31, -1; $end2:", "wait for each other"),
    ],
)  # fmt: skip
def test_faults(code, message):
    with pytest.raises(Fault, match=message):
        run(code)


def test_blocks_that_share_memory():
    with pytest.raises(Fault, match="writes what block 0 has written"):
        run("st.global.b32 [%rd5], %r1;", blocks=2)
    with pytest.raises(Fault, match="reads what block 0 has written"):
        run("ld.global.b32 %r3, [%rd5]; st.global.b32 [%rd5], %r3;", blocks=2)


def test_atomics_of_several_blocks():
    """The largest of all lanes of all blocks is left; nothing else may touch it."""
    largest = "atom.global.gpu.acq_rel.max.s32 %r3, [%rd2+4], %r1;"
    for seed in range(3):
        assert run(largest, blocks=2, seed=seed) == [-1, 31] + [-1] * 30
    before = "sub.s32 %r4, 0, %r1; atom.global.gpu.acq_rel.max.s32 %r3, [%rd4], %r4;"
    assert run(before + "st.global.b32 [%rd5], %r3;", [-5] * 32) == [-5] * 32
    for touched in ("ld.global.b32 %r5, [%rd2+4];", "st.global.b32 [%rd2+4], %r1;"):
        with pytest.raises(Fault, match="by atomics"):
            run(largest + touched)
        with pytest.raises(Fault, match="without atomics"):
            run(touched + largest)


def test_blocks_that_arrive_at_a_number():
    """The second one reads what the first one stored, with barriers before and behind."""
    code = """
        ld.global.b32 %r3, [%rd4];
        mov.u32 %r4, %ctaid.x;
        mul.wide.u32 %rd6, %r4, 128;
        add.s64 %rd7, %rd5, %rd6;
        st.global.b32 [%rd7+4], %r3;
        {before}
        setp.eq.b32 %p1, %r1, 0;
        mov.b32 %r5, 1;
        mov.b32 %r6, 0;
        @%p1 atom.global.gpu.acq_rel.add.u32 %r6, [%rd2], %r5;
        @%p1 st.shared.b32 [0], %r6;
        {behind}
        bar.warp.sync -1;
        ld.shared.b32 %r6, [0];
        setp.ne.b32 %p2, %r6, 0;
        @%p2 bra $end;
        ld.global.b32 %r7, [%rd5+4];
        st.global.b32 [%rd5+260], %r7;
        $end:
    """
    barrier, given = "bar.sync 0;", [*range(100, 132), *[0] * 65]

    def left(before: str, behind: str) -> list[int]:
        return run(code.format(before=before, behind=behind), given, blocks=2)

    # the number begins at -1, so that the second of two finds 0
    with pytest.raises(Fault, match="has written"):
        left("", barrier)
    with pytest.raises(Fault, match="has written"):
        left(barrier, "")
    assert left(barrier, barrier)[65:] == given[:32]


def test_warps_order_themselves_by_barriers_of_the_block():
    """A barrier of the warp is not enough for what another warp has written."""
    code = """
        st.shared.b32 [%r2], %r1;
        {barrier}
        xor.b32 %r4, %r2, {flip};
        ld.shared.b32 %r5, [%r4];
        st.global.b32 [%rd5], %r5;
    """
    within = code.format(barrier="bar.warp.sync -1;", flip=4)
    assert run(within, range(64), threads=64) == [lane ^ 1 for lane in range(64)]
    with pytest.raises(Fault, match="no barrier"):
        run(code.format(barrier="bar.warp.sync -1;", flip=128), range(64), threads=64)
    across = code.format(barrier="bar.sync 0;", flip=128)
    for seed in range(3):
        assert run(across, range(64), threads=64, seed=seed) == [n ^ 32 for n in range(64)]


@pytest.mark.parametrize(
    ("code", "message"),
    [
        ("vote.sync.any.pred %p1, %p2, -1;", "no such instructions: vote.sync.any.pred"),
        ("mov.b32 %r3, elsewhere;", "line 25: operand elsewhere"),
        ("bra $nowhere;", "label"),
    ],
)
def test_what_is_not_known_is_refused(code, message):
    with pytest.raises(NotTranslated, match=message):
        run(code)
