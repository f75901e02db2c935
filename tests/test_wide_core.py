"""Wide layers in PyTorch whose backward runs on live rows: equal to masking, whatever is dead."""

from __future__ import annotations

import parity
import pytest
import torch
from torch import nn

import lasem_fast as lf
from lasem_fast.backends import plain_torch
from lasem_fast.backends.wide_core import Wide, _of_layer, _turned, is_taken, wide_core
from lasem_fast.levels.row_liveness import Liveness
from lasem_fast.tree.budget import Cut

CORES = {
    "conv": (lambda: nn.Conv2d(3, 8, 3, stride=2, padding=1, dtype=torch.float64), (7, 6)),
    "channels last": (
        lambda: nn.Conv2d(3, 8, 3, dtype=torch.float64).to(memory_format=torch.channels_last),
        (7, 6),
    ),
    "no bias": (lambda: nn.Conv2d(3, 8, (3, 1), bias=False, dtype=torch.float64), (5, 4)),
    "dilated": (lambda: nn.Conv2d(3, 8, 2, dilation=2, dtype=torch.float64), (5, 6)),
    "1d": (lambda: nn.Conv1d(3, 8, 3, padding=2, dtype=torch.float64), (6,)),
    "linear": (lambda: nn.Linear(3, 8, dtype=torch.float64), ()),
}
LIVE = {
    "all": [[1, 1], [1, 1], [1, 1]],
    "some": [[1, 0], [1, 1], [0, 0]],
    "around one": [[1, 1], [0, 1], [1, 1]],
    "one branch": [[0, 1], [0, 1], [0, 0]],
    "none": [[0, 0], [0, 0], [0, 0]],
}


# rows outermost in the output; turned
ORDERS = {"samples first": (False, False), "rows first": (True, False), "turned": (True, True)}
CASES = [(core, order) for core, (_, image) in CORES.items() for order in ORDERS
         if order != "turned" or len(image) == 2]  # fmt: skip


@pytest.mark.parametrize("relu", [False, True])
@pytest.mark.parametrize("live", LIVE)
@pytest.mark.parametrize(("core", "order"), CASES)
def test_gradients_are_those_of_the_live_rows(core, order, live, relu):
    torch.manual_seed(0)
    make, image = CORES[core]
    layer = make()  # both branches' weights side by side
    samples, parents, branches = 2, 3, 2
    alive = torch.tensor(LIVE[live], dtype=torch.bool)
    x = torch.randn(samples * parents, 3, *image, dtype=torch.float64)
    if core == "channels last":
        x = x.contiguous(memory_format=torch.channels_last)
    x.requires_grad_()
    leaves = [x, layer.weight, *([] if layer.bias is None else [layer.bias])]
    liveness = Liveness()
    assert is_taken(layer, x)
    rows = torch.arange(6).view(parents, branches).flip(0)  # in another order than the batch
    how = Wide(layer, rows.flatten().tolist(), branches, relu, *ORDERS[order])
    y = wide_core(how, x, layer.weight, layer.bias, liveness)
    plain = layer(x).relu() if relu else layer(x)
    expected = _turned(plain, parents) if how.turned else plain
    torch.testing.assert_close(y, expected, rtol=1e-12, atol=1e-12)
    assert not how.turned or y.is_contiguous(memory_format=torch.channels_last)
    dy = torch.randn_like(y)
    split = _by_parent(dy, how).unflatten(2, (branches, -1))
    masked = torch.empty_like(dy)
    of_rows = _by_parent(masked, how).unflatten(2, (branches, -1))
    of_rows.copy_(split * alive.reshape(parents, 1, branches, *[1] * (split.dim() - 3)))
    truth = torch.autograd.grad(expected, leaves, masked)
    liveness.live = torch.empty(6, dtype=torch.bool).index_put_((rows,), alive)
    found = torch.autograd.grad(y, leaves, _poisoned(dy, alive, how))
    for a, b in zip(found, truth, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


def _by_parent(batch, how):
    if how.rows_first:
        return batch.unflatten(0, (how.parents, -1))
    return batch.unflatten(0, (-1, how.parents)).transpose(0, 1)


def _poisoned(dy, alive, how):
    """What the dead rows get is never looked at."""
    poisoned = dy.clone()
    split = _by_parent(poisoned, how).unflatten(2, (how.branches, -1))
    for parent, branch in (~alive).nonzero().tolist():
        split[parent, :, branch] = torch.nan
    return poisoned


@pytest.mark.parametrize("relu", [False, True])
@pytest.mark.parametrize(("core", "turned"), [("conv", False), ("conv", True), ("linear", False)])
def test_gradients_of_gradients(core, turned, relu):
    torch.manual_seed(0)
    make, image = CORES[core]
    layer = make()
    x = torch.randn(4, 3, *image, dtype=torch.float64, requires_grad=True)
    live = torch.tensor([True, False, True, True])
    how = Wide(layer, range(4), 2, relu, turned, turned)
    inputs = (x, layer.weight, layer.bias)
    y = layer(x).relu() if relu else layer(x)
    mask = live.view(2, 2)[None].expand(2, -1, -1).reshape(4, 2).repeat_interleave(4, 1)
    mask = mask.view(4, 8, *[1] * len(image))
    results = []
    ours = wide_core(how, *inputs, Liveness(live))
    ours = _by_parent(ours, how).transpose(0, 1).flatten(0, 1)
    for out in (y, ours):
        first = torch.autograd.grad((out.square() * mask).sum(), inputs, create_graph=True)
        results.append(torch.autograd.grad(sum(g.square().sum() for g in first), inputs))
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-10)


def test_what_is_left_to_the_layer_itself():
    x = torch.randn(4, 4, 6, 6)
    assert is_taken(nn.Conv2d(4, 4, 3), x)
    assert not is_taken(nn.Conv2d(4, 4, 3, padding=1, padding_mode="circular"), x)
    assert not is_taken(nn.Conv2d(4, 4, 3, padding="same"), x)
    assert not is_taken(nn.Conv2d(4, 4, 3, groups=2), x)
    assert not is_taken(nn.Linear(6, 2), x)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert not is_taken(nn.Conv2d(4, 4, 3), x)


def test_pruned_steps_of_the_torch_backend_use_it(monkeypatch):
    """And what it was not made for is noted, so that the next E-step keeps no graph."""
    found = []
    for padding in (1, "same"):
        em = lf.LASEM(_net(nn.Conv2d, padding), backend="torch", prune=0.4)
        monkeypatch.setattr(em._search, "note", lambda task, of_step: found.append(of_step.few))
        em(torch.randn(4, 3, 6, 6), torch.randint(3, (4,)), "t").loss.backward()
    assert found[0] is None and found[1] in (True, False)


def _net(conv, padding=1):
    net = lf.TransferNet(nn.Sequential(conv(3, 3, 3, padding=padding), nn.ReLU()) for _ in "abc")
    net.add_task("t", nn.Sequential(nn.Flatten(), nn.Linear(108, 3)))
    return net


def test_gradients_without_a_bias_are_none():
    layer = nn.Linear(3, 2, bias=False)
    assert _of_layer(layer, torch.ones(1, 3), layer.weight, torch.ones(1, 2), [1, 1, 0])[2] is None


@pytest.fixture
def turned(monkeypatch):
    """Turns stages of any size; the levels that were."""
    seen, real = [], plain_torch.wide_core
    monkeypatch.setattr(plain_torch, "_MANY_PIXELS", 0)
    monkeypatch.setattr(plain_torch, "_MANY_VALUES", 0)
    monkeypatch.setattr(
        plain_torch, "wide_core", lambda how, *rest: (seen.append(how.turned), real(how, *rest))[1]
    )
    return seen


@pytest.mark.parametrize("layout", parity.LAYOUTS)
@pytest.mark.parametrize("net", [name for name in parity.NETS if "pool" in name])
def test_turned_stages_are_those_of_brute_force(net, layout, turned):
    parity.check("torch", parity.problem(net, layout=layout))
    assert net != "pool 2" or True in turned


@pytest.mark.parametrize("bounded", [False, True])
@pytest.mark.parametrize("options", [{}, {"prune": 0.3}, {"m_step_draws": 2}], ids=str)
@pytest.mark.parametrize("samples", [1, 3])
def test_turned_steps_are_those_that_are_not(options, bounded, samples, turned, monkeypatch):
    x = torch.randn(samples, 3, 8, 8, dtype=torch.float64)
    found = []
    for many in (0, 10**9):
        monkeypatch.setattr(plain_torch, "_MANY_VALUES", many)
        torch.manual_seed(0)
        ends = [nn.ReLU(), nn.MaxPool2d(2)], [nn.ReLU()], [nn.MaxPool2d(3, 2, padding=1), nn.ReLU()]
        net = lf.TransferNet(nn.Sequential(nn.Conv2d(3, 3, 3, padding=1), *end) for end in ends)
        net.add_task("t", nn.Sequential(nn.Flatten(), nn.Linear(12, 3)))
        max_memory = 10**12 if bounded else None
        em = lf.LASEM(net.double(), backend="torch", max_memory=max_memory, **options)
        if bounded:
            em._search.everything._cut = lambda *_: Cut(stage=1, rows=1, peak=0)
        for seed in range(3):  # a narrow posterior changes how the next steps go
            torch.manual_seed(seed)
            em(x, torch.arange(samples), "t").loss.backward()
        found.append([p.grad for p in net.parameters()])
    assert True in turned
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)
