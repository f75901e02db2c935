"""Dropout in heads on the `triton` backend: masks, both heads at once, launches, whole steps."""

from __future__ import annotations

import copy
from itertools import product

import pytest
import torch
from launches import launches
from torch import nn
from wide_offsets import wide_offsets

import lasem_fast as lf
from lasem_fast.backends import triton_scores
from lasem_fast.backends.triton_dropout_op import dropped
from lasem_fast.backends.triton_linear_head import triton_head, triton_head_twice
from lasem_fast.kernels import dropout as kernels
from lasem_fast.levels.fold import RowsFirst

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")  # numpy's, for -inf - -inf

HEADS = {
    "first": lambda: nn.Sequential(nn.Flatten(), nn.Dropout(0.4), nn.Linear(30, 4)),
    "both": lambda: nn.Sequential(
        nn.Flatten(), nn.Dropout(0.4), nn.Linear(30, 6), nn.ReLU(), nn.Dropout(0.25),
        nn.Linear(6, 4, bias=False),
    ),
    "behind": lambda: nn.Sequential(
        nn.Flatten(), nn.Linear(30, 6), nn.ReLU(), nn.Dropout(), nn.Linear(6, 4)
    ),
}  # fmt: skip


def _images(rows=3):
    torch.manual_seed(0)
    return torch.randint(-4, 5, (rows, 2, 2, 3, 5)).float()  # [P, N, H, W, C]


@pytest.mark.parametrize("layout", ["contiguous", "permuted"])
def test_the_values_that_pytorch_drops(layout):
    x = _images()
    if layout == "permuted":
        x = x.transpose(0, 3).contiguous().transpose(0, 3)
    leaf = x.clone().requires_grad_()
    torch.manual_seed(1)
    got = dropped(leaf, 0.25, 3, pair=False)
    torch.manual_seed(1)
    plain = x.clone().requires_grad_()
    flat = nn.functional.dropout(RowsFirst(plain).folded().flatten(1), 0.25)
    want = RowsFirst.of(flat.unflatten(1, (5, 2, 3)), 3).data
    assert torch.equal(got, want)
    dy = torch.randn(got.shape)
    assert torch.equal(
        torch.autograd.grad(got, leaf, dy)[0], torch.autograd.grad(want, plain, dy)[0]
    )


def test_a_pair_keeps_the_rows_without_dropout():
    x = _images().requires_grad_()
    torch.manual_seed(1)
    first = dropped(x, 0.25, 3, pair=True)
    torch.manual_seed(1)
    assert torch.equal(first, torch.cat([x, dropped(x, 0.25, 3, pair=False)]))
    second = dropped(first, 0.5, 3, pair=True)
    assert torch.equal(second[:3], x)
    kept = second[3:] != 0
    assert torch.equal(second[3:][kept], 2 * first[3:][kept])
    dy = torch.randn(second.shape)
    (got,) = torch.autograd.grad(second, first, dy)
    assert not got[:3].any()
    assert torch.equal(got[3:][first[3:] != 0], (2 * dy[3:] * kept)[first[3:] != 0])


def test_what_overflows_and_is_dropped_is_zero():
    x = torch.full((1, 1, 1, 1, 2), torch.inf)
    y = kernels.dropout(x, torch.tensor([True, False]), None, 1, 0, 2.0, kernels.ALONE.value)
    assert y.flatten().tolist() == [torch.inf, 0]


def test_64_bit_offsets_give_the_same_bits():
    x, mask = _images(), torch.rand(3 * 60) < 0.5
    narrow = kernels.dropout(x, mask, None, 3, 0, 2.0, kernels.CALM.value)
    with wide_offsets():
        wide = kernels.dropout(x, mask, None, 3, 0, 2.0, kernels.CALM.value)
    assert torch.equal(wide, narrow)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"rows": 4}, "x: expected"),
        ({"mask": torch.ones(7, dtype=torch.bool)}, "mask: expected 180 bool on cpu, got 7"),
        ({"mask": torch.ones(180)}, "mask: expected 180 bool on cpu, got 180 of torch.float32"),
        ({"places": torch.arange(2)}, r"places: expected 3 of int64, got \[2\] of torch.int64"),
    ],
)
def test_errors(changed, message):
    good = {"x": _images(), "mask": torch.ones(180, dtype=torch.bool), "places": None, "rows": 3,
            "first": 0, "scale": 2.0, "half": 0}  # fmt: skip
    with pytest.raises(ValueError, match=message):
        torch.ops.lasem_fast.dropout_triton(**{**good, **changed})


def test_opcheck():
    x, mask = _images(), torch.rand(3 * 60) < 0.5
    for half, places in product(range(3), (None, torch.tensor([2, 0, 1]))):
        torch.library.opcheck(
            torch.ops.lasem_fast.dropout_triton.default, (x, mask, places, 3, 0, 2.0, half)
        )


def test_rows_in_another_order_have_the_masks_of_their_places():
    x, order = _images(), torch.tensor([2, 0, 1])
    torch.manual_seed(1)
    want = dropped(x, 0.5, 3, pair=False)
    torch.manual_seed(1)
    assert torch.equal(dropped(x[order], 0.5, 3, pair=False, places=order), want[order])


@pytest.mark.parametrize("name", HEADS)
def test_a_head_twice_is_the_head_in_both_modes(name):
    head, x = HEADS[name](), _images()
    torch.manual_seed(1)
    noisy = head(RowsFirst(x).folded())
    calm = copy.deepcopy(head).eval()(RowsFirst(x).folded())
    want = torch.stack([t.unflatten(0, (2, 3)).transpose(0, 1) for t in (calm, noisy)])
    torch.manual_seed(1)
    got = triton_head_twice(head, RowsFirst(x), 3).unflatten(0, (2, 3, 2))
    torch.testing.assert_close(got, want)
    torch.manual_seed(1)
    torch.testing.assert_close(triton_head(head, RowsFirst(x), 3), want[1].flatten(0, 1))
    torch.testing.assert_close(triton_head(head.eval(), RowsFirst(x), 3), want[0].flatten(0, 1))
    assert triton_head_twice(head.eval(), RowsFirst(x), 3) is None


def test_a_layer_that_comes_twice_orders_rows_once():
    torch.manual_seed(0)
    layer, x = nn.Linear(4, 4), torch.randn(3, 2, 4)
    head, order = nn.Sequential(layer, nn.ReLU(), layer), (2, 0, 1)
    got = triton_head(head, RowsFirst(x), 3, order)
    torch.testing.assert_close(got, head(x)[list(order)].flatten(0, 1))


def _net(head: str, dtype=torch.float32, groups=None):
    torch.manual_seed(0)
    stages = [
        nn.Sequential(nn.Conv2d(2, 3, 3, padding=1), nn.ReLU()),
        nn.Sequential(nn.Conv2d(3, 5, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2)),
    ]
    net = lf.TransferNet(stages)
    net.add_task("a", HEADS[head]())
    space = None if groups is None else lf.ConfigSpace.from_configs(groups)
    return net.to(dtype), space


def _step(backend, head, dtype=torch.float32, likelihood="joint", configs=None):
    net, space = _net(head, dtype, configs)
    x = torch.randn(2, 2, 4, 6, generator=torch.Generator().manual_seed(3)).to(dtype)
    em = lf.LASEM(net, space, backend=backend, likelihood=likelihood)
    torch.manual_seed(5)
    step = em(x, torch.tensor([3, 1]), "a")
    step.loss.backward()
    values = [step.loss, step.posterior, step.log_likelihood, step.nll]
    return torch.cat(
        [t.detach().double().flatten() for t in [*values, *(p.grad for p in net.parameters())]]
    ), torch.rand(3)


@pytest.mark.parametrize("head", HEADS)
@pytest.mark.parametrize("likelihood", ["joint", "mean"])
def test_a_whole_step_with_the_masks_of_float64(head, likelihood):
    exact, after = _step("torch", head, torch.float64, likelihood)
    plain, _ = _step("torch", head, likelihood=likelihood)
    got, ours = _step("triton", head, likelihood=likelihood)
    assert torch.equal(after, ours)  # the random state goes on as there
    eps = torch.finfo(torch.float32).eps
    # k = 2: the same sums in another order
    assert (got - exact).norm() <= 2 * max((plain - exact).norm(), eps * exact.norm())


def test_some_configurations_in_any_order():
    configs = [(False, True), (True, True), (False, False)]
    exact, _ = _step("torch", "both", torch.float64, configs=configs)
    got, _ = _step("triton", "both", configs=configs)
    torch.testing.assert_close(got, exact, rtol=1e-4, atol=1e-5)


def test_launches(monkeypatch):
    """A dropout costs its mask, what uses it, and the backward of that."""
    counts = {}
    for head in ("without", "both"):
        net, _ = _net("both")
        if head == "without":
            net.heads["a"] = nn.Sequential(
                *(m for m in net.heads["a"] if not isinstance(m, nn.Dropout))
            )
        em = lf.LASEM(net.to(memory_format=torch.channels_last), backend="triton")
        monkeypatch.setattr(em, "_reads_values", lambda x: False)
        monkeypatch.setattr(triton_scores, "_looked_at_first", lambda logits: False)
        x, y = torch.randn(2, 2, 4, 6), torch.tensor([3, 1])
        for _ in range(2):  # the first step makes what is kept
            with launches() as counted:
                em(x, y, "a").loss.backward()
        counts[head] = counted.kernels
    with_masks, without = counts["both"], counts["without"]
    assert with_masks.pop("dropout_kernel") == 4
    assert with_masks.pop("aten.native_dropout.default") == 2
    with_masks.pop("aten.bernoulli_.float", None)  # on a CPU inside of the one before
    assert with_masks == without
