"""Bugs that are planted in a kernel's PTX are seen: as a fault, or in its result."""

from __future__ import annotations

import re
from functools import cache

import pytest
import torch
from engine import Fault
from host_runs import on_host
from levels import truth
from parsing import NotTranslated
from shapes import SHAPES, Shape, drawn

from lasem_fast.kernels import box_forward, box_wgrad, level_wgrad
from lasem_fast.kernels.box_form import box_form
from lasem_fast.kernels.box_gradient import box_gradient
from lasem_fast.kernels.kept import forget
from lasem_fast.kernels.level_forward import level_forward
from lasem_fast.kernels.level_tiles import Tile
from lasem_fast.kernels.weight_copies import weight_copies

# sm_80: a pool and 72 columns, which are more than a tile has; sm_90: products of warp groups
NAMES = {80: "64 channels, pool 2", 90: "64 channels, pool 1"}


@cache
def level(capability: int):
    shape = SHAPES[NAMES[capability]]
    case = drawn(shape, torch.bfloat16)
    want = truth(case, case.gradient()).y.bfloat16()
    return case, Tile(*shape.tiles.forward), want


def run(capability: int, change=lambda name, ptx: ptx) -> torch.Tensor:
    case, tile, _ = level(capability)
    weights, biases = ([t.float() for t in ts] for ts in (case.weights, case.biases))
    with on_host(capability, change=change):
        return level_forward(
            case.x.bfloat16(), weights, biases, None, case.tables, case.geometry, torch.bfloat16,
            tile=tile,
        )[0]  # fmt: skip


def planted(ptx: str, pattern: str, replacement: str, which: int = 0) -> str:
    """The PTX with one occurrence of a pattern replaced."""
    match = list(re.finditer(pattern, ptx))[which]
    return ptx[: match.start()] + match.expand(replacement) + ptx[match.end() :]


_REGISTER = r"(%r\d+)"
_A = rf"(mma\.sync[^{{]*\{{[^}}]*\}}, \{{ {_REGISTER}), {_REGISTER}, {_REGISTER}"
_B = rf"(mma\.sync[^{{]*\{{[^}}]*\}}, \{{[^}}]*\}}, \{{) {_REGISTER}, {_REGISTER}"
_SIZE = r"(cp\.async\.cg[^;]*, 0x10,) %r\d+"
RESULT, FAULT = "", "level_forward_kernel: block"


@pytest.mark.parametrize("capability", NAMES)
def test_nothing_planted_is_right(capability):
    assert torch.equal(run(capability), level(capability)[2])


@pytest.mark.parametrize(
    ("capability", "pattern", "replacement", "which", "seen"),
    [
        pytest.param(80, _A, r"\1, \4, \3", 0, RESULT, id="two registers of a swapped"),
        pytest.param(80, _B, r"\1 \3, \2", 0, RESULT, id="registers of b swapped"),
        pytest.param(80, r"x4\.shared", "x4.trans.shared", 0, RESULT, id="a matrix transposed"),
        pytest.param(80, r"wait_group\s+4", "wait_group 5", 0,
                     "a copy is still writing", id="a wait one group short"),
        pytest.param(80, r"wait_group\s+0", "wait_group 1", 0,
                     "a copy is still writing", id="a last wait one group short"),
        pytest.param(80, r"bar\.sync\s+0;", "", 3, "no barrier after the write",
                     id="no barrier before products"),
        pytest.param(80, r"bar\.sync\s+0;", "", 4, "no barrier after a read",
                     id="no barrier before a buffer is filled again"),
        pytest.param(80, r"bar\.sync\s+0;", "", 7, "no barrier after the write",
                     id="no barrier in a change of layout"),
        pytest.param(80, r"setp\.lt\.s32", "setp.le.s32", 1, "outside of all tensors",
                     id="a row too many"),
        pytest.param(80, r"setp\.lt\.s32", "setp.le.s32", 0, RESULT, id="the branch off by one"),
        pytest.param(80, _SIZE, r"\1 16", 0, "outside of all tensors", id="a load unmasked"),
        pytest.param(80, r"@%p\d+ (st\.global)", r"\1", 1, "has written", id="a store unmasked"),
        pytest.param(90, r"1, 1, 0, 0;", "1, 1, 0, 1;", 0, RESULT, id="b by columns"),
        pytest.param(90, r"1, 1, 0, 0;", "1, -1, 0, 0;", 0, FAULT, id="b negated"),
        pytest.param(90, r"wgmma\.wait_group\.sync\.aligned 0", "wgmma.wait_group.sync.aligned 1",
                     0, "changed before the wait", id="products that are not waited for"),
        pytest.param(90, r"bar\.sync\s+0;", "", 2, "no barrier after the write",
                     id="no barrier before products of the warp group"),
        pytest.param(90, r"fence\.proxy\.async\.shared::cta;", "", 0, "no proxy fence",
                     id="no fence between stores and products"),
        pytest.param(90, r"wait_group\s+2", "wait_group 3", 0, "a copy is still writing",
                     id="a wait one group short on sm_90"),
    ],
)  # fmt: skip
def test_planted_bug_is_seen(capability, pattern, replacement, which, seen):
    def change(name: str, ptx: str) -> str:
        return planted(ptx, pattern, replacement, which)

    if seen:
        with pytest.raises(Fault, match=seen):
            run(capability, change)
    else:
        assert not torch.equal(run(capability, change), level(capability)[2])


def test_a_pool_that_takes_the_smallest():
    def change(name: str, ptx: str) -> str:
        return ptx.replace("setp.gt.f32", "setp.lt.f32")

    assert not torch.equal(run(80, change), level(80)[2])


def test_what_a_load_gives_where_it_is_masked_shows():
    """Where the copies of sm_80 fill with zeros, a value of another load in their place."""

    def change(name: str, ptx: str) -> str:
        return re.sub(r"selp\.b32(\s+%r\d+), 16, 0, ", r"selp.b32\1, 16, 16, ", ptx)

    with pytest.raises(Fault, match="outside of all tensors"):
        run(80, change)


@cache
def boxes():
    """A level with ragged boxes, and everything that its kernels read."""
    case = drawn(Shape(64, 72, (5, 6)), torch.bfloat16)
    dy = case.gradient().bfloat16()
    weights, biases = ([t.float() for t in ts] for ts in (case.weights, case.biases))
    form = box_form(case.x.shape, weights[0].shape, case.geometry)
    tile = box_wgrad.TILES[-1]
    box = box_wgrad.box_of(tile, case.x.shape, case.geometry, (3, 3))
    with on_host(90):
        filters = weight_copies(weights, torch.bfloat16, form)
        _, code = box_forward.box_forward(
            case.x.bfloat16(), filters, biases, None, case.tables, case.geometry
        )
        gradient = box_gradient(dy, code, 2, case.tables, case.geometry, box, tile.columns)
    return case, weights, biases, filters, gradient, dy


def run_in_boxes(change=lambda name, ptx: ptx, seed: int = 0) -> torch.Tensor:
    case, _, biases, filters, *_ = boxes()
    with on_host(90, change=change, seed=seed):
        return box_forward.box_forward(
            case.x.bfloat16(), filters, biases, None, case.tables, case.geometry,
            box_forward.TILES[4],
        )[0]  # fmt: skip


def sum_in_boxes(change=lambda name, ptx: ptx) -> torch.Tensor:
    case, weights, biases, filters, gradient, _ = boxes()
    with on_host(90, change=change):
        (dweight, _), _ = box_wgrad.box_wgrad(
            gradient, case.x.bfloat16(), filters, weights, biases, case.tables, case.geometry,
            box_wgrad.TILES[-1],
        )  # fmt: skip
    return dweight


def test_nothing_planted_is_right_in_boxes():
    case, *_, dy = boxes()
    want = truth(case, dy)
    assert torch.equal(run_in_boxes(), want.y.bfloat16())
    assert torch.equal(run_in_boxes(seed=1), want.y.bfloat16())
    assert torch.equal(sum_in_boxes(), want.dweights[0].float())


_WAIT = r"waitLoop:\s+mbarrier\.try_wait[^;]*;\s+@!complete bra\.uni waitLoop;"
_TURN = r"xor\.b32(\s+%r\d+), (%r\d+), %r\d+;(?=\s+selp)"
_COPY = r"(cp\.async\.bulk\.tensor[^;{]*\{%r\d+)"
STUCK, OPEN = "whose phase never ends", "a copy is still writing"


@pytest.mark.parametrize(
    ("pattern", "replacement", "which", "seen"),
    [
        pytest.param(_WAIT, "", 0, OPEN, id="no wait for the pixels"),
        pytest.param(_WAIT, "", 1, OPEN, id="no wait for the filters"),
        pytest.param(r"(try_wait[^;]*), %r\d+;", r"\1, 1;", 0, OPEN, id="the other parity"),
        pytest.param(_TURN, r"mov.b32\1, \2;", 0, OPEN, id="a parity that never turns"),
        pytest.param(r", 8192;", ", 4096;", 0, STUCK, id="half the bytes"),
        pytest.param(r", 8192;", ", 16384;", -1, STUCK, id="bytes that never come"),
        pytest.param(r"(init[^;]*), 1;", r"\1, 2;", 0, STUCK, id="a thread that never comes"),
        pytest.param(r"@%p\d+ (mbarrier\.arrive)", r"\1", 0, "too often", id="all threads come"),
        pytest.param(r"@%p\d+ mbarrier\.arrive[^;]*;", "", -1, STUCK, id="nobody comes"),
        pytest.param(r"@%p\d+ mbarrier\.init[^;]*;", "", 0, "no mbarrier", id="none made"),
        pytest.param(r"@%p\d+ (mbarrier\.init)", r"\1", 0, "of an mbarrier's memory",
                     id="all threads make it"),
        pytest.param(r"@%p\d+ (cp\.async\.bulk)", r"\1", 0, OPEN, id="all threads copy"),
        pytest.param(r"and\.pred(\s+%p\d+), %p\d+, (%p\d+);", r"mov.pred\1, \2;", 9,
                     "never waited for", id="copies behind the last step"),
        pytest.param(rf"{_COPY}, (%r\d+), (%r\d+)", r"\1, \3, \2", 0, RESULT,
                     id="row and column swapped"),
        pytest.param(rf"{_COPY}, (%r\d+), (%r\d+)", r"\1, \3, \2", 1, RESULT,
                     id="tap and filter swapped"),
        pytest.param(r"add\.s32(\s+%r\d+, %r\d+), -1;", r"add.s32\1, 0;", 0, RESULT,
                     id="rows off by one"),
        pytest.param(r"(cvta\.param\.u64\s+%rd\d+), %rd\d+;", r"\1, %rd9;", 0,
                     "of a tensor of 5 dimensions", id="the other tensor"),
        pytest.param(r"cvta\.param\.u64", "mov.b64", 0, "not the address of a tensor map",
                     id="an address of another space"),
        pytest.param(r"fence\.proxy\.async\.shared::cta;", "", 0, "no proxy fence after a load",
                     id="no fence before a buffer is filled again"),
        pytest.param(r"setp\.gt\.s32(\s+%p\d+, %r\d+), 3;", r"setp.gt.s32\1, 2;", 0,
                     "still reads", id="a ring one buffer short"),
        pytest.param(r"xor\.b32(\s+%r\d+, %r\d+), 32;", r"xor.b32\1, 64;", 0, RESULT,
                     id="a bit of the swizzle"),
        pytest.param("4611686293305294848", "9223372311732682752", 0, RESULT,
                     id="products of another swizzle"),
    ],
)  # fmt: skip
def test_bug_in_copies_is_seen(pattern, replacement, which, seen):
    def change(name: str, ptx: str) -> str:
        return planted(ptx, pattern, replacement, which)

    if seen:
        with pytest.raises(Fault, match=seen):
            run_in_boxes(change)
    else:
        assert not torch.equal(run_in_boxes(change), run_in_boxes())


@pytest.mark.parametrize(
    ("pattern", "replacement", "seen"),
    [
        pytest.param(r"wait_group\.sync\.aligned 3", "wait_group.sync.aligned 15", "still reads",
                     id="copies over what products read"),
        pytest.param(r"bar\.sync\s+0;", "", "no barrier after a read", id="no barriers"),
        pytest.param(r"@%p\d+ cp\.async\.bulk[^;]*;", "", STUCK, id="no copies"),
    ],
)  # fmt: skip
def test_bug_throughout_the_loop_is_seen(pattern, replacement, seen):
    def change(name: str, ptx: str) -> str:
        begin = ptx.index("$L__BB0_1:")
        return ptx[:begin] + re.sub(pattern, replacement, ptx[begin:])

    with pytest.raises(Fault, match=seen):
        run_in_boxes(change)


@pytest.mark.parametrize(
    ("pattern", "replacement", "which", "seen"),
    [
        pytest.param(_WAIT, "", 0, OPEN, id="no wait for the gradient"),
        pytest.param(_WAIT, "", 3, OPEN, id="no wait for the third tap"),
        pytest.param(r"cp\.async\.wait_group\s+2", "cp.async.wait_group 4", 0, OPEN,
                     id="no wait for what is to be read"),
        pytest.param(r"(cp\.async\.wait_group\s+2;)([^%]*)bar\.sync\s+0;", r"\1\2", 0,
                     "no barrier after the write", id="no barrier before it is looked up"),
        pytest.param(rf"({_COPY[1:-1]}, %r\d+, %r\d+, %r\d+), %r\d+", r"\1, %r1", 0, RESULT,
                     id="another row of the gradient"),
        pytest.param(r"add\.s32(\s+%r\d+, %r\d+), %r\d+;(?=[^;]*@%p\d+ mbarrier\.arrive)",
                     r"add.s32\1, 0;", 0, RESULT, id="the row of another tap"),
    ],
)  # fmt: skip
def test_bug_in_a_sum_is_seen(pattern, replacement, which, seen):
    def change(name: str, ptx: str) -> str:
        return planted(ptx, pattern, replacement, which) if name == "box_wgrad_kernel" else ptx

    if seen:
        with pytest.raises(Fault, match=seen):
            sum_in_boxes(change)
    else:
        assert not torch.equal(sum_in_boxes(change), sum_in_boxes())


def shared_sum(monkeypatch, change=lambda name, ptx: ptx, seed: int = 0) -> torch.Tensor:
    """A gradient whose sums ten programs share, in groups of four."""
    case, weights, biases, filters, _, dy = boxes()
    monkeypatch.setattr(level_wgrad, "splits_of", lambda programs, steps: 10)
    forget()
    with on_host(90, change=change, seed=seed):
        code = box_forward.box_forward(
            case.x.bfloat16(), filters, biases, None, case.tables, case.geometry
        )[1]
        (dweight, _), _ = level_wgrad.level_wgrad(
            dy, code, case.x.bfloat16(), weights, biases, case.tables, case.geometry,
            filters.arrivals, tile=level_wgrad.TENSOR_CORE_TILES[1],
        )  # fmt: skip
    monkeypatch.undo()
    forget()
    assert not filters.arrivals.any()
    return dweight


@pytest.mark.parametrize("seed", range(3))
def test_nothing_planted_is_right_in_a_shared_sum(seed, monkeypatch):
    """Whoever comes last."""
    case, *_, dy = boxes()
    want = truth(case, dy).dweights[0].float()
    assert torch.equal(shared_sum(monkeypatch, seed=seed), want)


_BARRIER = r"bar\.sync\s+0;(?=(?:(?!bar\.sync|@%p)[\s\S])*@%p\d+ atom\.global)"
_BEHIND = r"(@%p\d+ atom\.global(?:(?!bar\.sync)[\s\S])*)bar\.sync\s+0;"


@pytest.mark.parametrize(
    ("pattern", "replacement", "which", "seen"),
    [
        pytest.param(_BARRIER, "", 0, "no barrier after", id="no barrier before an arrival"),
        pytest.param(_BARRIER, "", 1, "no barrier after", id="none before that of a group"),
        pytest.param(_BEHIND, r"\1", 0, "no barrier after the write", id="none behind it"),
        pytest.param(r"(atom\.global[^-]*), -1;", r"\1, -2;", 0, "another block has read",
                     id="the last but one adds up"),
        pytest.param(r"(atom\.global)\.gpu\.acq_rel", r"\1.gpu.relaxed", 0, "no such instructions",
                     id="an arrival that orders nothing"),
    ],
)  # fmt: skip
def test_bug_in_a_shared_sum_is_seen(pattern, replacement, which, seen, monkeypatch):
    def change(name: str, ptx: str) -> str:
        return planted(ptx, pattern, replacement, which) if name == "level_wgrad_kernel" else ptx

    with pytest.raises((Fault, NotTranslated), match=seen):
        shared_sum(monkeypatch, change)
