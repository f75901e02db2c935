"""The CPU level on lists of rows: any (parent, branch) pairs, rows left out of the backward."""

from __future__ import annotations

import random

import pytest
import torch
import torch.nn.functional as F

from lasem_fast.backends import cpu_ops as ops

pytestmark = pytest.mark.skipif(not ops.supported(), reason=ops.why_unsupported())

SEEDS = range(40)


def draw(seed, dtype):
    """Tensors, a list of rows, and the keywords of a drawn level."""
    pick = random.Random(seed)
    torch.manual_seed(seed)
    parents, samples, branches = pick.randint(1, 6), pick.randint(1, 3), pick.randint(1, 3)
    c, co = (pick.choice((1, 3, 5, 16, 17, 33, 48, 64)) for _ in range(2))
    filter_size = pick.choice((3, 3, 5))
    padding, pool = pick.randint(0, filter_size - 1), pick.randint(1, 3)
    least = max(1, filter_size - 2 * padding)
    height, width = (max(least, pick.randint(1, 14)) for _ in range(2))
    tile = 2 if filter_size == 5 else pick.choice((1, 2, 3, 4))
    x = torch.randn(parents, samples, height, width, c, dtype=dtype)
    weight = torch.randn(branches, co, c, filter_size, filter_size, dtype=dtype)
    weight /= filter_size * c**0.5
    bias = torch.randn(branches, co, dtype=dtype) / 10
    pairs = [(p, b) for p in range(parents) for b in range(branches)]
    kept = pick.choice((len(pairs), max(1, len(pairs) // 2), 1))
    rows = torch.tensor(pick.sample(pairs, kept))
    out_size = tuple(-(-(n + 2 * padding - filter_size + 1) // pool) for n in (height, width))
    sizes = {"padding": padding, "pool": pool, "out_size": out_size, "tile": tile}
    return (x, weight, bias), {"parents": rows[:, 0], "branches": rows[:, 1]}, sizes


def winograd_level(x, weight, bias, **keywords):
    """The operator on the branches of ``[G, Co, C, R, R]`` and ``[G, Co]``."""
    return ops.winograd_level(x, list(weight), list(bias), **keywords)


def reference(
    x, weight, bias, skip=None, *, parents, branches, padding, pool, out_size, tile=None,
    skip_rows=None, relu=True, relu_after=False,
):  # fmt: skip
    """The level row by row, in plain PyTorch."""
    out = []
    for r, (p, b) in enumerate(zip(parents.tolist(), branches.tolist(), strict=True)):
        y = F.conv2d(x[p].permute(0, 3, 1, 2), weight[b], bias[b], padding=padding)
        if relu:
            y = y.relu()
        if skip is not None:
            y = y + skip[r if skip_rows is None else skip_rows[r]].permute(0, 3, 1, 2)
        if relu_after:
            y = y.relu()
        if pool > 1:
            y = F.max_pool2d(y, pool, ceil_mode=True)
        out.append(y.permute(0, 2, 3, 1))
    return torch.stack(out)


def unused(rows, tensors, live=None):
    """Which parents and which branches no (live) row uses."""
    keep = slice(None) if live is None else live
    parents = torch.ones(len(tensors[0]), dtype=torch.bool)
    branches = torch.ones(len(tensors[1]), dtype=torch.bool)
    parents[rows["parents"][keep]] = False
    branches[rows["branches"][keep]] = False
    return parents, branches


def run(tensors, rows, sizes, dy=None, liveness=None):
    """Output and gradients, with what is not written poisoned."""
    leaves = [t.clone().requires_grad_() for t in tensors]
    ops._cpu.poison_outputs(True)
    torch.use_deterministic_algorithms(True)  # fills what empty() returns with NaN
    try:
        y = winograd_level(*leaves, **rows, **sizes, liveness=liveness)
        if dy is None:
            dy = torch.randn_like(y)
        read = [t for t in leaves if t.numel()]  # no biases are no leaf
        return dy, (y.detach(), *torch.autograd.grad(y, read, dy))
    finally:
        ops._cpu.poison_outputs(False)
        torch.use_deterministic_algorithms(False)


def relative(a, b):
    return ((a - b).norm() / b.norm().clamp_min(1e-300)).item()


@pytest.mark.parametrize("seed", SEEDS)
def test_float64_equals_pytorch(schedule, seed):
    tensors, rows, sizes = draw(seed, torch.float64)
    dy, got = run(tensors, rows, sizes)
    leaves = [t.clone().requires_grad_() for t in tensors]
    want = reference(*leaves, **rows, **sizes)
    torch.testing.assert_close(got[0], want, rtol=1e-11, atol=1e-12)
    for gradient, exact in zip(got[1:], torch.autograd.grad(want, leaves, dy), strict=True):
        assert relative(gradient, exact) < 1e-12


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("seed", SEEDS)
def test_rows_of_a_list_are_those_of_the_full_level(isa, schedule, seed, threads):
    """Unused parents are not read; each row is the same, bit for bit, whatever else is in the list,
    and the gradients are those of a full level whose other rows send zero."""
    torch.set_num_threads(threads)
    tensors, rows, sizes = draw(seed, torch.float32)
    parents, branches = len(tensors[0]), len(tensors[1])
    full = {
        "parents": torch.arange(parents).repeat_interleave(branches),
        "branches": torch.arange(branches).repeat(parents),
    }
    place = rows["parents"] * branches + rows["branches"]
    idle_parents, idle_branches = unused(rows, tensors)
    poisoned = [t.clone() for t in tensors]
    poisoned[0][idle_parents] = torch.nan
    poisoned[1][idle_branches] = torch.nan
    dy, got = run(poisoned, rows, sizes)
    dy_full = dy.new_zeros(parents * branches, *dy.shape[1:])
    dy_full[place] = dy
    _, want = run(tensors, full, sizes, dy_full)
    assert torch.equal(got[0], want[0][place])
    for gradient, exact in zip(got[1:], want[1:], strict=True):
        # sums over other blocks in another order: within a few roundings of one another
        assert relative(gradient, exact) < 1e-5
    assert not got[1][idle_parents].any()
    assert not got[2][idle_branches].any() and not got[3][idle_branches].any()
    _, again = run(poisoned, rows, sizes, dy)
    assert all(torch.equal(a, b) for a, b in zip(got, again, strict=True))


def run_by(schedule, *args):
    ops._cpu.force_schedule(schedule)
    try:
        return run(*args)
    finally:
        ops._cpu.force_schedule("")


@pytest.mark.parametrize("threads", [1, 2, 3])
@pytest.mark.parametrize("seed", SEEDS)
def test_both_schedules_agree(isa, seed, threads):
    """Outputs bit for bit; gradients are sums in another order."""
    torch.set_num_threads(threads)
    level = draw(seed, torch.float32)
    dy, want = run_by("by block", *level)
    _, got = run_by("by panel", *level, dy)
    assert torch.equal(got[0], want[0])
    for gradient, exact in zip(got[1:], want[1:], strict=True):
        assert relative(gradient, exact) < 1e-5


@pytest.mark.parametrize(
    ("side", "channels", "samples", "schedule"),
    [
        (2, (256, 512), 10, "by panel"),
        (4, (192, 256), 10, "by panel"),
        (4, (192, 256), 100, "by block"),  # many images
        (4, (64, 64), 10, "by block"),  # small weights
    ],
)
def test_few_images_with_large_weights_go_by_panel(isa, side, channels, samples, schedule):
    """As float64 has them, and which schedule it was shows in the order of the gradients' sums."""
    torch.manual_seed(0)
    torch.set_num_threads(2)
    c, co = channels
    x, bias = torch.randn(3, samples, side, side, c), torch.randn(2, co) / 10
    weight = torch.randn(2, co, c, 3, 3) / (3 * c**0.5)
    rows = {"parents": torch.tensor([0, 2, 0, 1, 2]), "branches": torch.tensor([1, 1, 0, 0, 0])}
    sizes = {"padding": 1, "pool": 1, "out_size": (side, side), "tile": side, "relu": False}
    tensors = x, weight, bias
    dy = torch.randn(5, samples, side, side, co)
    dy[2, 1] = 0
    _, got = run(tensors, rows, sizes, dy)
    for name in ("by block", "by panel"):
        _, forced = run_by(name, tensors, rows, sizes, dy)
        assert torch.equal(got[2], forced[2]) == (name == schedule)
    leaves = [t.double().requires_grad_() for t in tensors]
    want = reference(*leaves, **rows, **sizes)
    exact = want, *torch.autograd.grad(want, leaves, dy.double())
    for a, b in zip(got, exact, strict=True):
        assert relative(a, b) < 1e-5


@pytest.mark.parametrize("seed", SEEDS)
def test_rows_that_are_not_live_take_no_part_in_the_backward(isa, schedule, seed):
    tensors, rows, sizes = draw(seed, torch.float32)
    live = torch.rand(len(rows["parents"])) < 0.5
    kept = {name: values[live] for name, values in rows.items()}
    liveness = ops.Liveness()
    leaves = [t.clone().requires_grad_() for t in tensors]
    y = winograd_level(*leaves, **rows, **sizes, liveness=liveness)
    liveness.live = live
    dy = torch.randn_like(y)
    dy[~live] = torch.nan
    got = torch.autograd.grad(y, leaves, dy)
    _, want = run(tensors, kept, sizes, dy[live])
    for gradient, exact in zip(got, want[1:], strict=True):
        assert torch.equal(gradient, exact)


def test_what_only_dead_rows_use_is_not_read_in_the_backward(isa):
    tensors, _, sizes = draw(3, torch.float32)
    rows = {"parents": torch.tensor([0, 0]), "branches": torch.tensor([0, 1])}
    x = torch.stack([tensors[0][0], torch.full_like(tensors[0][0], torch.nan)])
    weight, bias = tensors[1][:1].repeat(2, 1, 1, 1, 1), tensors[2][:1].repeat(2, 1)
    rows["parents"][1] = 1
    leaves = [t.clone().requires_grad_() for t in (x, weight, bias)]
    liveness = ops.Liveness(torch.tensor([True, False]))
    y = winograd_level(*leaves, **rows, **sizes, liveness=liveness)
    for gradient in torch.autograd.grad(y, leaves, torch.ones_like(y)):
        assert gradient.isfinite().all() and gradient[0].any() and not gradient[1].any()


def test_no_rows(isa):
    tensors, _, sizes = draw(0, torch.float32)
    none = torch.zeros(0, dtype=torch.int64)
    _, (y, *gradients) = run(tensors, {"parents": none, "branches": none}, sizes)
    assert y.shape[0] == 0
    assert not any(g.any() for g in gradients)


@pytest.mark.parametrize("seed", SEEDS)
def test_no_biases_are_zeros(schedule, seed):
    (x, weight, bias), rows, sizes = draw(seed, torch.float32)
    dy, (*want, _) = run((x, weight, torch.zeros_like(bias)), rows, sizes)
    _, got = run((x, weight, bias[:0]), rows, sizes, dy)
    assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))


def test_branches_have_gradients_of_their_own():
    (x, weight, bias), rows, sizes = draw(0, torch.float32)
    weights, biases = ([t.clone().requires_grad_() for t in ts] for ts in (weight, bias))
    ops.winograd_level(x, weights, biases, **rows, **sizes).sum().backward()
    for leaf in (*weights, *biases):
        assert leaf.grad.untyped_storage().nbytes() == leaf.grad.nbytes


def test_more_branches_than_an_integer_has_bits():
    torch.manual_seed(0)
    x, weight = torch.randn(2, 1, 3, 3, 2).double(), torch.randn(70, 3, 2, 3, 3).double()
    bias = torch.randn(70, 3).double()
    rows = {"parents": torch.tensor([0, 1, 0, 1]), "branches": torch.tensor([69, 69, 2, 65])}
    y = winograd_level(x, weight, bias, **rows, padding=1)
    want = reference(x, weight, bias, **rows, padding=1, pool=1, out_size=(3, 3))
    torch.testing.assert_close(y, want, rtol=1e-12, atol=1e-12)


def draw_tail(seed, tensors, rows, sizes, like=torch.randn):
    """A drawn skip (or None) and the keywords of what stands behind the convolution."""
    pick = random.Random(seed + 1000)
    tail = {"relu": pick.random() < 0.5, "relu_after": pick.random() < 0.5}
    if pick.random() < 0.2:
        return None, tail
    count = len(rows["parents"])
    if pick.random() < 0.6:
        skips = pick.randint(1, count + 1)
        tail["skip_rows"] = torch.randint(skips, (count,))
        count = skips
    height, width = (
        n + 2 * sizes["padding"] - tensors[1].shape[3] + 1 for n in tensors[0].shape[2:4]
    )
    size = count, tensors[0].shape[1], height, width, tensors[1].shape[1]
    return like(size).to(tensors[0].dtype), tail


@pytest.mark.parametrize("seed", range(100))
def test_skips_in_float64_equal_pytorch(schedule, seed):
    tensors, rows, sizes = draw(seed, torch.float64)
    skip, tail = draw_tail(seed, tensors, rows, sizes)
    leaves = [t.clone().requires_grad_() for t in (*tensors, *([] if skip is None else [skip]))]
    want = reference(*leaves, **rows, **sizes, **tail)
    ops._cpu.poison_outputs(True)
    try:
        named = {} if skip is None else {"skip": leaves[3]}
        y = winograd_level(*leaves[:3], **named, **rows, **sizes, **tail)
        dy = torch.randn_like(y)
        got = torch.autograd.grad(y, leaves, dy)
    finally:
        ops._cpu.poison_outputs(False)
    torch.testing.assert_close(y, want, rtol=1e-11, atol=1e-12)
    for gradient, exact in zip(got, torch.autograd.grad(want, leaves, dy), strict=True):
        assert relative(gradient, exact) < 1e-12


def small_integers(size):
    return torch.randint(-1, 2, size).float()


@pytest.mark.parametrize("seed", range(60))
def test_ties_are_broken_as_in_pytorch(isa, seed):
    """Small integers: every sum is exact, and windows are full of ties, at zero too."""
    tensors, rows, sizes = draw(seed, torch.float32)
    sizes["tile"] = 1 if tensors[1].shape[3] == 3 else 2
    channels = min(4, tensors[0].shape[4])  # the direct algorithm: no transform rounds
    x = small_integers(tensors[0].shape)[..., :channels].contiguous()
    weight = small_integers(tensors[1].shape)[:, :, :channels].contiguous()
    if weight.shape[3] == 5:
        weight, sizes["tile"] = weight[..., 1:4, 1:4].contiguous(), 1
        sizes["padding"] = min(2, sizes["padding"])
        sizes["out_size"] = tuple(
            -(-(n + 2 * sizes["padding"] - 2) // sizes["pool"]) for n in x.shape[2:4]
        )
        if min(x.shape[2:4]) + 2 * sizes["padding"] < 3:
            return
    tensors = x, weight, small_integers(tensors[2].shape)
    skip, tail = draw_tail(seed, tensors, rows, sizes, like=small_integers)
    leaves = [t.clone().requires_grad_() for t in (*tensors, *([] if skip is None else [skip]))]
    named = {} if skip is None else {"skip": leaves[3]}
    y = winograd_level(*leaves[:3], **named, **rows, **sizes, **tail)
    want = reference(*leaves, **rows, **sizes, **tail)
    assert torch.equal(y, want)
    dy = torch.randint(-3, 4, y.shape).float()
    got, exact = (torch.autograd.grad(out, leaves, dy) for out in (y, want))
    assert all(torch.equal(a, b) for a, b in zip(got, exact, strict=True))


@pytest.mark.parametrize("relu", [False, True])
@pytest.mark.parametrize("relu_after", [False, True])
@pytest.mark.parametrize("pool", [1, 2, 3])
@pytest.mark.parametrize("bad", ["x", "skip"])
def test_nan_passes_every_tail(isa, schedule, relu, relu_after, pool, bad):
    torch.manual_seed(0)
    x, weight, bias = torch.randn(1, 1, 7, 7, 5), torch.randn(1, 17, 5, 3, 3), torch.randn(1, 17)
    skip = torch.randn(1, 1, 7, 7, 17)
    {"x": x, "skip": skip}[bad][0, 0, 4, 4, 2] = torch.nan
    rows = {"parents": torch.tensor([0]), "branches": torch.tensor([0])}
    n = -(-7 // pool)
    sizes = {"padding": 1, "pool": pool, "out_size": (n, n), "relu": relu, "relu_after": relu_after}
    for added in (skip, None) if bad == "x" else (skip,):
        want = reference(x, weight, bias, added, **rows, **sizes).isnan()
        y = winograd_level(x, weight, bias, skip=added, **rows, **sizes)
        assert want.any() and y[want].isnan().all()


def test_rows_that_are_not_live_give_their_skip_nothing(isa):
    torch.manual_seed(0)
    x, weight, bias = torch.randn(2, 1, 4, 4, 5), torch.randn(2, 9, 5, 3, 3), torch.randn(2, 9)
    rows = {"parents": torch.tensor([0, 1, 1]), "branches": torch.tensor([0, 0, 1])}
    skip = torch.randn(3, 1, 4, 4, 9, requires_grad=True)
    liveness = ops.Liveness()
    y = winograd_level(x, weight, bias, **rows, padding=1, skip=skip, liveness=liveness)
    dy = torch.randn_like(y)
    (all_of_it,) = torch.autograd.grad(y, skip, dy, retain_graph=True)
    assert torch.equal(all_of_it, dy)
    liveness.live = torch.tensor([True, False, True])
    dy[1] = torch.nan
    (live,) = torch.autograd.grad(y, skip, dy)
    assert torch.equal(live[::2], dy[::2]) and not live[1].any()
