"""The C++ batch norm of a level's rows against PyTorch's, of each row alone."""

from __future__ import annotations

import random
from typing import NamedTuple

import pytest
import torch
import torch.nn.functional as F
from isas import has
from torch import Tensor

from lasem_fast.backends import cpu_norm, cpu_ops
from lasem_fast.levels.relu_and_pool import Pool
from lasem_fast.levels.row_liveness import Liveness

pytestmark = pytest.mark.skipif(not cpu_ops.supported(), reason=cpu_ops.why_unsupported())

SINGLE = [pytest.param(isa, marks=pytest.mark.skipif(not has(isa), reason=f"no {isa}"))
          for isa in ("avx2", "avx512")]  # fmt: skip


class Case(NamedTuple):
    y: Tensor
    weights: list[Tensor]
    biases: list[Tensor]
    skip: Tensor | None
    branches: Tensor
    skip_rows: Tensor | None
    pool: Pool
    relu: bool
    relu_after: bool
    eps: float

    @property
    def leaves(self) -> list[Tensor]:
        return [self.y, *self.weights, *self.biases, *([] if self.skip is None else [self.skip])]

    def to(self, dtype) -> Case:
        """The same numbers, as leaves of a graph."""
        made = lambda t: t.to(dtype).clone().requires_grad_()  # noqa: E731
        return self._replace(
            y=made(self.y),
            weights=[made(t) for t in self.weights],
            biases=[made(t) for t in self.biases],
            skip=None if self.skip is None else made(self.skip),
        )


def drawn(seed: int) -> Case:
    pick = random.Random(seed)
    torch.manual_seed(seed)
    rows, samples = pick.randint(1, 6), pick.randint(1, 11)
    height, width = pick.choice([1, 2, 3, 5, 8, 17, 40]), pick.choice([1, 2, 4, 7, 13])
    if samples * height * width == 1:
        samples = 2
    channels = pick.choice([1, 2, 3, 8, 15, 16, 17, 33, 130])
    size = pick.choice([1, 2, 3])
    pool = Pool(size, pick.randint(0, size // 2), pick.random() < 0.5)
    if min(pool.output(height), pool.output(width)) < 1:
        pool = Pool()
    branches, double = pick.randint(1, 3), torch.float64
    affine = pick.random() < 0.7
    skips = pick.randint(1, 4) if pick.random() < 0.5 else 0
    image = samples, height, width, channels
    own = skips and pick.random() < 0.3
    skips = rows if own else skips
    return Case(
        y=torch.randn(rows, *image, dtype=double) * 3 + torch.randn(channels, dtype=double),
        weights=[torch.randn(channels, dtype=double) for _ in range(branches if affine else 0)],
        biases=[torch.randn(channels, dtype=double) for _ in range(branches if affine else 0)],
        skip=torch.randn(skips, *image, dtype=double) if skips else None,
        branches=torch.randint(branches, (rows,)),
        skip_rows=torch.randint(skips, (rows,)) if skips and not own else None,
        pool=pool,
        relu=pick.random() < 0.7,
        relu_after=pick.random() < 0.5,
        eps=pick.choice([1e-5, 1e-2]),
    )


def plain(case: Case) -> Tensor:
    """Of every row by PyTorch."""
    rows = []
    for row, branch in enumerate(case.branches.tolist()):
        parameters = (case.weights[branch], case.biases[branch]) if case.weights else (None, None)
        z = F.batch_norm(
            case.y[row].permute(0, 3, 1, 2), None, None, *parameters, True, eps=case.eps
        )
        z = z.relu() if case.relu else z
        if case.skip is not None:
            at = row if case.skip_rows is None else int(case.skip_rows[row])
            z = z + case.skip[at].permute(0, 3, 1, 2)
        z = z.relu() if case.relu_after else z
        size, padding, ceil = case.pool
        if size > 1:
            z = F.max_pool2d(z, size, padding=padding, ceil_mode=ceil)
        rows.append(z.permute(0, 2, 3, 1))
    return torch.stack(rows)


def fused(case: Case, liveness: Liveness | None = None) -> tuple[Tensor, Tensor, Tensor]:
    return cpu_norm.norm_level(
        case.y, case.weights, case.biases, branches=case.branches, eps=case.eps,
        pool=case.pool.size, pool_pad=case.pool.padding,
        out_size=tuple(map(case.pool.output, case.y.shape[2:4])), relu=case.relu, skip=case.skip,
        skip_rows=case.skip_rows, relu_after=case.relu_after, liveness=liveness,
    )  # fmt: skip


def poisoned(function):
    """What a function gives, with outputs that are not written full of NaN."""
    cpu_ops._cpu.poison_outputs(True)
    try:
        return function()
    finally:
        cpu_ops._cpu.poison_outputs(False)


def gradients(out: Tensor, case: Case, dout: Tensor) -> list[Tensor]:
    found = torch.autograd.grad(out, case.leaves, dout, allow_unused=True)
    return [
        torch.zeros_like(leaf) if g is None else g
        for leaf, g in zip(case.leaves, found, strict=True)
    ]


@pytest.mark.parametrize("seed", range(60))
def test_float64_equals_pytorch(seed):
    case = drawn(seed).to(torch.float64)
    expected = plain(case)
    dout = torch.randn_like(expected)
    out, mean, var = poisoned(lambda: fused(case))
    found = [out, *poisoned(lambda: gradients(out, case, dout))]
    for ours, theirs in zip(found, [expected, *gradients(expected, case, dout)], strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-11, atol=1e-11)
    torch.testing.assert_close(mean, case.y.mean((1, 2, 3)), rtol=1e-13, atol=1e-13)
    torch.testing.assert_close(var, case.y.var((1, 2, 3), correction=0), rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("isa", SINGLE)
@pytest.mark.parametrize("seed", range(30))
def test_float32_rounds_at_most_twice_as_much_as_pytorch(isa, seed):
    """Where the choices of ReLU and pool agree: no pool, and no ReLU."""
    exact = drawn(seed)._replace(pool=Pool(), relu=False, relu_after=False)
    exact = exact._replace(y=exact.y.float().double()).to(torch.float64)
    truth = plain(exact)
    dout = torch.randn_like(truth)
    truths = [truth, *gradients(truth, exact, dout)]
    case = exact.to(torch.float32)
    theirs = [plain(case), *gradients(plain(case), case, dout.float())]
    cpu_ops.force_isa(isa)
    try:
        out = fused(case)[0]
        ours = [out, *gradients(out, case, dout.float())]
    finally:
        cpu_ops.force_isa(None)
    for a, b, true in zip(ours, theirs, truths, strict=True):
        rounding = torch.finfo(torch.float32).eps * float(true.detach().norm())
        allowed = 2 * float((b.double() - true).norm()) + rounding
        assert float((a.double() - true).norm()) <= allowed


@pytest.mark.parametrize("isa", SINGLE)
def test_a_mean_far_from_zero_and_an_outlier_first_cost_no_digits(isa):
    torch.manual_seed(0)
    y = torch.randn(2, 4, 9, 9, 19) + 1000
    y[0, 0, 0, 0] = 0.0
    case = Case(
        y, [], [], None, torch.zeros(2, dtype=torch.int64), None, Pool(), False, False, 1e-5
    )
    cpu_ops.force_isa(isa)
    try:
        _, mean, var = fused(case)
    finally:
        cpu_ops.force_isa(None)
    exact = y.double()
    torch.testing.assert_close(mean.double(), exact.mean((1, 2, 3)), rtol=1e-6, atol=0)
    expected = exact.var((1, 2, 3), correction=0)
    torch.testing.assert_close(var.double(), expected, rtol=1e-5, atol=0)


@pytest.mark.parametrize("isa", SINGLE)
@pytest.mark.parametrize("seed", range(10))
def test_dead_rows_are_not_looked_at_and_threads_change_no_bit(isa, seed):
    case = drawn(seed).to(torch.float32)
    live = torch.rand(len(case.branches)) < 0.6
    liveness = Liveness()
    cpu_ops.force_isa(isa)
    try:
        out = fused(case, liveness)[0]
        dout = torch.randn_like(out)
        masked = torch.where(live[:, None, None, None, None], dout, 0)
        expected = gradients(fused(case)[0], case, masked)
        liveness.live = live
        dout[~live] = torch.nan
        found = poisoned(lambda: gradients(out, case, dout))
        threads = torch.get_num_threads()
        torch.set_num_threads(1)
        try:
            again = gradients(fused(case)[0], case, masked)
        finally:
            torch.set_num_threads(threads)
    finally:
        cpu_ops.force_isa(None)
    for a, b, c in zip(found, expected, again, strict=True):
        assert torch.equal(b, c)
        torch.testing.assert_close(a, b, rtol=0, atol=0)
    assert not bool(found[0][~live].any())


@pytest.mark.parametrize("seed", range(12))
def test_gradients_of_gradients(seed):
    case = drawn(seed)
    case = case._replace(y=case.y[:, :3, :5, :4, :4].contiguous())
    if case.skip is not None:
        case = case._replace(skip=case.skip[:, :3, :5, :4, :4].contiguous())
    case = case._replace(
        weights=[w[:4] for w in case.weights], biases=[b[:4] for b in case.biases]
    ).to(torch.float64)
    if min(map(case.pool.output, case.y.shape[2:4])) < 1 or case.y[0].numel() == case.y.shape[-1]:
        case = case._replace(pool=Pool(), y=torch.randn(len(case.y), 2, 3, 3, 4).double())
        case = case._replace(skip=None).to(torch.float64)
    results = []
    for out in (fused(case)[0], plain(case)):
        torch.manual_seed(1)
        dout = torch.randn_like(out, requires_grad=True)
        leaves = [*case.leaves, dout]
        first = torch.autograd.grad(out, case.leaves, dout, create_graph=True, allow_unused=True)
        total = sum((g**2).sum() for g in first if g is not None)
        second = torch.autograd.grad(total, leaves, allow_unused=True)
        results.append([torch.zeros(1, dtype=torch.float64) if g is None else g for g in second])
    for ours, theirs in zip(*results, strict=True):
        if ours.shape == theirs.shape:
            torch.testing.assert_close(ours, theirs, rtol=1e-8, atol=1e-9)
        else:
            assert not bool(ours.any()) and not bool(theirs.any())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"branches": torch.tensor([0, 5])}, "branches"),
        ({"weights": [torch.ones(4)], "biases": []}, "biases must be as many as weights"),
        ({"weights": [torch.ones(5)], "biases": [torch.ones(5)]}, "weights must have shape"),
        ({"skip": torch.ones(3, 2, 3, 3, 4)}, "skip must have a row"),
        ({"y": torch.ones(2, 1, 1, 1, 4)}, "more than one value per channel"),
        ({"y": torch.ones(2, 2, 3, 3, 4).half()}, "float32 or float64"),
    ],
)
def test_what_does_not_fit_is_refused_by_name(change, message):
    case = Case(
        torch.randn(2, 2, 3, 3, 4), [], [], None, torch.tensor([0, 0]), None, Pool(), True, False,
        1e-5,
    )._replace(**change)  # fmt: skip
    with pytest.raises(RuntimeError, match=message):
        fused(case)


def test_the_operators_are_registered_as_pytorch_wants_them():
    case = drawn(3).to(torch.float64)
    size = tuple(map(case.pool.output, case.y.shape[2:4]))
    detached = [[t.detach() for t in of] for of in (case.weights, case.biases)]
    skip = None if case.skip is None else case.skip.detach()
    tests = ("test_schema", "test_faketensor")
    torch.library.opcheck(
        torch.ops.lasem_fast.norm_level.default,
        (case.y.detach(), *detached, case.branches, skip, case.skip_rows, case.eps,
         case.pool.size, case.pool.padding, *size, case.relu, case.relu_after),
        test_utils=tests,
    )  # fmt: skip
    out, code, mean, var = torch.ops.lasem_fast.norm_level.default(
        case.y.detach(), *detached, case.branches, skip, case.skip_rows, case.eps,
        case.pool.size, case.pool.padding, *size, case.relu, case.relu_after,
    )  # fmt: skip
    torch.library.opcheck(
        torch.ops.lasem_fast.norm_level_backward.default,
        (out, case.y.detach(), code, mean, var, detached[0], case.branches, None, case.eps,
         case.pool.size, case.pool.padding),
        test_utils=tests,
    )  # fmt: skip
