"""The tree in parts equals brute force in float64, wherever it is cut."""

from __future__ import annotations

import random

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from nets import batch, cases, small_net
from oracle import assert_equals, brute_force
from row_lists import PLAIN
from torch import nn

import lasem_fast as lf
from lasem_fast.backends.operations import Operations
from lasem_fast.levels.plan import Plan
from lasem_fast.networks.network import Network
from lasem_fast.tree import fused_stage, lowering
from lasem_fast.tree.bounded import BoundedTree
from lasem_fast.tree.budget import Cut


def _check(net, space, x, y, operations, cut, weighs=None):
    """Log-likelihoods, and the gradients of the posterior-weighted loss of some configurations."""
    tree = BoundedTree(Plan.of_configs(space.configs), operations, 0)
    tree._cut = lambda *_: cut
    evaluation = tree.evaluate(Network(net.branches("a"), net.heads["a"], "a"), x, one_pass=False)
    truth = brute_force(net, space.bits, x, y, "a")
    picked = torch.arange(len(y))
    log_prob = evaluation.e_step.log_softmax(-1)[:, picked, y]
    assert_equals(log_prob.sum(1).detach(), truth.log_likelihood, "log_likelihood")
    posterior = truth.posterior
    if weighs is not None:
        posterior = torch.where(weighs, posterior, 0)
        truth = brute_force(net, space.bits, x, y, "a", posterior=posterior)
    part = evaluation.m_step(weighs)
    rows = list(range(len(space)) if part.configs is None else part.configs)
    nll = -part.logits.log_softmax(-1)[:, picked, y].mean(1)
    net.zero_grad()
    (posterior[rows] * nll).sum().backward()
    for name, parameter in net.named_parameters():
        grad = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
        assert_equals(grad, truth.grads[name], f"gradient of {name}")


@settings(max_examples=25)
@given(cases(max_depth=5), st.randoms(use_true_random=False))
@pytest.mark.parametrize("operations", [Operations(), PLAIN], ids=["PyTorch", "fused layers"])
def test_every_cut_equals_brute_force(operations, case, draw):
    plan = Plan.of_configs(case.space.configs)
    for stage in range(1, case.net.depth):
        rows = draw.choice([1, 2, 3, len(plan.levels[stage - 1])])
        weighs = None
        if draw.random() < 0.5:
            weighs = torch.tensor([draw.random() < 0.4 for _ in range(len(case.space))])
            weighs[draw.randrange(len(weighs))] = True
        _check(case.net, case.space, case.x, case.y, operations, Cut(stage, rows, 0), weighs)


@pytest.mark.parametrize("operations", [Operations(), PLAIN], ids=["PyTorch", "fused layers"])
@pytest.mark.parametrize("kind", ["groups", "list"])
def test_cuts_across_skips(kind, operations):
    torch.manual_seed(0)
    architecture = lf.nets.residual17(4, width=0.05)
    net = architecture.net()
    net.add_task("a", architecture.head(3))
    net.double().eval()
    drawn = random.Random(1)
    lists = [[drawn.random() < 0.5 for _ in range(17)] for _ in range(5)]
    space = architecture.space() if kind == "groups" else lf.ConfigSpace.from_configs(lists)
    x, y = torch.randn(2, 3, 32, 32, dtype=torch.float64), torch.tensor([0, 2])
    for stage in range(1, 17, 3 if kind == "list" else 5):
        _check(net, space, x, y, operations, Cut(stage, 2, 0))


def test_a_stage_is_looked_into_once_a_pass_however_many_parts_there_are(monkeypatch):
    looked = []

    def common_program(modules):
        looked.append(modules[0])
        return lowering.common_program(modules)

    monkeypatch.setattr(fused_stage, "common_program", common_program)
    net = lf.TransferNet(nn.Sequential(nn.Linear(4, 4), nn.Dropout(0.5)) for _ in range(4))
    net.add_task("a", nn.Linear(4, 2))
    tree = BoundedTree(Plan.of_configs(lf.ConfigSpace(4).configs), PLAIN, 0)
    tree._cut = lambda *_: Cut(2, 1, 0)
    network = Network(net.branches("a"), net.heads["a"], "a")
    evaluation = tree.evaluate(network, torch.randn(3, 4), one_pass=False)
    evaluation.m_step(None).logits.sum().backward()
    below = [looked.count(net.shared[i]) for i in (2, 3)]
    assert below == [2, 2], "with the dropout off, and on: the backward's forward is that pass's"


def test_a_weight_that_is_changed_before_the_backward_is_an_error():
    em = lf.LASEM(small_net(3), max_memory=70_000)
    step = em(*batch(), "a")
    with torch.no_grad():
        em.net.shared[2][0].weight.add_(1)
    with pytest.raises(RuntimeError, match="before any weight is changed in place"):
        step.loss.backward()


@pytest.mark.parametrize("backend", ["torch", "auto", "reference"])
def test_a_pruned_search_within_a_budget_inside_a_transform(backend):
    em = lf.LASEM(small_net(2), backend=backend, prior="uniform", prune=0.5, max_memory=0.5)
    x, y = batch()
    leaf = x.clone().requires_grad_()
    (want,) = torch.autograd.grad(em(leaf, y, "a").loss, leaf)
    found = torch.func.grad(lambda x: em(x, y, "a").loss)(x)
    torch.testing.assert_close(found.detach(), want)


def test_a_budget_holds_in_every_mode():
    """Evaluation needs less, so that its cut would not do for training."""
    em = lf.LASEM(small_net(3, extra=(lambda: nn.BatchNorm2d(3),)), max_memory=90_000)
    x, y = batch()
    em.eval()
    em(x, y, "a")
    em.train()
    em(x, y, "a")
    calm, trained = em._search.everything._cuts.values()
    assert calm != trained
    other = lf.LASEM(em.net, max_memory=90_000)
    other(x, y, "a")
    assert [*other._search.everything._cuts.values()] == [trained]
