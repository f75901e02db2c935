"""Tensor copies and mbarriers against their definitions, in programs of a few lines."""

from __future__ import annotations

import pytest
import torch
from engine import Executable, Fault
from parsing import parse
from tensor_maps import TENSOR_MAP, NotEncoded, tensor_map
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

_HEAD = """
.version 8.7
.target sm_90a
.address_size 64
.extern .shared .align 16 .b8 global_smem[];
.visible .entry kernel(
    .param .align 64 .b8 kernel_param_0[128],
    .param .u64 .ptr .global .align 1 kernel_param_1,
    .param .u64 .ptr .global .align 1 kernel_param_2,
    .param .u64 .ptr .global .align 1 kernel_param_3,
    .param .u64 .ptr .global .align 1 kernel_param_4
)
.reqntid %d
{
    .reg .pred %%p<9>;
    .reg .b32 %%r<99>;
    .reg .b64 %%rd<19>;
    mov.b64 %%rd1, kernel_param_0;
    cvta.param.u64 %%rd2, %%rd1;
    ld.param.b64 %%rd3, [kernel_param_1];
    ld.param.b64 %%rd4, [kernel_param_2];
    mov.u32 %%r1, %%tid.x;
    mul.wide.u32 %%rd5, %%r1, 4;
    add.s64 %%rd6, %%rd3, %%rd5;  // this thread's input
    add.s64 %%rd7, %%rd4, %%rd5;  // and its output
    setp.eq.b32 %%p1, %%r1, 0;
"""
_TAIL = "ret;\n}\n"
# Shared memory: what is copied, and the mbarrier behind it.
_SHARED, _BARRIER = 16384, 16384 - 8
_NAME = "cp.async.bulk.tensor.{rank}d.shared::cluster.global.mbarrier::complete_tx::bytes"
# By bytes of a line: Triton's number of the swizzle, and that in a matrix descriptor.
_SWIZZLES = {0: (0, 0), 32: (1, 3), 64: (2, 2), 128: (3, 1)}


def run(
    code: str, out: Tensor, tensor: Tensor | None = None, box=(8, 64), line=128, given=None,
    threads=32, seed=0,
) -> Tensor:  # fmt: skip
    """What ``code`` leaves in ``out``, which has no value yet."""
    tensor = numbered(8, 64) if tensor is None else tensor
    form = {"swizzle": _SWIZZLES[line][0], "elem_size": 2, "block_size": list(box),
            "fp4_padded": False}  # fmt: skip
    packed = tensor_map(TensorDescriptor.from_tensor(tensor, list(box)), form)
    given = torch.zeros(threads, dtype=torch.int32) if given is None else given
    out.view(torch.uint8).fill_(255)
    Executable(parse(_HEAD % threads + code + _TAIL)).run(
        (1,), _SHARED, [(TENSOR_MAP, packed), ("*i32", given), ("*i32", out)],
        [tensor, given, out], seed=seed,
    )  # fmt: skip
    return out


def numbered(*shape: int) -> Tensor:
    """Values that bfloat16 holds, none of them 0 and few of them alike."""
    count = torch.Size(shape).numel()
    return (torch.arange(count) % 255 + 1).view(shape).bfloat16()


def copied(corner, bytes_: int, *, to=0, rank=None, wait="0", guard="@%p1 ") -> str:
    """One thread makes an mbarrier and copies; all wait for the phase of parity ``wait``."""
    corner = list(reversed(corner))
    name = _NAME.format(rank=rank or len(corner))
    registers = "".join(f"mov.b32 %r{60 + i}, {c};\n" for i, c in enumerate(corner))
    coordinates = ", ".join(f"%r{60 + i}" for i in range(len(corner)))
    return f"""
        mov.b32 %r50, {_BARRIER};
        mov.b32 %r51, {to};
        {registers}
        @%p1 mbarrier.init.shared::cta.b64 [%r50], 1;
        bar.sync 0;
        @%p1 mbarrier.arrive.expect_tx.shared.b64 _, [%r50], {bytes_};
        {guard}{name} [%r51], [%rd2, {{{coordinates}}}], [%r50];
    """ + (waited(wait) if wait else "")


def waited(parity: str) -> str:
    return f"""
    {{
        .reg .pred complete;
        waitLoop:
        mbarrier.try_wait.parity.shared.b64 complete, [%r50], {parity};
        @!complete bra.uni waitLoop;
    }}
    """


# every thread of 32 gives out its share of the first bytes of shared memory
def dumped(bytes_: int) -> str:
    words = bytes_ // 4 // 32
    code = "mul.lo.s32 %r2, %r1, 4; cvt.u64.u32 %rd8, %r2; add.s64 %rd9, %rd4, %rd8;\n"
    return code + "".join(
        f"ld.shared.b32 %r3, [%r2+{128 * w}]; st.global.b32 [%rd9+{128 * w}], %r3;\n"
        for w in range(words)
    )


def cut_out(tensor: Tensor, corner, box) -> Tensor:
    """The box of a tensor with zeros all around it."""
    found = torch.zeros(box, dtype=tensor.dtype)
    sizes = list(zip(tensor.shape, corner, box, strict=True))
    if all(begin < size and begin + side > 0 for size, begin, side in sizes):
        there = [slice(max(0, begin), min(size, begin + side)) for size, begin, side in sizes]
        here = [slice(s.start - b, s.stop - b) for s, b in zip(there, corner, strict=True)]
        found[tuple(here)] = tensor[tuple(there)]
    return found


@pytest.mark.parametrize("corner", [(0, 0), (3, 8), (-2, -5), (6, 40), (-9, 0), (0, 200), (7, -64)])
@pytest.mark.parametrize("line", _SWIZZLES)
def test_a_box_and_zeros_around_the_tensor(line, corner):
    """A line of 128 bytes is 8 chunks of 16: those of line r change places by r % 8, and so on."""
    tensor, box = numbered(8, 72), (8, (line or 64) // 2)
    size = 2 * 8 * box[1]
    got = run(copied(corner, size) + dumped(size), torch.empty(box, dtype=torch.bfloat16), tensor,
              box, line)  # fmt: skip
    want = cut_out(tensor, corner, box).view(8, -1, 8)
    placed = torch.empty_like(want)
    for row in range(8):
        for chunk in range(want.shape[1]):
            flip = {0: 0, 32: row // 4 % 2, 64: row // 2 % 4, 128: row % 8}[line]
            placed[row, chunk ^ flip] = want[row, chunk]
    assert torch.equal(got.view(8, -1, 8), placed)


@pytest.mark.parametrize(
    ("shape", "box", "corner"),
    [
        ((96,), (64,), (40,)),
        ((4, 3, 16), (2, 2, 16), (3, -1, 0)),
        ((3, 2, 4, 16), (2, 2, 2, 8), (1, 1, -1, 8)),
        ((3, 2, 4, 3, 16), (1, 2, 2, 2, 8), (2, -1, 3, 1, 8)),
    ],
)
def test_dimensions(shape, box, corner):
    """The first coordinate is that of the innermost dimension, and it has no stride but 1."""
    tensor, size = numbered(*shape), 2 * torch.Size(box).numel()
    got = run(copied(corner, size) + dumped(size), torch.empty(box, dtype=torch.bfloat16), tensor,
              box, 0)  # fmt: skip
    assert torch.equal(got, cut_out(tensor, corner, box))


def test_strides():
    tensor = numbered(4, 6, 16)[:, ::2, :8].transpose(0, 1)
    got = run(copied((1, 1, 0), 128) + dumped(128), torch.empty(2, 4, 8, dtype=torch.bfloat16),
              tensor, (2, 4, 8), 0)  # fmt: skip
    assert torch.equal(got, cut_out(tensor, (1, 1, 0), (2, 4, 8)))


@pytest.mark.parametrize("columns", [False, True])
@pytest.mark.parametrize("line", [32, 64, 128])
def test_products_read_what_copies_of_the_same_swizzle_write(line, columns):
    """A is the unit matrix, so that the product is B, or 16 lines of it.

    Element (i, i) of A is in register 0 (of i < 8) or 3 of lane i % 8 * 4 + i % 8 // 2.
    """
    wide = line // 2
    rows, depth = (wide, 16) if columns else (8, wide)
    box = (depth, rows) if columns else (rows, depth)
    tensor = numbered(*box)
    ones = torch.zeros(128, 2, dtype=torch.bfloat16)
    for thread in range(128):
        row, first = thread % 32 // 4, thread % 4 * 2
        ones[thread] = torch.tensor([row == first, row == first + 1])
    registers = rows // 2
    totals = ", ".join(f"%r{10 + i}" for i in range(registers))
    code = copied((0, 0), 2 * rows * depth) + "ld.global.b32 %r3, [%rd6]; mov.b32 %r4, 0;\n"
    out = torch.empty(depth // 16, registers, 128)
    for step in range(depth // 16):
        start = 16 * 2 * step  # bytes in a line
        stride = 8 * line
        bits = start >> 4 | 1 << 16 | (stride >> 4) << 32 | _SWIZZLES[line][1] << 62
        code += f"""
            mov.b64 %rd8, {bits};
            mov.pred %p2, 0;
            wgmma.fence.sync.aligned;
            wgmma.mma_async.sync.aligned.m64n{rows}k16.f32.bf16.bf16 {{{totals}}},
            {{%r3, %r4, %r4, %r3}}, %rd8, %p2, 1, 1, {int(columns)};
            wgmma.commit_group.sync.aligned;
            wgmma.wait_group.sync.aligned 0;
        """.replace("},\n", "},")
        code += "".join(
            f"st.global.b32 [%rd7+{512 * (step * registers + i)}], %r{10 + i};\n"
            for i in range(registers)
        )
    got = run(code, out, tensor, box, line, ones.view(torch.int32).flatten(), threads=128)
    want = tensor.T if columns else tensor  # [rows, depth]
    for step in range(depth // 16):
        for thread in range(128):
            for i in range(registers):
                k = thread % 32 // 4 + 8 * (i // 2 % 2)
                n = i // 4 * 8 + thread % 4 * 2 + i % 2
                assert got[step, i, thread] == want[n, 16 * step + k]


def test_phases():
    """A phase is over when two threads have come; a wait is for that one or the one before it."""
    come = "mbarrier.arrive.expect_tx.shared.b64 _, [%r50], 0;"
    ask = "mbarrier.try_wait.parity.shared.b64 %p3, [%r50], {}; selp.b32 %r3, 1, 0, %p3;"
    give = "st.global.b32 [%rd7+{}], %r3;"
    code = f"""
        mov.b32 %r50, {_BARRIER};
        setp.lt.u32 %p2, %r1, 2;
        @%p1 mbarrier.init.shared::cta.b64 [%r50], 2;
        bar.sync 0;
        {ask.format(1)} {give.format(0)}
        @%p2 {come}
        {ask.format(0)} {give.format(128)}
        @%p2 {come}
        {ask.format(1)} {give.format(256)}
    """
    out = torch.empty(96, dtype=torch.int32)
    assert run(code, out).tolist() == [1] * 96
    for parity, again in ((0, ""), (1, f"@%p2 {come}")):
        with pytest.raises(Fault, match="whose phase never ends"):
            run(code.split(ask.format(1))[0] + again + ask.format(parity), out)


_OUT = torch.empty(8, 64, dtype=torch.bfloat16)
_READ = dumped(1024)


@pytest.mark.parametrize(
    ("code", "message"),
    [
        (copied((0, 0), 1024, wait="") + _READ, "a copy is still writing"),
        (copied((0, 0), 1024, wait="1") + _READ, "a copy is still writing"),
        (copied((0, 0), 1020), "whose phase never ends"),
        (copied((0, 0), 1028), "whose phase never ends"),
        (copied((0, 0), 1024, wait=""), "never waited for"),
        (copied((0, 0), 1024, to=64), "not a multiple of 128"),
        (copied((0, 0), 1024, to=_SHARED - 1024), "of an mbarrier's memory"),
        (copied((0, 0), 1024, to=_SHARED), "past the 16384 bytes"),
        (copied((0, 0, 0), 1024), "a tensor of 2 dimensions"),
        (copied((0, 0), 1024, guard=""), "a copy is still writing"),
        (copied((0, 0), 1024).replace("%rd2", "%rd1"), "not the address of a tensor map"),
        ("mov.b32 %r50, 64;" + waited("0"), "no mbarrier at 64"),
        (copied((0, 0), 1024) + "st.shared.b32 [%r50], %r1;", "of an mbarrier's memory"),
        ("mov.b32 %r50, 64; @%p1 mbarrier.init.shared::cta.b64 [%r50], 1; bar.sync 0; "
         "setp.lt.u32 %p2, %r1, 2; "
         "@%p2 mbarrier.arrive.expect_tx.shared.b64 _, [%r50], 4;", "once too often"),
        ("mov.b32 %r50, 64; @%p1 mbarrier.init.shared::cta.b64 [%r50], 0;", "for 0 threads"),
        (copied((0, 0), 1024, wait="") + "@%p1 mbarrier.inval.shared::cta.b64 [%r50];",
         "with copies that were never waited for"),
        (copied((0, 0), 1024, wait="2"), "for parity 2"),
        (copied((0, 0), 1024), None),
        ("mul.lo.s32 %r2, %r1, 4; st.shared.b32 [%r2], %r1;" + copied((0, 0), 1024),
         "no proxy fence after the store"),
        ("mul.lo.s32 %r2, %r1, 4; st.shared.b32 [%r2], %r1; fence.proxy.async.shared::cta;"
         + copied((0, 0), 1024), None),
        ("mul.lo.s32 %r2, %r1, 4; ld.shared.b32 %r3, [%r2];" + copied((0, 0), 1024),
         "no proxy fence after a load"),
        ("mul.lo.s32 %r2, %r1, 4; ld.shared.b32 %r3, [%r2]; fence.proxy.async.shared::cta;"
         + copied((0, 0), 1024), None),
    ],
)  # fmt: skip
def test_faults(code, message):
    """None: nothing is wrong."""
    if message is None:
        run(code, _OUT)
        return
    with pytest.raises(Fault, match=message):
        run(code, _OUT)


def test_only_who_has_waited_may_read():
    """Another warp that has not, may behind a barrier with one that has."""
    wait = "setp.lt.u32 %p2, %r1, 32; @!%p2 bra $behind;" + waited("0") + "$behind:\n"
    read = "ld.shared.b32 %r3, [128]; st.global.b32 [%rd7], %r3;\n"
    code, out = copied((0, 0), 1024, wait="") + wait, torch.empty(64, dtype=torch.int32)
    chunks = numbered(8, 64).view(torch.int32).view(8, 8, 4)
    for seed in range(4):
        got = run(code + "bar.sync 0;" + read, out, threads=64, seed=seed)
        assert got.tolist() == [int(chunks[1, 1, 0])] * 64  # where line 1 has its chunk 1
    with pytest.raises(Fault, match="no wait for the copy that wrote it"):
        run(code + read, out, threads=64)


def test_one_lane_is_elected():
    elect = "elect.sync %r{0}|%p2, -1; selp.b32 %r3, 1, 0, %p2;"
    code = elect.format(4) + elect.format(5)
    code += "shl.b32 %r4, %r4, 8; or.b32 %r3, %r3, %r4; st.global.b32 [%rd7], %r3;"
    elected = set()
    for seed in range(5):
        got = run(code, torch.empty(32, dtype=torch.int32), seed=seed).tolist()
        (lane,) = [lane for lane, value in enumerate(got) if value & 1]
        assert {value >> 8 for value in got} == {lane}
        elected.add(lane)
    assert len(elected) > 1


def test_labels_belong_to_their_block():
    loop = """
    {{
        .reg .pred more;
        again:
        add.s32 %r3, %r3, 1;
        setp.lt.s32 more, %r3, {};
        @more bra again;
    }}
    """
    code = "mov.b32 %r3, 0;" + loop.format(5) + loop.format(3) + "st.global.b32 [%rd7], %r3;"
    assert run(code, torch.empty(32, dtype=torch.int32)).tolist() == [6] * 32


@pytest.mark.parametrize(
    ("tensor", "box", "line", "message"),
    [
        (numbered(8, 65)[:, 1:], (8, 64), 128, "memory at"),
        (numbered(8, 68)[:, :64], (8, 64), 128, "strides of"),
        (numbered(8, 64)[:1].expand(8, -1), (8, 64), 128, "strides of"),
        (numbered(8, 64), (8, 64), 64, "side by side in lines of 64"),
        (numbered(8, 64), (8, 32), 128, "lines that are not full"),
        (numbered(300, 64), (512, 64), 128, "a box of"),
        (numbered(8, 64), (8, 4), 0, "8 bytes side by side"),
    ],
)
def test_what_the_driver_would_refuse(tensor, box, line, message):
    form = {"swizzle": _SWIZZLES[line][0], "elem_size": 2, "block_size": list(box),
            "fp4_padded": False}  # fmt: skip
    descriptor = TensorDescriptor.from_tensor(numbered(8, 64), list(box))
    descriptor.base, descriptor.shape = tensor, list(tensor.shape)
    descriptor.strides = list(tensor.stride())
    with pytest.raises(NotEncoded, match=message):
        tensor_map(descriptor, form)
