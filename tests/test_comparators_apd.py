"""APD-Net: masks, additions and the loss by their formula; the drift term off and on."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from comparator_cases import add, conv_stages, same_bits, task, train, values
from torch import nn

from lasem_fast.comparators import APDNet
from lasem_fast.optim import TFRMSprop


def _method(tasks="a", **options):
    method = APDNet(conv_stages(), **options)
    method.module.double()
    for name in tasks:
        add(method, task(name))
    return method


def _logits(method, x, name):
    net, h = method.module, x
    for i, stage in enumerate(net.shared):
        mask, tau = net.masks[name][i], net.additions[name][i]
        weight = stage[0].weight / (1 + torch.exp(-mask)) + tau
        h = F.relu(F.conv2d(h, weight, stage[0].bias, padding=1))
    linear = net.heads[name][-1]
    return F.linear(F.max_pool2d(h, 2).flatten(1), linear.weight, linear.bias)


def _loss(method, x, y, name, sparsity, drift, before):
    net = method.module
    log_p = _logits(method, x, name).log_softmax(1)
    loss = -log_p[torch.arange(len(y)), y].mean()
    loss = loss + sparsity * sum(t.abs().sum() / t.numel() for t in net.additions[name]) / 2
    moved = [((p - q) ** 2).sum() / (2 * p.numel()) for p, q in zip(net.shared.parameters(), before,
                                                                    strict=True)]  # fmt: skip
    return loss + drift * sum(moved) / len(moved)


def test_masks_and_additions_are_of_the_kernels_shape_and_drawn_as_the_release_draws_them():
    method = _method("ab")
    net = method.module
    for name in "ab":
        for kind in (net.masks[name], net.additions[name]):
            assert [tuple(t.shape) for t in kind] == [(4, 2, 3, 3), (4, 4, 3, 3)]
            assert all(0 < float(t.detach().abs().max()) <= 0.1 for t in kind)
    parameters = add(method, task("c"))
    parts = (net.shared, net.masks["c"], net.additions["c"], net.heads["c"])
    assert {id(p) for p in parameters} == {id(p) for part in parts for p in part.parameters()}


def test_a_weight_by_hand():
    method = APDNet([nn.Linear(1, 1, bias=False)])
    method.add_task(task("a"), nn.Identity())
    net = method.module
    with torch.no_grad():
        net.shared[0].weight.fill_(8.0)
        net.masks["a"][0].fill_(0.0)
        net.additions["a"][0].fill_(-1.0)
    assert method.logits(torch.tensor([[2.0]]), "a").item() == 2 * (8 * 0.5 - 1)


@pytest.mark.parametrize("name", ["a", "b"])
def test_logits_are_the_formula_s(name):
    method = _method("ab")
    x = task().train[0]
    torch.testing.assert_close(
        method.logits(x, name), _logits(method, x, name), rtol=1e-12, atol=1e-12
    )


@pytest.mark.parametrize("active", [False, True])
def test_one_step_of_the_release_s_optimiser(active):
    method = _method("a", drift_active=active)
    before = [p.detach().clone() for p in method.module.shared.parameters()]
    method.end_task(task("a"))
    t = task("b")
    parameters = add(method, t)
    with torch.no_grad():  # as if steps had been made
        for p in method.module.shared.parameters():
            p += 0.01 * torch.randn_like(p)
    start = [p.detach().clone() for p in parameters]
    x, y = t.train
    loss = _loss(method, x, y, "b", 4e-4, 100.0 if active else 0.0, before)
    gradients = torch.autograd.grad(loss, parameters)
    step = method.step(x, y, "b", TFRMSprop(parameters, lr=0.1))
    assert float(step.loss) == pytest.approx(float(loss.detach()), rel=1e-12)
    for p, old, g in zip(parameters, start, gradients, strict=True):
        new = old - 0.1 * g / (0.9 + 0.1 * g * g + 1e-10).sqrt()
        torch.testing.assert_close(p.detach(), new, rtol=1e-11, atol=1e-13)


def _run(**options):
    torch.manual_seed(2)
    method = _method("", **options)
    for i, name in enumerate("abc"):
        optimizer = torch.optim.SGD(add(method, task(name), dropout=0.5), lr=0.1)
        train(method, task(name, i), optimizer)
        method.end_task(task(name))
    return values(method.module)


def test_an_inert_drift_term_equals_none_bit_for_bit():
    inert = _run()
    assert same_bits(inert, _run(drift=0.0, drift_active=True))
    assert same_bits(inert, _run(drift=7.0))
    active = _run(drift_active=True)
    assert not same_bits(inert, active)
    moved = [(n, float((inert[n] - active[n]).abs().max())) for n in inert if "shared" in n]
    assert all(by > 0 for _, by in moved), moved


def test_the_first_task_has_no_drift_term():
    t = task("a")
    losses = []
    for active in (False, True):
        torch.manual_seed(3)
        method = _method("", drift_active=active)
        losses.append(train(method, t, torch.optim.SGD(add(method, t), lr=0.1)))
    assert losses[0] == losses[1]


@pytest.mark.parametrize("active", [False, True])
def test_tasks_that_are_added_up_front_are_trained_as_in_turn(active):
    def run(up_front):
        torch.manual_seed(0)
        method, parameters = _method("", drift_active=active), {}

        def enter(name):
            torch.manual_seed(ord(name))
            parameters[name] = add(method, task(name))

        for name in "abc" if up_front else "":
            enter(name)
        for i, name in enumerate("abc"):
            if not up_front:
                enter(name)
            train(method, task(name, i), torch.optim.SGD(parameters[name], lr=0.1))
            method.end_task(task(name))
        return values(method.module)

    assert same_bits(run(up_front=True), run(up_front=False))


def test_shared_weights_drift_and_the_rest_of_an_ended_task_stays():
    method = _method("a")
    method.end_task(task("a"))
    left = values(method.module)
    train(method, task("b"), torch.optim.SGD(add(method, task("b")), lr=0.1))
    for name, old in left.items():
        assert torch.equal(dict(method.module.named_parameters())[name], old) != (
            name.startswith("shared")
        )
    assert method.kept_parameters() == sum(p.numel() for p in method.module.parameters())
    assert method.config("a") is None and method.prior("b") == [] and method.labels == []


@pytest.mark.parametrize("active", [False, True])
def test_a_run_that_is_resumed_in_its_second_task_is_the_uninterrupted_one(active):
    method = _method("", drift_active=active)
    train(method, task("a"), torch.optim.SGD(add(method, task("a")), lr=0.1))
    method.end_task(task("a"))
    optimizer = torch.optim.SGD(add(method, task("b")), lr=0.1)
    train(method, task("b"), optimizer)
    saved = copy.deepcopy(method.module.state_dict())
    fresh = _method("", drift_active=active)
    add(fresh, task("a"))
    again = torch.optim.SGD(add(fresh, task("b")), lr=0.1)
    fresh.module.load_state_dict(saved)
    train(method, task("b", 1), optimizer)
    train(fresh, task("b", 1), again)
    assert same_bits(values(fresh.module), values(method.module))
    for each in (method, fresh):
        each.end_task(task("b"))
    late = _method("ab", drift_active=active)
    late.module.load_state_dict(method.module.state_dict())
    assert same_bits(values(late.module), values(method.module))


def test_bad_arguments_are_refused_in_words():
    for name in ("sparsity", "drift"):
        with pytest.raises(ValueError, match=f"{name}: expected a finite number of at least 0"):
            APDNet(conv_stages(), drift_active=True, **{name: -1.0})
    with pytest.raises(TypeError, match="drift_active: expected True or False, got int"):
        APDNet(conv_stages(), drift_active=1)
    with pytest.raises(ValueError, match="stages: expected at least one"):
        APDNet([])
    method = _method("a")
    x, y = task().train
    optimizer = torch.optim.SGD(method.module.parameters(), lr=0.1)
    with pytest.raises(TypeError, match=r"head: expected an nn\.Module, got int"):
        method.add_task(task("b"), 3)
    with pytest.raises(ValueError, match="y: expected one target for each"):
        method.step(x, y[:2], "a", optimizer)
    assert method.module.tasks == ("a",)
