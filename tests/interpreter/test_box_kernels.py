"""The kernels that read boxes against PyTorch in float64, and their way through the backend."""

from __future__ import annotations

import copy
import random
from dataclasses import replace
from itertools import product

import pytest
import torch
from launches import launches
from levels import Case, draw_boxes, draw_rows, integers, permuted, truth
from oracle import brute_force
from test_level_kernels import assert_exact
from torch import nn
from wide_offsets import wide_offsets

import lasem_fast as lf
from lasem_fast.backends import box_level_run, triton_linear_head
from lasem_fast.backends.operations import Layer, Skip
from lasem_fast.backends.triton_level import BoxLevel, GatherLevel, _can_be_boxes
from lasem_fast.backends.triton_level_op import Tiles, level
from lasem_fast.kernels import (
    box_dgrad,
    box_forward,
    box_wgrad,
    boxes,
    level_dgrad,
    level_forward,
    level_wgrad,
    weight_copies,
)
from lasem_fast.kernels.box_form import box_form
from lasem_fast.kernels.boxes import Box, Convolution, Taps, Work, box_for
from lasem_fast.kernels.kept import forget
from lasem_fast.kernels.level_geometry import Geometry
from lasem_fast.kernels.level_rows import Rows
from lasem_fast.levels.plan import Level
from lasem_fast.levels.relu_and_pool import Pool
from lasem_fast.levels.row_liveness import Liveness
from lasem_fast.search import dispatch

HALVES = [torch.float16, torch.bfloat16]
MODULES = {"forward": box_forward, "dgrad": box_dgrad, "wgrad": box_wgrad}
GATHERING = {"forward": level_forward, "dgrad": level_dgrad, "wgrad": level_wgrad}
# The largest and the smallest; of wgrad also one of three taps and one whose sides change places.
# tests/ptx/test_tiles.py runs all of them as they are compiled.
TILES = [
    ("forward", box_forward.TILES[0]), ("forward", box_forward.TILES[-1]),
    ("dgrad", box_dgrad.TILES[0]), ("dgrad", box_dgrad.TILES[-1]),
    *(("wgrad", box_wgrad.TILES[i]) for i in (0, 3, 5, -1)),
]  # fmt: skip


def run(case: Case, dy, in_boxes=True, to_input=True, **tiles):
    """Output and gradients through autograd, with the largest tiles unless others are given.

    What must not be read is NaN. Without a gradient of the input the true one is in its place.
    """
    if in_boxes:
        tiles = {name: module.TILES[0] for name, module in MODULES.items()} | tiles
    else:
        tiles = {name: module.TENSOR_CORE_TILES[0] for name, module in GATHERING.items()}
    leaves = [leaf.to(case.dtype, copy=True) for leaf in case.leaves]
    for i in range(1, 1 + len(case.weights) + len(case.biases)):
        leaves[i] = leaves[i].float()
    leaves[0][[p for p in range(case.rows.width) if p not in case.rows.parents]] = torch.nan
    leaves = [leaf.detach().requires_grad_() for leaf in leaves]
    leaves[0].requires_grad_(to_input)
    case, liveness = case.with_leaves(leaves), None
    dy = dy.to(case.dtype, copy=True)
    if case.live is not None:
        dy[~case.live] = torch.nan
        liveness = Liveness(case.live)
    y = level(
        case.x, case.weights, case.biases, case.geometry, case.rows, dtype=case.dtype,
        skip=case.skip, liveness=liveness, tiles=Tiles(**tiles), boxes=in_boxes,
    )  # fmt: skip
    want = truth(case, dy)
    dx, *rest = torch.autograd.grad(y, leaves, dy) if to_input else (
        want.dx, *torch.autograd.grad(y, leaves[1:], dy)
    )  # fmt: skip
    ends = len(case.weights), len(case.weights) + len(case.biases)
    return want._replace(
        y=y.detach(), dx=dx, dweights=tuple(rest[: ends[0]]),
        dbiases=tuple(rest[ends[0] : ends[1]]), dskip=tuple(rest[ends[1] :]),
    )  # fmt: skip


def listed(dtype=torch.float16, out=24) -> Case:
    """Rows left out, some not live, a skip that rows share, ragged sizes, a padded pool of 2."""
    torch.manual_seed(0)
    geometry = Geometry(1, 1, 1, 1, 5, 6, 2, 1, 3, 4, 1, 1)
    rows = Rows((2, 0, 2, 3), (1, 0, 0, 1), 4, (1, 0, 1, 2), 4)
    return Case(
        integers(4, 2, 5, 6, 24), [integers(out, 24, 3, 3) for _ in "ab"],
        [integers(out) for _ in "ab"], geometry, False, dtype, rows, integers(4, 2, 5, 6, out),
        torch.tensor([True, False, True, True]),
    )  # fmt: skip


@pytest.fixture
def cut_sums(monkeypatch):
    """A function that lets a weight's gradient have many parts, which small problems have not."""

    def cut(parts):
        monkeypatch.setattr(box_wgrad, "splits_of", lambda programs, steps: parts)
        forget()

    return cut


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("seed", range(4))
def test_exact_on_integers(seed, dtype, cut_sums):
    cut_sums(1 if seed < 2 else 10)
    case = draw_boxes(seed, dtype)
    dy = case.gradient()
    assert_exact(run(case, dy), truth(case, dy))


@pytest.mark.parametrize(("name", "tile"), TILES)
def test_a_tile_is_exact(name, tile, cut_sums):
    # the widest tile looks at two blocks of columns, the second of which is ragged
    case = listed(out=72 if tile.columns > 64 else 24)
    dy = case.gradient()
    want = truth(case, dy)
    for parts in (1, 10) if name == "wgrad" else (1,):
        cut_sums(parts)
        assert_exact(run(case, dy, **{name: tile}), want)


@pytest.mark.parametrize("seed", range(2))
def test_a_linear_layer_on_images_is_one_on_pixels(seed):
    """Its filters lie channels first, and images need not lie one behind the other."""
    pick = random.Random(seed)
    torch.manual_seed(seed)
    rows, out = draw_rows(pick, 1 + seed % 2), pick.choice([8, 24])
    x = integers(rows.width, 3, 2, 3, 8)
    geometry = Geometry(1, 1, 0, 0, 1, 1, 1, 0, 1, 1, pick.randint(0, 1))
    weights = [integers(out, 8, 2, 3) for _ in range(1 + seed % 2)]
    biases = [integers(out) for _ in weights]
    case = Case(x, weights, biases, geometry, False, torch.float16, rows)
    dy = case.gradient()
    turned = x.transpose(0, 1).contiguous().transpose(0, 1) if seed else x
    with launches() as counted:
        assert_exact(run(case._replace(x=turned), dy), truth(case, dy))
    assert counted.kernels["box_forward_kernel"] == 1


def test_a_linear_layer_of_a_small_batch_gathers_in_its_backward():
    """From the copies of the weights; with boxes elsewhere, and where there is more to sum."""
    torch.manual_seed(0)
    linear = nn.Linear(2 * 3 * 8, 24)
    layer = Layer(linear, [linear.weight] * 2, [linear.bias] * 2, True, True, False, Pool(1))
    rows, kernels = Level((0, 0, 1), (0, 1, 0), 2), []
    for samples in (4, 160):
        x = torch.randn(2, samples, 2, 3, 8, dtype=torch.float16, requires_grad=True)
        given = [x, linear.weight, linear.bias]
        results = []
        with torch.autocast("cpu", dtype=torch.float16):
            for operation in (BoxLevel(), GatherLevel()):
                y = operation(layer, x, rows, None, None)
                with launches() as counted:
                    results.append([y, *torch.autograd.grad(y.float().square().sum(), given)])
                kernels.append(counted.kernels)
        torch.testing.assert_close(*results)
    assert [k["level_wgrad_kernel"] for k in kernels] == [1, 1, 0, 1]
    assert [k["box_wgrad_kernel"] for k in kernels] == [0, 0, 1, 0]
    assert kernels[0]["level_dgrad_kernel"] == 1 and not kernels[0]["box_gradient_kernel"]


@pytest.mark.parametrize(
    ("samples", "kernel", "unfolds"), [(10, 3, False), (20, 3, True), (10, 5, True)]
)
def test_a_first_convolution_with_little_to_do_is_not_unfolded(samples, kernel, unfolds):
    pad, weight = kernel // 2, torch.zeros(8, 3, kernel, kernel)
    geometry = Geometry(1, 1, pad, pad, 32, 32, 1, 0, 32, 32, 1)
    x = torch.zeros(1, samples, 32, 32, 3)
    assert _can_be_boxes(x, [weight], geometry, torch.bfloat16, None) == unfolds


@pytest.mark.parametrize(
    ("kernel", "pool", "relu", "parts"), [(1, 1, 1, 4), (3, 1, 0, 4), (3, 3, 1, 9)]
)
def test_a_sum_that_is_cut_into_parts(kernel, pool, relu, parts, monkeypatch):
    """Of some taps and channels each; some of the parts have nothing to add."""
    monkeypatch.setattr(box_forward, "_parts", lambda *_: parts)
    torch.manual_seed(0)
    size = 6 // kernel * kernel, 3
    out = [n // pool for n in size]
    geometry = Geometry(1, 1, kernel // 2, kernel // 2, *size, pool, 0, *out, relu)
    case = Case(
        integers(3, 3, *size, 40), [integers(24, 40, kernel, kernel) for _ in "ab"],
        [integers(24) for _ in "ab"] if relu else [], geometry, False, torch.float16,
        Rows((2, 0, 2), (1, 0, 0), 3),
    )  # fmt: skip
    dy = case.gradient()
    with launches() as counted:
        got = run(case, dy)
    assert_exact(got, truth(case, dy))
    assert counted.kernels["box_forward_kernel"] == 1
    monkeypatch.undo()
    forget()
    assert_exact(run(case, dy), got)


def test_in_how_many_parts_a_sum_is_cut():
    """The linear layer of a small mini-batch is, and no launch that fills the device."""
    few, many = Work(programs=3, steps=32, bytes=2**15), Work(programs=264, steps=32, bytes=2**15)
    assert box_forward.parts_of(few, 160 * 64) > 4
    assert box_forward.parts_of(many, 160 * 64) == 1
    assert box_forward.parts_of(few._replace(steps=3), 160 * 64) == 1
    # more sums than can be shared
    assert box_forward.parts_of(many._replace(programs=265, steps=4096), 160 * 64) == 1


@pytest.mark.parametrize(("skip", "pool"), [(False, 1), (True, 2)])
def test_neighbouring_rows_are_taken_for_one(skip, pool, monkeypatch):
    """With images that lie elsewhere they are not."""
    monkeypatch.setattr(box_level_run, "_MENDING", -torch.inf)
    torch.manual_seed(0)
    rows = Rows((2, 3, 0, 1), (0, 0, 1, 1), 4, (0, 1, 4, 5) if skip else (), 6 if skip else 0)
    geometry = Geometry(1, 1, 1, 1, 2, 2, pool, 0, 2 // pool, 2 // pool, 1, int(skip))
    case = Case(
        integers(4, 3, 2, 2, 8), [integers(8, 8, 3, 3) for _ in "ab"], [integers(8) for _ in "ab"],
        geometry, False, torch.float16, rows, integers(6, 3, 2, 2, 8) if skip else None,
    )  # fmt: skip
    dy = case.gradient()
    with launches() as counted:
        assert_exact(run(case, dy), truth(case, dy))
    assert counted.kernels["level_wgrad_kernel"] == 1  # asks whether a sum is NaN
    if not skip:
        turned = case.x.transpose(0, 1).contiguous().transpose(0, 1)
        with launches() as counted:
            assert_exact(run(case._replace(x=turned), dy), truth(case, dy))
        assert counted.kernels["level_wgrad_kernel"] == 0


def test_joined_rows():
    six = (0, 1, 2, 3, 4, 5)
    assert Rows(six, (0,) * 6, 6).joined() == Rows((0,), (0,), 1)
    assert Rows(six * 2, (0,) * 6 + (1,) * 6, 6).joined() == Rows((0, 0), (0, 1), 1)
    assert Rows(six, (0, 0, 0, 1, 1, 1), 6).joined() == Rows((0, 1), (0, 1), 2)
    assert Rows(six, (0,) * 6, 6, (2, 3, 4, 5, 0, 1), 6).joined() == Rows(
        (0, 1, 2), (0,) * 3, 3, (1, 2, 0), 3
    )
    for alone in (
        Rows.full(4, 2), Rows((0, 1, 3, 2), (0,) * 4, 4), Rows((1, 2), (0, 0), 3), Rows((), (), 2),
        Rows((0, 1), (0, 0), 2, (0, 0), 1), Rows((0, 1), (0, 0), 2, (1, 2), 4),
    ):  # fmt: skip
        assert alone.joined() == alone


@pytest.mark.parametrize("seed", range(4))
def test_other_convolutions_are_unfolded(seed):
    """Strides, and channels that no copy could start at; the input needs no gradient."""
    pick = random.Random(seed)
    torch.manual_seed(seed)
    kernel, stride = pick.choice([(3, 3), (5, 2), (1, 1)]), pick.choice([(1, 1), (2, 1), (3, 2)])
    channels, pad = pick.choice([1, 3, 8, 13]), tuple(pick.randint(0, k - 1) for k in kernel)
    size = [k + pick.randint(3, 6) for k in kernel]
    conv = [(n + 2 * p - k) // s + 1 for n, p, k, s in zip(size, pad, kernel, stride, strict=True)]
    pool = min(pick.choice([1, 2, 3]), *conv)
    pooled = [n // pool for n in conv]
    geometry = Geometry(*stride, *pad, *conv, pool, 0, *pooled, 1)
    rows = Rows.full(pick.randint(1, 2), 2)
    case = Case(
        permuted(integers(rows.width, 2, *size, channels), pick),
        [permuted(integers(16, channels, *kernel), pick) for _ in "ab"],
        [integers(16) for _ in "ab"], geometry, False, torch.float16, rows,
    )  # fmt: skip
    dy = case.gradient()
    with launches() as counted:
        assert_exact(run(case, dy, to_input=False), truth(case, dy))
    unfolds = stride != (1, 1) or channels % 8 > 0
    assert counted.kernels["unfolded_kernel"] == unfolds


@pytest.mark.parametrize("size", [(2, 2), (3, 1)])
def test_taps_that_meet_only_padding_are_left_out(size):
    """With a pixel of many images in a box."""
    torch.manual_seed(0)
    rows = Rows((0, 1), (1, 0), 2)
    geometry = Geometry(1, 1, 1, 1, *size, 1, 0, *size, 1)
    weights, biases = [integers(16, 8, 3, 3) for _ in "ab"], [integers(16) for _ in "ab"]
    case = Case(
        integers(2, 126, *size, 8), weights, biases, geometry, False, torch.float16, rows,
        live=torch.tensor([True, True]),
    )  # fmt: skip
    taps = Convolution(Taps(3, -1, size[0]), Taps(3, -1, size[1]))
    assert box_for(128, 126, *size, convolution=taps) == Box(128, 1, 1)
    dy = case.gradient()
    case = case if size == (2, 2) else case._replace(live=None)
    assert_exact(run(case, dy), truth(case, dy))


def test_which_taps_meet_an_image():
    for kernel, shift, size, side in product((1, 2, 3, 5), (-3, -1, 0, 1), (1, 2, 5), (1, 2, 4)):
        taps = Taps(kernel, shift, size)
        for begin in range(-2, 6):
            pixels = range(begin, begin + side)
            met = [t for t in range(kernel) if any(0 <= i + shift + t < size for i in pixels)]
            assert taps.met(begin, side) == len(met)


@pytest.mark.parametrize("pool", [1, 2, 3])
def test_codes_are_those_of_the_other_kernels(pool):
    torch.manual_seed(pool)
    size = 6 // pool
    geometry = Geometry(1, 1, 1, 1, 6, 6, pool, 0, size, size, 1)
    case = Case(integers(2, 2, 6, 6, 8), [integers(16, 8, 3, 3) for _ in "ab"], [], geometry, False,
                torch.float16, Rows.full(2, 2))  # fmt: skip
    x, weights = case.x.half(), [w.float() for w in case.weights]
    form = box_form(x.shape, weights[0].shape, geometry)
    filters = weight_copies.weight_copies(weights, x.dtype, form)
    got = box_forward.box_forward(x, filters, [], None, case.tables, geometry)
    want = level_forward.level_forward(x, weights, [], None, case.tables, geometry, x.dtype)[:2]
    assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))


@pytest.mark.parametrize(
    ("bad", "pool", "parents"),
    [
        (torch.nan, 1, (0, 0, 1, 1)), (torch.inf, 2, (0, 0, 1, 1)), (torch.nan, 3, (0, 0, 1, 1)),
        (torch.inf, 1, (0, 1, 0, 1)), (torch.nan, 2, (0, 1, 0, 1)),
    ],
)  # fmt: skip
def test_a_configuration_that_overflows_stays_alone(bad, pool, parents, cut_sums, monkeypatch):
    """Also in rows that are taken for one, where a sum that it spoils is made anew."""
    monkeypatch.setattr(box_level_run, "_MENDING", -torch.inf)
    cut_sums(1 + pool % 2)
    size = 6 // pool
    rows = Rows(parents, (0, 1, 0, 1) if parents[1] == 0 else (0, 0, 1, 1), 2)
    assert (rows.joined() == rows) == (parents[1] == 0)
    good, left_out = ([r for r in range(4) if parents[r] == p] for p in range(2))
    geometry = Geometry(1, 1, 1, 1, 6, 6, pool, 0, size, size, 1)
    case = Case(integers(2, 2, 6, 6, 8), [integers(8, 8, 3, 3) for _ in "ab"],
                [integers(8) for _ in "ab"], geometry, False, torch.float16, rows)  # fmt: skip
    dy = integers(4, 2, size, size, 8)
    dy[left_out] = 0  # what a configuration sends that has been left out
    clean = run(case, dy)
    case.x[1, 1, 1:3] = bad
    got = run(case, dy)
    assert torch.equal(got.y[good], clean.y[good])
    assert not got.y[left_out, 1].isfinite().all()
    assert torch.equal(got.dx, clean.dx)
    for ours, theirs in zip(
        got.dweights + got.dbiases, clean.dweights + clean.dbiases, strict=True
    ):
        assert torch.equal(ours, theirs)


def test_a_carried_gradient_is_added():
    case = draw_boxes(1, torch.float16)
    case = case._replace(live=None, skip=None, rows=Rows.full(2, len(case.weights)),
                         geometry=case.geometry._replace(relu_after=0),
                         x=integers(2, *case.x.shape[1:]))  # fmt: skip
    leaves = [leaf.half().requires_grad_() for leaf in case.leaves]
    here = case.with_leaves(leaves)
    y, x = level(
        here.x, here.weights, here.biases, here.geometry, here.rows, dtype=torch.float16,
        carry=True, boxes=True,
    )  # fmt: skip
    dy, carried = case.gradient(), integers(*case.x.shape)
    (dx,) = torch.autograd.grad([y, x], here.x, [dy.half(), carried.half()])
    assert torch.equal(dx, (truth(case, dy).dx + carried).half())


def test_64_bit_offsets_give_the_same_bits():
    case = listed().with_values(torch.randn)
    dy = torch.randn(case.gradient().shape)
    narrow = run(case, dy)
    with wide_offsets():
        assert_exact(run(case, dy), narrow)


# How much further from float64 than the other kernels a level may be: sums in another order.
ERROR_FACTOR = 2


@pytest.mark.parametrize("dtype", HALVES)
def test_rounding(dtype):
    """No ReLU and no pool, whose gradients would jump."""
    case = listed(dtype).with_values(lambda shape: torch.randn(shape).to(dtype))
    geometry = Geometry(1, 1, 1, 1, 5, 6, 1, 0, 5, 6, 0)
    case = case._replace(geometry=geometry, live=None)
    dy = torch.randn(case.gradient().shape).to(dtype)
    want = truth(case, dy)
    ours, theirs = run(case, dy), run(case, dy, in_boxes=False)
    for name, got, peer, right in zip(want._fields, ours, theirs, want, strict=True):
        got, peer, right = (
            torch.cat([p.double().flatten() for p in t]) if isinstance(t, tuple) else t.double()
            for t in (got, peer, right)
        )
        assert (got - right).norm() <= ERROR_FACTOR * (peer - right).norm(), name


@pytest.mark.parametrize("parts", [1, 2])
def test_launches(parts, cut_sums):
    """Copies and forward; dz, dgrad and wgrad, of several parts too, whatever the list."""
    cut_sums(parts)
    case = listed()
    with launches() as counted:
        run(case, case.gradient())
    kernels = {k: n for k, n in counted.kernels.items() if not k.startswith("aten")}
    once = ["weight_copies", "box_forward", "box_gradient", "box_dgrad", "box_wgrad"]
    assert kernels == {f"{name}_kernel": 1 for name in once}


def test_branches_of_two_dtypes():
    """As under autocast, where one of them was computed."""
    torch.manual_seed(0)
    conv = nn.Conv2d(8, 8, 3, padding=1)
    layer = Layer(conv, [conv.weight, conv.weight.bfloat16()], [conv.bias] * 2, False, True,
                  False, Pool(1))  # fmt: skip
    x = torch.randn(1, 1, 4, 4, 8, dtype=torch.bfloat16)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        for operation in (BoxLevel(), GatherLevel()):
            y = operation(layer, x, Level((0, 0), (0, 1), 1), None, None)
            assert torch.equal(*y)


def test_boxes_cover_the_images_with_the_fewest():
    assert box_for(128, 10, 32, 32) == Box(1, 4, 32)
    assert box_for(128, 10, 4, 4) == Box(8, 4, 4)
    assert box_for(64, 3, 15, 15) == Box(1, 4, 16)
    assert box_for(64, 100, 1, 1, least=2) == Box(16, 2, 2)
    for pixels, samples, height, width in product((16, 128), (1, 3, 10), (1, 5, 11), (2, 7)):
        box = box_for(pixels, samples, height, width)
        assert box.pixels == pixels
        counts = box.counts(samples, height, width)
        covered = [side * count for side, count in zip(box, counts, strict=True)]
        assert all(c >= n for c, n in zip(covered, (samples, height, width), strict=True))


@pytest.mark.parametrize(
    ("change", "taken"),
    [
        ({}, True), ({"pool": 3}, True), ({"pool": 3, "skip": True}, False), ({"skip": True}, True),
        ({"stride": 2, "parents": 1}, True), ({"channels": 12, "parents": 1}, True),
        ({"stride": 2}, False), ({"channels": 12}, False), ({"dtype": torch.float32}, False),
        ({"stride": 2, "parents": 1, "gradient": True}, False),
        ({"gradient": True}, True), ({"stride": 2, "parents": 1, "skip": True}, False),
    ],
)  # fmt: skip
def test_what_it_takes_and_what_is_left_to_the_other_kernels(change, taken):
    """Also the sum with a skip before a pool of 3, whose ReLU comes before the sum."""
    pool, channels = change.get("pool", 1), change.get("channels", 8)
    dtype, stride = change.get("dtype", torch.bfloat16), change.get("stride", 1)
    torch.manual_seed(0)
    conv = nn.Conv2d(channels, 8, 3, stride, padding=1, dtype=dtype)
    layer = Layer(conv, [conv.weight] * 2, [conv.bias] * 2, False, True, False, Pool(pool))
    parents, out = change.get("parents", 2), 6 // stride
    x = torch.randn(parents, 1, 6, 6, channels).to(dtype).requires_grad_("gradient" in change)
    rows = Level((0, 0, 1, 1)[: 2 * parents], (0, 1, 0, 1)[: 2 * parents], parents)
    skips = torch.randn(len(rows), 1, out, out, 8).to(dtype)
    skip = Skip(skips, None) if change.get("skip") else None
    assert BoxLevel().why_not(layer, x) == ""
    got = BoxLevel()(layer, x, rows, skip, None)
    assert (got is not None) == taken
    if taken:
        other = GatherLevel()(layer, x, rows, skip, None)
        torch.testing.assert_close(got, other)
    # memory that no copy could be made of
    if stride > 1 or channels % 8:
        return
    assert BoxLevel()(layer, x[:1].expand(2, -1, -1, -1, -1), rows, skip, None) is None


def test_opcheck():
    case = draw_boxes(3, torch.float16)
    x, weights = case.x.half(), [w.float() for w in case.weights]
    biases, skip = [b.float() for b in case.biases], None
    rows = replace(case.rows, skips=(), skip_width=0)
    case = case._replace(rows=rows)
    geometry = list(case.geometry._replace(relu_after=0))
    *tables, counts = case.tables
    lists, ops = (tables, list(counts)), torch.ops.lasem_fast
    forward = (x, weights, biases, skip, *lists, geometry, x.dtype, [])
    torch.library.opcheck(ops.level_boxes.default, forward)
    y, code, *read = ops.level_boxes(*forward)
    backward = (y, code, *read, x, weights, biases, *lists, *lists, None, None, geometry, True,
                None, True, [], [])  # fmt: skip
    torch.library.opcheck(ops.level_boxes_backward.default, backward)


class Either:
    """The first of some operations that takes a level."""

    def __init__(self, operations):
        self.why_not, self.operations = operations[-1].why_not, operations

    def __call__(self, *call):
        results = (operation(*call) for operation in self.operations)
        return next(result for result in results if result is not None)


@pytest.fixture
def in_boxes(monkeypatch):
    """The `triton` backend reads boxes wherever it can."""
    levels = (BoxLevel(), GatherLevel())
    monkeypatch.setattr(dispatch, "_WITHOUT_DEVICE", levels)
    monkeypatch.setattr(triton_linear_head, "_OPERATION", Either(levels))
    # few programs, which take long here
    monkeypatch.setattr(boxes, "cheapest", lambda tiles, *_: tiles[0])


# Its image's size, and at least how many levels are in boxes, forward and backward.
NETS = {
    "cifar-4": (lambda: lf.nets.cifar100(layers=4, width=1 / 4), 8, 4, 3),
    "stl-9": (lambda: lf.nets.stl10(layers=9, width=1 / 4), 9, 9, 8),
    "residual-17": (lambda: lf.nets.residual17(4, width=1 / 8), 16, 11, 11),
}


@pytest.mark.parametrize("name", NETS)
def test_a_whole_step_against_brute_force(name, in_boxes):
    """Under autocast, beside PyTorch's own backend; the first layer has 3 channels."""
    make, size, forward, backward = NETS[name]
    torch.manual_seed(0)
    architecture = make()
    net = architecture.net()
    every = architecture.space().configs
    space = lf.ConfigSpace.from_configs([every[0], every[-1], every[5]])
    images = torch.randn(1, 3, size, size)
    with torch.no_grad():
        h = images
        for stage in net.shared:
            h = stage(h)
    net.add_task("a", nn.Sequential(nn.Flatten(), nn.Linear(h.flatten(1).shape[1], 8),
                      nn.ReLU(), nn.Linear(8, 3)))  # fmt: skip
    net.to(memory_format=torch.channels_last)
    x, y = images, torch.tensor([2])
    exact = copy.deepcopy(net).double()
    right = brute_force(exact, space.bits, x.double(), y, "a")
    errors = {}
    for backend in ("torch", "triton"):
        net.zero_grad()
        with launches() as counted, torch.autocast("cpu", dtype=torch.bfloat16):
            step = lf.LASEM(net, space, backend=backend)(x, y, "a")
        with launches() as behind:
            step.loss.backward()
        pairs = [(step.posterior, right.posterior), (step.log_likelihood, right.log_likelihood)]
        pairs += [(p.grad, right.grads[name]) for name, p in net.named_parameters()]
        got, want = (
            torch.cat([t.detach().double().flatten() for t in ts])
            for ts in zip(*pairs, strict=True)
        )
        errors[backend] = float((got - want).norm() / want.norm())
    assert counted.kernels["box_forward_kernel"] >= forward
    assert behind.kernels["box_wgrad_kernel"] >= backward
    assert errors["triton"] <= ERROR_FACTOR * errors["torch"], errors
