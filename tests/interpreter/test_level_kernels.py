"""The level kernels against PyTorch in float64: exactly where sums are exact, else by rounding."""

from __future__ import annotations

import pytest
import torch
from levels import Case, Truth, draw, integers, listed, truth, usual
from wide_offsets import wide_offsets

from lasem_fast.kernels import level_dgrad, level_forward, level_geometry, level_wgrad
from lasem_fast.kernels.level_geometry import CLOSED, SHUT, Geometry
from lasem_fast.kernels.level_rows import Rows, tables_of

HALVES = [torch.float16, torch.bfloat16]
MODULES = {"forward": level_forward, "dgrad": level_dgrad, "wgrad": level_wgrad}
TILES = [
    (name, tile)
    for name, module in MODULES.items()
    for tile in dict.fromkeys(
        (
            *module.TENSOR_CORE_TILES,
            *getattr(module, "TF32_TILES", ()),
            *getattr(module, "RAGGED_TILES", ()),
            *getattr(module, "RAGGED_TF32_TILES", ()),
            *module.FMA_TILES,
        )
    )
]


def run(case: Case, dy, x_dtype=None, weight_dtype=None, tiles=None) -> Truth:
    """Output and gradients by the kernels, with the largest tiles unless others are given.

    What must not be read is NaN: parents without a row, and ``dy`` of rows that are not live.
    """
    tiles = {name: module.TENSOR_CORE_TILES[0] for name, module in MODULES.items()} | (tiles or {})
    x = case.x.to(x_dtype or case.dtype, copy=True)
    x[[p for p in range(case.rows.width) if p not in case.rows.parents]] = torch.nan
    weights, biases = (
        [t.to(weight_dtype or torch.float32) for t in tensors]
        for tensors in (case.weights, case.biases)
    )
    skip = None if case.skip is None else case.skip.to(x.dtype)
    y, code, arrivals = level_forward.level_forward(
        x, weights, biases, skip, case.tables, case.geometry, case.dtype, tile=tiles["forward"]
    )
    dy = dy.to(case.dtype, copy=True).contiguous()
    if case.live is not None:
        dy[~case.live] = torch.nan
    dx, dskip = level_dgrad.level_dgrad(
        dy, code, weights, case.tables, x.shape, case.geometry, x.dtype,
        live=case.live, skip_dtype=None if skip is None else skip.dtype, tile=tiles["dgrad"],
    )  # fmt: skip
    dweights, dbiases = level_wgrad.level_wgrad(
        dy, code, x, weights, biases, case.tables, case.geometry, arrivals,
        live=case.live, tile=tiles["wgrad"],
    )  # fmt: skip
    assert not arrivals.any()
    return Truth(y, dx, tuple(dweights), tuple(dbiases), () if skip is None else (dskip,))


def assert_exact(got: Truth, want: Truth):
    """Equal to the float64 result, rounded once to the dtype at hand."""
    for name, ours, theirs in zip(Truth._fields, got, want, strict=True):
        pairs = zip(ours, theirs, strict=True) if isinstance(ours, tuple) else [(ours, theirs)]
        for a, b in pairs:
            assert torch.equal(a, b.to(a.dtype)), name


@pytest.mark.parametrize("seed", range(20))
def test_exact_on_integers(seed):
    case = draw(seed)
    dy = case.gradient()
    assert_exact(run(case, dy), truth(case, dy))


@pytest.mark.parametrize("parts", [2, 5, 11])
@pytest.mark.parametrize("seed", range(4))
def test_sums_that_programs_share(seed, parts, monkeypatch):
    """Some of them with nothing to add; the count is zero again, for another backward."""
    monkeypatch.setattr(level_wgrad, "splits_of", lambda programs, steps: parts)
    case = draw(seed)
    dy = case.gradient()
    assert_exact(run(case, dy, tiles={"wgrad": level_wgrad.TENSOR_CORE_TILES[-1]}), truth(case, dy))


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("seed", range(20, 26))
def test_exact_on_integers_in_half_precision(seed, dtype):
    """With float32 weights, as under autocast, and with weights in the same precision."""
    case = draw(seed, dtype)
    dy = case.gradient()
    want = truth(case, dy)
    assert_exact(run(case, dy), want)
    assert_exact(run(case, dy, x_dtype=torch.float32, weight_dtype=dtype), want)


@pytest.mark.parametrize(("name", "tile"), TILES)
def test_every_tile_is_exact(name, tile):
    case = listed()
    dy = case.gradient()
    got = run(case, dy, tiles={name: tile})
    assert_exact(got, truth(case, dy))


# A float32 result may be off from float64 by twice what PyTorch's is: the order of the sum differs.
ERROR_FACTOR = 2


@pytest.mark.parametrize("dtype", [torch.float32, *HALVES])
def test_rounding(dtype):
    """No ReLU and no pool, whose gradients would jump; operands are rounded before, once."""
    torch.manual_seed(0)

    def normal(*shape):
        return torch.randn(shape).to(dtype)

    geometry = Geometry(1, 1, 1, 1, 5, 4, 1, 0, 5, 4, 0)
    weights, biases = [normal(17, 19, 3, 3) for _ in "ab"], [normal(17) for _ in "ab"]
    rows = Rows((1, 0, 1), (0, 0, 1), 2, (0, 1, 1), 2)
    case = Case(normal(2, 2, 5, 4, 19), weights, biases, geometry, False, dtype, rows,
                normal(2, 2, 5, 4, 17))  # fmt: skip
    dy = normal(*case.gradient().shape)
    got = run(case, dy, weight_dtype=dtype)
    exact, peer = truth(case, dy), truth(case, dy, torch.float32)
    for name, ours, want, theirs in zip(Truth._fields, got, exact, peer, strict=True):
        ours, want, theirs = (
            torch.cat([p.flatten() for p in t]) if isinstance(t, tuple) else t
            for t in (ours, want, theirs)
        )
        error = float((ours.double() - want).norm())
        plain = float((theirs.to(ours.dtype).double() - want).norm())
        assert error <= ERROR_FACTOR * plain, name


def test_the_code_names_the_first_of_equal_positions():
    x = torch.ones(1, 1, 2, 2, 1)
    geometry = Geometry(1, 1, 0, 0, 2, 2, 2, 0, 1, 1, 1)
    for value, code in ((1.0, 0), (0.0, CLOSED), (-1.0, CLOSED)):
        weights = [torch.full((1, 1, 1, 1), value)]
        rows = tables_of(Rows.full(1, 1), 1, x.device)
        y, got, _ = level_forward.level_forward(x, weights, [], None, rows, geometry, torch.float32)
        assert y.item() == max(value, 0) and got.item() == code


def test_the_code_of_a_level_with_a_skip():
    """Convolution -1, 1, 2, -3 and skip 5, 2, 3, 2: behind a ReLU the first 5 is the skip's own."""
    x = torch.tensor([-1.0, 1, 2, -3]).view(1, 1, 2, 2, 1)
    skip = torch.tensor([5.0, 2, 3, 2]).view(1, 1, 2, 2, 1)
    rows = tables_of(Rows((0,), (0,), 1, (0,), 1), 1, x.device)
    weights = [torch.ones(1, 1, 1, 1)]
    for relu, relu_after, shift, value, code in [
        (1, 0, 0, 5, SHUT), (0, 0, 0, 5, 2), (1, 1, 0, 5, SHUT), (0, 1, 0, 5, 2),
        (1, 0, -9, -4, SHUT), (1, 1, -9, 0, CLOSED), (0, 1, -9, 0, CLOSED),
    ]:  # fmt: skip
        geometry = Geometry(1, 1, 0, 0, 2, 2, 2, 0, 1, 1, relu, relu_after)
        y, got, _ = level_forward.level_forward(
            x, weights, [], skip + shift, rows, geometry, torch.float32
        )
        assert (y.item(), got.item()) == (value, code)


def test_a_carried_gradient_is_added():
    case = usual()
    x, dy = case.x.float(), case.gradient().float()
    carried = integers(*x.shape).float()
    _, code, _ = level_forward.level_forward(
        x, case.weights, case.biases, None, case.tables, case.geometry, torch.float32
    )
    dx, _ = level_dgrad.level_dgrad(
        dy, code, case.weights, case.tables, x.shape, case.geometry, torch.float32, carried=carried
    )
    assert torch.equal(dx.double(), truth(case, dy).dx + carried)


def test_dead_rows_are_passed_over_many_at_a_time():
    """More rows of one pixel than a program passes over at once; most of them are not live."""
    torch.manual_seed(0)
    count = 300
    rows = Rows(tuple(range(count)), tuple(int(r % 7 == 0) for r in range(count)), count)
    geometry = Geometry(1, 1, 0, 0, 1, 1, 1, 0, 1, 1, 1)
    weights = [integers(3, 5, 1, 1) for _ in "ab"]
    live = torch.zeros(count, dtype=torch.bool)
    live[[0, 1, 130, 299]] = True
    case = Case(integers(count, 1, 1, 1, 5), weights, [integers(3) for _ in "ab"], geometry, False,
                torch.float32, rows, live=live)  # fmt: skip
    dy = case.gradient()
    assert_exact(run(case, dy), truth(case, dy))
    nothing = case._replace(live=torch.zeros_like(live))
    assert_exact(run(nothing, dy), truth(nothing, dy))


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
@pytest.mark.parametrize("pool", [1, 2])
def test_a_bad_sample_stays_alone(bad, pool):
    size = 4 // pool
    geometry = Geometry(1, 1, 1, 1, 4, 4, pool, 0, size, size, 1)
    case = Case(integers(2, 2, 4, 4, 3), [integers(5, 3, 3, 3) for _ in "ab"],
                [integers(5) for _ in "ab"], geometry, False, torch.float32,
                Rows.full(2, 2))  # fmt: skip
    dy = integers(4, 2, size, size, 5)
    dy[2:, 1] = 0  # what a configuration sends that has been left out
    clean = run(case, dy)
    case.x[1, 1, 1:3] = bad
    got = run(case, dy)
    others = torch.ones(4, 2, dtype=torch.bool)
    others[2:, 1] = False
    assert torch.equal(got.y[others], clean.y[others])
    assert not got.y[2:, 1].isfinite().all()
    nan = truth(case, dy).y.isnan()
    assert got.y[nan].isnan().all()
    assert torch.equal(got.dx, clean.dx)
    for ours, theirs in zip(
        got.dweights + got.dbiases, clean.dweights + clean.dbiases, strict=True
    ):
        assert torch.equal(ours, theirs)


def test_64_bit_offsets_give_the_same_bits():
    case = listed().with_values(torch.randn)
    dy = torch.randn(case.gradient().shape)
    narrow = run(case, dy)
    with wide_offsets():
        assert_exact(run(case, dy), narrow)


def test_when_offsets_need_64_bits():
    last = level_geometry.reach((2**20, 2**10), (2**10, 1))
    assert last == 2**30 - 1
    assert not level_geometry.passes_int32(last, last, 2**30)
    assert level_geometry.passes_int32(level_geometry.reach((2**21, 2**10), (2**10, 1)))
    assert level_geometry.passes_int32(last, 2**31)
    assert level_geometry.reach((2**12, 2**20, 2**10), (0, 2**10, 1)) == last


def test_the_same_bits_every_time():
    case = listed().with_values(torch.randn)
    dy = torch.randn(case.gradient().shape)
    assert_exact(run(case, dy), run(case, dy))


@pytest.mark.parametrize("empty", ["samples", "gradient", "rows"])
def test_nothing_to_do(empty):
    case = usual()
    case = case._replace(x=case.x[:, :0] if empty == "samples" else case.x)
    if empty == "rows":
        case = case._replace(rows=Rows((), (), 2))
    dy = case.gradient() * 0
    got = run(case, dy)
    assert got.y.numel() == dy.numel()
    assert not any(t.any() for t in (got.dx, *got.dweights, *got.dbiases))


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        (Rows((0, 2), (0, 1), 2), "rows: expected parents from 0 to 1, got 2"),
        (Rows((0, 1), (0, 2), 2), "rows: expected branches from 0 to 1, got 2"),
        (Rows((0, 0), (1, 1), 2), "rows: expected no pair of parent and branch twice"),
        (Rows((0, 1), (0,), 2), "rows: expected a branch for each of 2 parents, got 1"),
        (Rows((0, 1), (0, 0), 2, (0,), 1), "rows: expected a skip row for each of 2 rows, got 1"),
        (Rows((0, 1), (0, 0), 2, (0, 3), 3), "rows: expected skips from 0 to 2, got 3"),
    ],
)
def test_lists_that_cannot_be(rows, message):
    with pytest.raises(ValueError, match=message):
        tables_of(rows, 2, torch.device("cpu"))
