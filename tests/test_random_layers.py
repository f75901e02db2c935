"""Dropout: the E-step runs without it, the M-step with it, and the trunk before it once."""

from __future__ import annotations

import itertools
import re

import pytest
import torch
from nets import batch, small_net
from oracle import assert_equals, assert_step_equals, brute_force
from torch import nn

import lasem_fast as lf


class Doubling(nn.Dropout):
    """A dropout whose draw is known: it doubles its input in training mode."""

    def forward(self, h):
        return 2 * h if self.training else h


class Noisy(nn.Module):
    """A module of a user's own that says that it draws random numbers."""

    stochastic = True

    def forward(self, h):
        return 2 * h if self.training else h


def _net(place: str, layer) -> lf.TransferNet:
    net = small_net(3)
    if place == "head":
        net.heads["a"].insert(1, layer())
    else:
        for stages in (net.shared, net.specific["a"]):
            stages[1].insert({"start": 0, "middle": 1, "end": 2}[place], layer())
    return net


def _without(net):
    return [layer for layer in net.modules() if isinstance(layer, (nn.Dropout, Noisy))]


class DoublingInPlace(Doubling):
    def forward(self, h):
        return h.mul_(2) if self.training else h.mul_(1)


@pytest.mark.parametrize(
    ("layer", "place"),
    [
        *itertools.product((Doubling, Noisy), ("start", "middle", "end", "head")),
        (lambda: DoublingInPlace(inplace=True), "middle"),
    ],
)
@pytest.mark.parametrize("backend", ["torch", "reference"])
@pytest.mark.parametrize("groups", [None, [1, 2], [3]])
def test_e_step_without_and_m_step_with_dropout(layer, place, backend, groups):
    net = _net(place, layer)
    space = lf.ConfigSpace(3, groups)
    x, y = batch()
    for noisy in _without(net):
        noisy.eval()
    e_step = brute_force(net, space.bits, x, y, "a")
    for noisy in _without(net):
        noisy.train()
    truth = brute_force(net, space.bits, x, y, "a", posterior=e_step.posterior)
    step = lf.LASEM(net, space, backend=backend)(x, y, "a")
    assert_equals(step.nll, e_step.nll, "nll of the E-step")
    assert_step_equals(net, step, truth._replace(log_likelihood=e_step.log_likelihood))
    assert all(noisy.training for noisy in _without(net))


@pytest.mark.parametrize("place", ["start", "middle", "end", "head"])
def test_the_trunk_before_the_first_dropout_runs_once(place):
    net = _net(place, Doubling)
    calls = dict.fromkeys(range(3), 0)
    for i in range(3):
        for stages in (net.shared, net.specific["a"]):
            conv = next(m for m in stages[i] if isinstance(m, nn.Conv2d))
            conv.register_forward_pre_hook(lambda *_, i=i: calls.update({i: calls[i] + 1}))
    lf.LASEM(net, backend="torch")(*batch(), "a")
    twice = {"start": (2, 4, 4), "middle": (2, 2, 4), "end": (2, 2, 4), "head": (2, 2, 2)}[place]
    # a hook makes the level call each branch on its own: two calls for one evaluation
    assert tuple(calls.values()) == twice


def test_real_dropout_draws_a_mask_of_its_own_for_every_leaf():
    net = small_net(2)
    net.heads["a"].insert(1, nn.Dropout(0.5))
    masks = []
    net.heads["a"][1].register_forward_hook(lambda m, args, out: masks.append((m.training, out)))
    lf.LASEM(net, backend="torch")(*batch(), "a")
    assert [training for training, _ in masks] == [False, True]
    rows = (masks[1][1] != 0).unflatten(0, (-1, 4))
    assert not torch.equal(rows[:, 0], rows[:, 1])


def test_evaluation_mode_runs_one_forward_without_noise():
    net = _net("middle", Doubling).eval()
    x, y = batch()
    truth = brute_force(net, lf.ConfigSpace(3).bits, x, y, "a")
    assert_step_equals(net, lf.LASEM(net, backend="torch").eval()(x, y, "a"), truth)


class OwnBatchNorm2d(nn.BatchNorm2d):
    """What a forward of somebody's own does is not known."""


@pytest.mark.parametrize(
    ("norm", "place"),
    [
        (lambda: nn.SyncBatchNorm(3), "shared"),
        (lambda: OwnBatchNorm2d(3, track_running_stats=False), "specific['a']"),
        (lambda: nn.InstanceNorm2d(3, track_running_stats=True), "shared"),
    ],
)
@pytest.mark.parametrize("backend", ["torch", "reference"])
def test_statistics_of_the_batch_are_refused_by_name(norm, place, backend):
    net = small_net(2)
    (net.shared if place == "shared" else net.specific["a"])[1].append(norm().double())
    em = lf.LASEM(net, backend=backend)
    with pytest.raises(ValueError, match=rf"got {re.escape(place)}.1.2 \(\w+Norm(2d)?\)"):
        em(*batch(), "a")


def test_frozen_batch_norm_is_an_ordinary_layer():
    net = small_net(2, extra=(lambda: nn.BatchNorm2d(3),))
    for layer in net.modules():
        if isinstance(layer, nn.BatchNorm2d):
            layer.running_mean.uniform_()
            layer.running_var.uniform_(1, 2)
            layer.eval()
    x, y = batch()
    truth = brute_force(net, lf.ConfigSpace(2).bits, x, y, "a")
    assert_step_equals(net, lf.LASEM(net, backend="torch")(x, y, "a"), truth)
