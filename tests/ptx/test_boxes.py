"""The kernels that read boxes by tensor copies, as Triton compiled them, against float64."""

from __future__ import annotations

import random

import pytest
import torch
from host_runs import on_host
from levels import Case, Truth, draw_boxes, integers, permuted, truth
from shapes import SHAPES, Shape, drawn, exact, results, run
from wide_offsets import wide_offsets

from lasem_fast.backends import box_level_run
from lasem_fast.backends.triton_level_op import Tiles, level
from lasem_fast.kernels import box_forward, box_gradient, unfolded
from lasem_fast.kernels.box_form import box_form
from lasem_fast.kernels.boxes import Box
from lasem_fast.kernels.level_geometry import Geometry
from lasem_fast.kernels.level_rows import Rows
from lasem_fast.kernels.many_copies import ManyCopies
from lasem_fast.kernels.weight_copies import weight_copies

CAPABILITY = 90
# A float32 result may be off from float64 by twice what PyTorch's is: the order of the sum differs.
ERROR_FACTOR = 2

# parents that are used twice and not at all, in any order
_SOME = Rows((2, 0, 2), (1, 0, 0), 3)
_SKIPS = Rows((2, 0, 2), (1, 0, 0), 3, (1, 0, 1), 3)
_LIVE = (True, False, True)
BOXES = {
    "pool 1": Shape(64, 64, (5, 6)),
    "pool 2": Shape(24, 72, (6, 7), 2, rows=_SOME, samples=3),
    "pool 2, padded": Shape(72, 24, (5, 6), 2, rows=_SOME, pool_pad=1, live=_LIVE),
    "pool 3": Shape(32, 24, (8, 10), 3, rows=_SOME, pool_pad=1, live=_LIVE),
    "skip": SHAPES["72 channels, skip"],
    "two ReLUs around a skip, pool 2": Shape(16, 40, (5, 4), 2, rows=_SKIPS, relu_after=1,
                                             live=(True, True, True)),
    "skip of the convolution itself": Shape(40, 16, (4, 3), rows=_SKIPS, relu=0),
    "one branch, no bias, no ReLU": Shape(16, 24, (7, 9), rows=Rows((1, 0), (0, 0), 2), branches=1,
                                          kernel=5, pad=2, relu=0, biased=False),
    "no row of the first branch": Shape(16, 16, (4, 5), rows=Rows((1, 0), (1, 1), 2)),
    "2 by 2 filters, wide padding": Shape(8, 16, (3, 4), 2, kernel=2, pad=2, samples=5, rows=_SOME),
    "linear": Shape(16, 24, (3, 3), rows=Rows((2, 0, 2), (1, 0, 0), 3), pad=0, samples=5,
                    channels_last=False),
    "a pixel of many images": Shape(8, 16, (2, 2), rows=Rows((0, 1), (1, 0), 2), samples=126,
                                    live=(True, True)),
    "a row of pixels of many images": Shape(8, 16, (3, 1), rows=Rows((0, 1), (1, 0), 2),
                                            samples=126),
}  # fmt: skip


@pytest.mark.parametrize("seed", [0, 1])
@pytest.mark.parametrize("name", BOXES)
def test_exact_on_integers_whatever_the_order_of_warps(name, seed):
    case = drawn(BOXES[name], torch.bfloat16)
    dy = case.gradient()
    exact(run(case, dy, CAPABILITY, Tiles(), boxes=True, seed=seed), truth(case, dy))


def test_exact_in_fp16():
    case = drawn(BOXES["pool 2, padded"], torch.float16)
    dy = case.gradient()
    exact(run(case, dy, CAPABILITY, Tiles(), boxes=True), truth(case, dy))


@pytest.mark.parametrize("seed", range(6))
def test_drawn_levels(seed):
    case = draw_boxes(seed, torch.bfloat16)
    dy = case.gradient()
    exact(run(case, dy, CAPABILITY, Tiles(), boxes=True, seed=seed), truth(case, dy))


def test_taps_that_meet_only_padding_are_left_out():
    """With a pixel of many images in a box, so that what a program reads depends on its box."""
    case = drawn(BOXES["a pixel of many images"]._replace(live=None), torch.bfloat16)
    dy, leaves = case.gradient(), [leaf.float() for leaf in case.leaves]
    leaves[0] = leaves[0].bfloat16()
    leaves = [leaf.requires_grad_() for leaf in leaves]
    here = case.with_leaves(leaves)
    with on_host(CAPABILITY, seed=1) as launches:
        y = level(here.x, here.weights, here.biases, here.geometry, here.rows, dtype=case.dtype,
                  boxes=True)  # fmt: skip
        dx, *rest = torch.autograd.grad(y, leaves, dy.bfloat16())
    exact(Truth(y.detach(), dx, tuple(rest[:2]), tuple(rest[2:]), ()), truth(case, dy))
    for kernel, all_of_them in (("forward", "TAPS"), ("dgrad", "TAPS"), ("wgrad", "BOXES")):
        (found,) = [launch.arguments for launch in launches
                    if launch.kernel.__name__ == f"box_{kernel}_kernel"]  # fmt: skip
        assert (found["BOX_H"], found["BOX_W"]) == (1, 1) and found["IMAGES"] > 32
        assert not found[f"ALL_{all_of_them}"]


# Where boxes lie in the padding from end to end, and LLVM knows that only some of them do.
_ALL_PADDING = {
    "1 by 1 filters with a padding of 1": Shape(16, 24, (2, 7), kernel=1, pad=1),
    "3 by 3 filters with a padding of 3": Shape(64, 64, (2, 5), kernel=3, pad=3, samples=1,
                                                rows=Rows((0,), (0,), 1), branches=1),
}  # fmt: skip


@pytest.mark.parametrize("name", _ALL_PADDING)
def test_boxes_that_meet_no_tap_are_not_copied(name):
    case = drawn(_ALL_PADDING[name], torch.bfloat16)
    dy = case.gradient()
    exact(run(case, dy, CAPABILITY, Tiles(), boxes=True), truth(case, dy))


@pytest.mark.parametrize("name", ["pool 1", "pool 3", "linear", "no row of the first branch"])
def test_outputs_whose_sums_are_cut_into_parts(name, monkeypatch):
    monkeypatch.setattr(box_forward, "_parts", lambda *_: 4)
    case, launches = drawn(BOXES[name], torch.bfloat16), []
    dy = case.gradient()
    got = run(case, dy, CAPABILITY, Tiles(), boxes=True, launches=launches)
    exact(got, truth(case, dy))
    (found,) = [launch for launch in launches if launch.kernel.__name__ == "box_forward_kernel"]
    assert found.arguments["PARTS"] == 4


def test_sums_in_parts(monkeypatch):
    """Parts that end within a row, and several boxes to a program, of which some rows are dead."""
    monkeypatch.setattr(box_gradient, "_PROGRAMS", 5)
    rows = Rows((0, 1, 2, 0, 2), (0, 0, 0, 1, 1), 3)
    shape = Shape(16, 40, (9, 10), rows=rows, samples=3, live=(True, False, True, True, True))
    for case in (drawn(shape, torch.bfloat16), drawn(shape._replace(live=None), torch.bfloat16)):
        dy, launches = case.gradient(), []
        got = run(case, dy, CAPABILITY, Tiles(), boxes=True, launches=launches)
        exact(got, truth(case, dy))
        found = {launch.kernel.__name__: launch for launch in launches}
        assert found["box_wgrad_kernel"].arguments["IN_PARTS"]
        assert found["box_gradient_kernel"].arguments["each"] > 1


@pytest.mark.parametrize("stride", [1, 2])
def test_the_first_convolution_is_unfolded(stride):
    """Its input lies channels first, is float32 and gets no gradient."""
    torch.manual_seed(0)
    size, conv = (9, 7), [(n + 2 - 3) // stride + 1 for n in (9, 7)]
    geometry = Geometry(stride, stride, 1, 1, *conv, 2, 0, *(n // 2 for n in conv), 1)
    x = integers(1, 3, 3, *size).permute(0, 1, 3, 4, 2)
    case = Case(x, [integers(16, 3, 3, 3) for _ in "ab"], [integers(16) for _ in "ab"], geometry,
                False, torch.bfloat16, Rows.full(1, 2))  # fmt: skip
    assert box_form(x.shape, (16, 3, 3, 3), geometry).unfolds
    dy = case.gradient()
    want = truth(case, dy)
    got = run(case, dy, CAPABILITY, Tiles(), boxes=True, to_input=False)
    assert bool(got.dx.isnan().all())
    exact(got._replace(dx=want.dx), want)
    with on_host(CAPABILITY):
        form = box_form(x.shape, (16, 3, 3, 3), geometry)
        columns = unfolded.unfolded(x.float(), (3, 3), geometry, form, torch.bfloat16)
    taken = torch.nn.functional.unfold(x[0].permute(0, 3, 1, 2), 3, padding=1, stride=stride)
    taken = taken.view(3, 3, 9, *conv).permute(0, 3, 4, 2, 1).flatten(3)
    assert torch.equal(columns[0, ..., :27], taken.bfloat16())
    assert not columns[0, ..., 27:].any()


def test_copies_of_several_levels():
    """One unfolded, whose filters end in zeros, and one of a single branch."""
    shapes, given = [(16, 3, 3, 3), (8, 16, 3, 3)], []
    for branches, shape in zip((2, 1), shapes, strict=True):
        weights = [integers(*shape).float() for _ in range(branches)]
        geometry = Geometry(1, 1, 1, 1, 9, 7, 1, 0, 9, 7, 1)
        given.append((weights, box_form((1, 2, 9, 7, shape[1]), shape, geometry)))
    copies = ManyCopies(given, torch.bfloat16)
    reached = [t for weights, _ in given for t in weights]
    reached += [t for made in copies.filters for t in (made.data, made.arrivals)]
    with on_host(CAPABILITY, seed=1, reached=reached):
        copies()
        apart = [weight_copies(weights, torch.bfloat16, form) for weights, form in given]
    for made, want in zip(copies.filters, apart, strict=True):
        assert torch.equal(made.data, want.data) and not made.arrivals.any()


def test_a_carried_gradient_is_added():
    case = drawn(BOXES["pool 1"]._replace(rows=Rows((1, 0, 1), (0, 1, 1), 2)), torch.bfloat16)
    leaves = [
        leaf.to(torch.float32 if i else torch.bfloat16).requires_grad_()
        for i, leaf in enumerate(case.leaves)
    ]
    here = case.with_leaves(leaves)
    dy, carried = case.gradient(), integers(*case.x.shape)
    with on_host(CAPABILITY):
        y, x = level(
            here.x, here.weights, here.biases, here.geometry, here.rows, dtype=case.dtype,
            carry=True, boxes=True,
        )  # fmt: skip
        (dx,) = torch.autograd.grad([y, x], here.x, [dy.bfloat16(), carried.bfloat16()])
    assert torch.equal(dx, (truth(case, dy).dx + carried).bfloat16())


def test_neighbouring_rows_are_taken_for_one(monkeypatch):
    """With a skip and a pool, so that every launch reads or writes what reaches over rows."""
    monkeypatch.setattr(box_level_run, "_MENDING", -torch.inf)
    rows = Rows((2, 3, 0, 1), (0, 0, 1, 1), 4, (0, 1, 4, 5), 6)
    assert len(rows.joined()) == 2
    case = drawn(Shape(8, 16, (2, 2), 2, rows=rows, relu_after=1, samples=3), torch.bfloat16)
    dy = case.gradient()
    exact(run(case, dy, CAPABILITY, Tiles(), boxes=True, seed=2), truth(case, dy))


@pytest.mark.parametrize(
    ("bad", "pool", "joined"),
    [(torch.inf, 1, False), (torch.nan, 2, True), (torch.inf, 2, True), (torch.inf, 3, True)],
)
def test_a_configuration_that_overflows_stays_alone(bad, pool, joined, monkeypatch):
    """Also in rows that are taken for one, where a sum that it spoils is made anew."""
    monkeypatch.setattr(box_level_run, "_MENDING", -torch.inf)
    parents = (0, 1, 0, 1) if joined else (0, 0, 1, 1)
    rows = Rows(parents, (0, 0, 1, 1) if joined else (0, 1, 0, 1), 2)
    assert (rows.joined() != rows) == joined
    good, left_out = ([r for r in range(4) if parents[r] == p] for p in range(2))
    case = drawn(Shape(8, 16, (6, 6), pool, rows=rows), torch.bfloat16)
    dy = case.gradient()
    dy[left_out] = 0  # what a configuration sends that has been left out
    want = truth(case, dy)
    exact(run(case, dy, CAPABILITY, Tiles(), boxes=True), want)
    case.x[1, 1, 1:3] = bad
    launches = []
    got = run(case, dy, CAPABILITY, Tiles(), boxes=True, launches=launches)
    assert ("level_wgrad_kernel" in [launch.kernel.__name__ for launch in launches]) == joined
    assert torch.equal(got.y[good], want.y[good].bfloat16())
    assert not bool(got.y[left_out, 1].isfinite().all())
    exact(got._replace(y=want.y.bfloat16()), want)


def test_what_is_read_of_a_box_without_a_gradient():
    """Where a box has no gradient its source lies behind the last row and the last parent."""
    rows = Rows((1, 0), (0, 0), 2)
    case = drawn(Shape(8, 16, (4, 4), rows=rows, branches=1, biased=False), torch.bfloat16)
    geometry, tables = case.geometry, case.tables
    dy = torch.zeros(2, 2, 4, 4, 16, dtype=torch.bfloat16)
    dy[1, 0, 3, 3, 5] = 1.0
    code = torch.zeros_like(dy, dtype=torch.uint8)
    with on_host(CAPABILITY):
        got = box_gradient.box_gradient(dy, code, 1, tables, geometry, Box(1, 2, 4), 16)
    empty, full = [2, 2], [1, 0]
    order = tables.by_branch[:, 0].tolist()
    boxes = [[empty] * 4 if row == 0 else [empty, full, empty, empty] for row in order]
    assert got.sources[:, 0].tolist() == [source for row in boxes for source in row]
    assert got.spoilt.tolist() == [0]


def test_64_bit_offsets_give_the_same_bits():
    case = drawn(BOXES["skip"], torch.bfloat16)
    dy = case.gradient()
    with wide_offsets():
        exact(run(case, dy, CAPABILITY, Tiles(), boxes=True), truth(case, dy))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_rounding(dtype):
    """No ReLU and no pool, whose gradients would jump. PyTorch's own error is the measure."""

    def rounded(*sizes: int) -> torch.Tensor:
        return torch.randn(sizes).to(dtype).double()

    case = drawn(BOXES["skip"]._replace(relu=0, relu_after=0, live=None), dtype, rounded)
    dy = rounded(*case.gradient().shape)
    got = results(run(case, dy, CAPABILITY, Tiles(), boxes=True))
    right, peer = results(truth(case, dy)), results(truth(case, dy, torch.float32))
    for key, value in got.items():
        error = float((value.double() - right[key]).norm())
        plain = float((peer[key].to(value.dtype).double() - right[key]).norm())
        assert error <= ERROR_FACTOR * plain, key


def test_images_that_lie_anywhere():
    """Samples outside of parents, and filters of any layout."""
    pick = random.Random(0)
    case = drawn(BOXES["pool 1"]._replace(rows=_SOME), torch.bfloat16)
    x = case.x.transpose(0, 1).contiguous().transpose(0, 1)
    case = case._replace(x=x, weights=[permuted(w, pick) for w in case.weights])
    dy = case.gradient()
    exact(run(case, dy, CAPABILITY, Tiles(), boxes=True), truth(case, dy))
