"""Bugs that are planted in a kernel's PTX are seen: as a fault, or in its result."""

from __future__ import annotations

import re
from functools import cache

import pytest
import torch
from engine import Fault
from host_runs import on_host
from levels import truth
from shapes import SHAPES, drawn

from lasem_fast.kernels.level_forward import level_forward
from lasem_fast.kernels.level_tiles import Tile

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
        pytest.param(80, r"@%p\d+ (st\.global)", r"\1", 0, "has written", id="a store unmasked"),
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
