"""DARTS: the mixture and both optimisers by their formulae, first and second order, end of task."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from comparator_cases import add, conv_stages, task, train
from torch import nn
from torch.func import functional_call

from lasem_fast.comparators import DARTS
from lasem_fast.comparators.darts_gradients import first_order, second_order
from lasem_fast.optim import TFRMSprop


def _method(tasks="a", **options):
    method = DARTS(conv_stages(), **options)
    method.module.double()
    for name in tasks:
        add(method, task(name))
    return method


def _names(method, name="a"):
    """The weights in the release's order: shared stages, specific ones, head."""
    parameters = dict(method.module.named_parameters())
    parts = ("net.shared.", f"net.specific.task_{name}.", f"net.heads.task_{name}.")
    ordered = [n for part in parts for n in parameters if n.startswith(part)]
    return {n: parameters[n].detach().clone() for n in ordered}


def _loss(weights, selection, x, y, name="a"):
    """Cross-entropy of the mixture, from tensors alone."""
    h = x
    for i in range(2):
        shared, specific = (f"net.shared.{i}.0", f"net.specific.task_{name}.{i}.0")
        share = selection[i].exp() / selection[i].exp().sum()
        own = F.conv2d(h, weights[f"{specific}.weight"], weights[f"{specific}.bias"], padding=1)
        common = F.conv2d(h, weights[f"{shared}.weight"], weights[f"{shared}.bias"], padding=1)
        h = share[0] * own.relu() + share[1] * common.relu()
    head = f"net.heads.task_{name}.1"
    h = F.max_pool2d(h, 2).flatten(1)
    logits = F.linear(h, weights[f"{head}.weight"], weights[f"{head}.bias"])
    return F.cross_entropy(logits, y)


def _selected(method, name="a"):
    with torch.no_grad():
        weight = method.module.selections[name].weight
        weight.copy_(torch.tensor([[0.3, -0.2], [0.1, 0.4]]))
    return weight.detach().clone().requires_grad_()


def test_the_mixture_by_hand():
    method = DARTS([nn.Sequential(nn.Conv1d(1, 1, 1), nn.ReLU(), nn.MaxPool1d(2))])
    method.add_task(task(), nn.Flatten())
    net = method.module.net
    with torch.no_grad():
        for branch, weight in ((net.specific["a"][0], 1.0), (net.shared[0], -1.0)):
            branch[0].weight.fill_(weight)
            branch[0].bias.fill_(0.0)
        method.module.selections["a"].weight.copy_(torch.tensor([[0.0, 3.0]]).log().clamp(min=-99))
    x = torch.tensor([[[4.0, -8.0]]])
    # relu(specific) = 4, 0 and relu(shared) = 0, 8; weights 0 and 1
    assert method.module(x, "a").item() == 8.0
    with torch.no_grad():
        method.module.selections["a"].weight.zero_()
    assert method.module(x, "a").item() == 4.0  # max(0.5 * 4, 0.5 * 8), not 0.5 * (4 + 8)
    assert method.config("a") == (False,)  # a tie


def test_first_order_is_the_gradient_of_the_mixture():
    method = _method()
    selection, (x, y) = _selected(method), task().train
    expected = torch.autograd.grad(_loss(_names(method), selection, x, y), selection)[0]
    found = first_order(method.module, "a", (x, y))
    torch.testing.assert_close(found, expected, rtol=1e-11, atol=1e-14)


def _unrolled(weights, selection, batch, xi, create_graph=False):
    leaves = {n: w.clone().requires_grad_() for n, w in weights.items()}
    loss = _loss(leaves, selection, *batch)
    found = torch.autograd.grad(loss, list(leaves.values()), create_graph=create_graph)
    return {n: w - xi * g for (n, w), g in zip(leaves.items(), found, strict=True)}


def _by_difference(weights, selection, train_batch, batch, xi, difference):
    """The second order from its formula."""
    ahead = {n: w.detach().requires_grad_() for n, w in
             _unrolled(weights, selection, train_batch, xi).items()}  # fmt: skip
    loss = _loss(ahead, selection, *batch)
    direct, *g = torch.autograd.grad(loss, [selection, *ahead.values()])
    if difference == "paper":
        norm = sum((t * t).sum() for t in g).sqrt()
        steps, around = [0.01 / norm for _ in g], weights
    else:
        steps, around = [0.01 / (t * t).sum().sqrt() for t in g], ahead
    sides = []
    for sign in (1, -1):
        moved = {n: w.detach() + sign * s * t for (n, w), s, t in
                 zip(around.items(), steps, g, strict=True)}  # fmt: skip
        sides.append(torch.autograd.grad(_loss(moved, selection, *train_batch), selection)[0])
    rows = [direct[i] - xi * (sides[0][i] - sides[1][i]) / (2 * steps[i]) for i in range(2)]
    return torch.stack(rows)


@pytest.mark.parametrize("difference", ["paper", "release"])
@pytest.mark.parametrize("own_batch", [False, True])
def test_second_order_is_the_formula_s(difference, own_batch):
    method, t = _method(), task()
    selection, weights = _selected(method), _names(method)
    batch = t.valid if own_batch else t.train
    expected = _by_difference(weights, selection, t.train, batch, 0.3, difference)
    found = second_order(method.module, "a", t.train, batch, 0.3, difference)
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-12)


def _smooth(transfer):
    """tanh for ReLU and no pooling, so that differences converge to derivatives."""
    stages = conv_stages(pool=False)
    for stage in stages:
        stage[1] = nn.Tanh()
    method = DARTS(stages, transfer)
    method.module.double()
    add(method, task(), features=4 * 36)
    return method


@pytest.mark.parametrize("transfer", ["hps", "dfcnn"])
def test_second_order_of_the_paper_approaches_the_exact_gradient(monkeypatch, transfer):
    method, t = _smooth(transfer), task()
    selection = _selected(method)
    module, xi = method.module, 0.3

    def loss(weights, alpha, x, y):
        tensors = {**weights, "selections.task_a.weight": alpha}
        return F.cross_entropy(functional_call(module, tensors, (x, "a")), y)

    leaves = {n: w.detach().clone().requires_grad_() for n, w in module.weights("a").items()}
    inner = loss(leaves, selection, *t.train)
    gradients = torch.autograd.grad(inner, list(leaves.values()), create_graph=True)
    ahead = {n: w - xi * g for (n, w), g in zip(leaves.items(), gradients, strict=True)}
    exact = torch.autograd.grad(loss(ahead, selection, *t.valid), selection)[0]
    direct = first_order(module, "a", t.valid)
    errors = []
    for step in (1e-2, 1e-3):
        monkeypatch.setattr("lasem_fast.comparators.darts_gradients._STEP", step)
        found = second_order(module, "a", t.train, t.valid, xi, "paper")
        errors.append(float((found - exact).abs().max()))
    # a central difference: an error of the order of the step's square
    assert errors[1] < errors[0] / 50
    assert errors[0] < 0.01 * float((direct - exact).abs().max())


@pytest.mark.parametrize("order", [1, 2])
def test_one_step_of_both_optimisers(order):
    method, t = _method(order=order), task()
    selection, weights = _selected(method), _names(method)
    x, y = t.train
    parameters = list(method.module.weights("a").values())
    if order == 1:
        g = torch.autograd.grad(_loss(weights, selection, x, y), selection)[0]
    else:
        g = _by_difference(weights, selection, (x, y), (x, y), 0.1, "release")
    new_selection = (selection - 0.1 * g / (0.9 + 0.1 * g * g + 1e-10).sqrt()).detach()
    leaves = {n: w.requires_grad_() for n, w in weights.items()}
    loss = _loss(leaves, new_selection, x, y)  # after the selection's step
    found = torch.autograd.grad(loss, list(leaves.values()))
    step = method.step(x, y, "a", TFRMSprop(parameters, lr=0.1))
    assert float(step.loss) == pytest.approx(loss.item(), rel=1e-10) and step.posterior is None
    torch.testing.assert_close(
        method.module.selections["a"].weight.detach(), new_selection, rtol=1e-9, atol=1e-12
    )
    for (name, old), gw in zip(leaves.items(), found, strict=True):
        new = old - 0.1 * gw / (0.9 + 0.1 * gw * gw + 1e-10).sqrt()
        torch.testing.assert_close(
            dict(method.module.named_parameters())[name].detach(), new.detach(),
            rtol=1e-8, atol=1e-11,
        )  # fmt: skip


def test_the_selection_follows_the_learning_rate_unless_it_has_an_optimiser_of_its_own():
    x, y = task().train
    moved = []
    for make in (None, lambda params: torch.optim.SGD(params, lr=0.5)):
        method = _method(selection_optimizer=make)
        optimizer = torch.optim.SGD(method.module.weights("a").values(), lr=1.0)
        g = first_order(method.module, "a", (x, y))
        for group in optimizer.param_groups:
            group["lr"] = 0.25
        method.step(x, y, "a", optimizer)
        moved.append(method.module.selections["a"].weight.detach() / g)
    torch.testing.assert_close(moved[0], torch.full((2, 2), -0.25, dtype=torch.float64))
    torch.testing.assert_close(moved[1], torch.full((2, 2), -0.5, dtype=torch.float64))


def test_selections_on_validation_samples():
    method, t = _method(selection_batch="valid"), task()
    optimizer = torch.optim.SGD(method.module.weights("a").values(), lr=0.0)
    with pytest.raises(ValueError, match="begin_epoch to have been called for task 'a'"):
        method.step(*t.train, "a", optimizer)
    g = first_order(method.module, "a", t.valid)  # as many samples as there are: all of them
    optimizer.param_groups[0]["lr"] = 1.0
    train(method, t, optimizer, steps=1, samples=8)
    found = method.module.selections["a"].weight.detach()
    torch.testing.assert_close(found, -g, rtol=1e-10, atol=1e-13)


def test_tf_adds_its_auxiliary_term_by_the_share():
    method = _method(transfer="tf")
    net = method.module.net
    _selected(method)
    shares = method.module.selections["a"].weight.detach().softmax(1)[:, 1]
    term = sum(s * t for s, t in zip(shares, net.auxiliary_losses("a"), strict=True))
    x, y = task().train
    optimizer = torch.optim.SGD(method.module.weights("a").values(), lr=0.0)
    expected = F.cross_entropy(method.module(x, "a"), y) + term
    assert float(method.step(x, y, "a", optimizer).loss) == pytest.approx(expected.item())


def test_a_branch_that_writes_to_its_input_does_not_disturb_the_other():
    stages = [nn.ELU(inplace=True), nn.Sequential(nn.Flatten(), nn.Linear(3, 3))]
    method = DARTS(stages)
    method.add_task(task(), nn.Linear(3, 2))
    x = torch.tensor([[-1.0, -2.0, 3.0]])
    found, net = method.module(x.clone(), "a"), method.module.net
    h = torch.nn.functional.elu(x)
    h = (net.specific["a"][1](h) + net.shared[1](h)) / 2
    torch.testing.assert_close(found, net.heads["a"](h))


def test_bad_arguments_are_refused_in_words():
    for name, bad in (("order", 3), ("order", True), ("difference", "exact"),
                      ("selection_batch", "test")):  # fmt: skip
        with pytest.raises(ValueError, match=f"{name}: expected one of"):
            DARTS(conv_stages(), **{name: bad})
    with pytest.raises(ValueError, match="xi: expected a finite number of at least 0"):
        DARTS(conv_stages(), xi=-1.0)
    with pytest.raises(TypeError, match="selection_optimizer: expected a function"):
        DARTS(conv_stages(), selection_optimizer=3)
    with pytest.raises(TypeError, match="redraw_unclaimed: expected True or False"):
        DARTS(conv_stages(), redraw_unclaimed=None)
    with pytest.raises(ValueError, match="difference: expected 'paper' for 2 stages"):
        DARTS([nn.Linear(2, 2, bias=False), nn.ReLU()], order=2)
    method = _method()
    optimizer = torch.optim.SGD(method.module.parameters(), lr=0.1)
    x, y = task().train
    with pytest.raises(ValueError, match="task: expected one of"):
        method.step(x, y, "z", optimizer)
    method.end_task(task())
    with pytest.raises(ValueError, match="has not ended, got 'a'"):
        method.end_task(task())
