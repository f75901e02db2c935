"""Wide layers in PyTorch whose backward runs on live rows: equal to masking, whatever is dead."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import lasem_fast as lf
from lasem_fast.backends.followed_core import Places, _gradients, followed, follows
from lasem_fast.levels.row_liveness import Liveness

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


@pytest.mark.parametrize("samples_first", [True, False])
@pytest.mark.parametrize("live", LIVE)
@pytest.mark.parametrize("core", CORES)
def test_gradients_are_those_of_the_live_rows(core, live, samples_first):
    torch.manual_seed(0)
    make, image = CORES[core]
    layer = make()  # both branches' weights side by side
    samples, parents, branches = 2, 3, 2
    alive = torch.tensor(LIVE[live], dtype=torch.bool)
    rows = torch.arange(6).view(parents, branches).flip(0)  # in another order than the batch
    x = torch.randn(samples * parents, 3, *image, dtype=torch.float64)
    if core == "channels last":
        x = x.contiguous(memory_format=torch.channels_last)
    x.requires_grad_()
    leaves = [x, layer.weight, *([] if layer.bias is None else [layer.bias])]
    liveness = Liveness()
    assert follows(layer, x, liveness)
    y = followed(
        layer,
        x,
        layer.weight,
        layer.bias,
        liveness,
        Places(rows.flatten().tolist(), branches, samples_first),
    )
    assert torch.equal(y, layer(x))
    dy = torch.randn_like(y)
    first = parents if samples_first else samples
    mask = alive[:, None] if not samples_first else alive[None]
    split = dy.unflatten(0, (-1, first)).unflatten(2, (branches, -1))
    masked = (split * mask.reshape(*mask.shape, *[1] * (split.dim() - 4 + 1))).flatten(2, 3)
    truth = torch.autograd.grad(layer(x), leaves, masked.flatten(0, 1))
    liveness.live = torch.empty(6, dtype=torch.bool).index_put_((rows,), alive)
    found = torch.autograd.grad(y, leaves, dy)  # what the dead rows get is never looked at
    for a, b in zip(found, truth, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("core", ["conv", "linear"])
def test_gradients_of_gradients(core):
    torch.manual_seed(0)
    make, image = CORES[core]
    layer = make()
    x = torch.randn(4, 3, *image, dtype=torch.float64, requires_grad=True)
    live = torch.tensor([True, False, True, True])

    def level(x, *parameters):
        liveness = Liveness(live)
        return followed(layer, x, *parameters, liveness, Places(range(4), 2, True)).square()

    y = layer(x)
    mask = live.view(2, 2)[None].expand(2, -1, -1).reshape(4, 2).repeat_interleave(4, 1)
    mask = mask.view(4, 8, *[1] * len(image))
    inputs = (x, layer.weight, layer.bias)
    results = []
    for out in ((y * mask).square(), level(*inputs)):
        first = torch.autograd.grad((out * mask).sum(), inputs, create_graph=True)
        results.append(torch.autograd.grad(sum(g.square().sum() for g in first), inputs))
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-10)


def test_what_it_does_not_follow():
    live, x = Liveness(), torch.randn(4, 4, 6, 6)
    assert not follows(nn.Conv2d(4, 4, 3), x, None)
    assert not follows(nn.Conv2d(4, 4, 3, padding=1, padding_mode="circular"), x, live)
    assert not follows(nn.Conv2d(4, 4, 3, padding="same"), x, live)
    assert not follows(nn.Conv2d(4, 4, 3, groups=2), x, live)
    assert not follows(nn.Linear(6, 2), x, live)
    with torch.no_grad():
        assert not follows(nn.Conv2d(4, 4, 3), x, live)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert not follows(nn.Conv2d(4, 4, 3), x, live)


def test_pruned_steps_of_the_torch_backend_use_it(monkeypatch):
    """And what it was not made for is noted, so that the next E-step keeps no graph."""
    shares = []
    search = lf.LASEM(_net(nn.Conv2d), backend="torch", prune=0.4)._search
    monkeypatch.setattr(search, "_note", lambda task, evaluation, weighs: shares.append(
        evaluation.share_of(weighs)))  # fmt: skip
    for padding in (1, "same"):
        em = lf.LASEM(_net(nn.Conv2d, padding), backend="torch", prune=0.4)
        monkeypatch.setattr(em._search, "_note", search._note)
        em(torch.randn(4, 3, 6, 6), torch.randint(3, (4,)), "t").loss.backward()
    assert shares[0] is None and 0 < shares[1] <= 1


def _net(conv, padding=1):
    net = lf.TransferNet(nn.Sequential(conv(3, 3, 3, padding=padding), nn.ReLU()) for _ in "abc")
    net.add_task("t", nn.Sequential(nn.Flatten(), nn.Linear(108, 3)))
    return net


def test_gradients_without_a_bias_are_none():
    layer = nn.Linear(3, 2, bias=False)
    assert _gradients(layer, torch.ones(1, 3), layer.weight, torch.ones(1, 2), [1, 1, 0])[2] is None
