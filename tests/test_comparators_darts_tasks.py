"""DARTS over tasks: what the end of one keeps and takes back, resuming, the seed."""

from __future__ import annotations

import copy

import pytest
import torch
from comparator_cases import add, conv_stages, same_bits, task, train, values

from lasem_fast.comparators import DARTS


def _method(tasks="a", **options):
    method = DARTS(conv_stages(), **options)
    method.module.double()
    for name in tasks:
        add(method, task(name))
    return method


@pytest.mark.parametrize("transfer", ["hps", "dfcnn", "tf"])
def test_the_end_keeps_the_larger_selections_and_rolls_back(transfer):
    method = _method("", transfer=transfer, redraw_unclaimed=False)
    parameters = add(method, task())
    net = method.module.net
    before = [values(stage) for stage in net.shared]
    with torch.no_grad():
        method.module.selections["a"].weight.copy_(torch.tensor([[2.0, 0.0], [0.0, 2.0]]))
    train(method, task(), torch.optim.SGD(parameters, lr=0.05))
    after = [values(stage) for stage in net.shared]
    assert method.config("a") == (False, True)
    x = task().test[0]
    logits = method.logits(x, "a")
    assert torch.equal(logits, net(x, "a", config=[False, True]))
    assert method.end_task(task()) == (False, True) == net.config("a")
    assert all(not same_bits(old, new) for old, new in zip(before, after, strict=True))
    assert same_bits(values(net.shared[0]), before[0])
    assert same_bits(values(net.shared[1]), after[1])
    assert torch.equal(method.logits(x, "a"), logits)
    assert method.kept_parameters() == sum(p.numel() for p in net.task_parameters("a"))
    # a task that comes back trains what it kept
    used = net.task_parameters("a")
    train(method, task(), torch.optim.SGD(used, lr=0.05))
    assert same_bits(values(net.shared[0]), before[0])
    assert not same_bits(values(net.shared[1]), after[1])
    assert method.labels == [] and method.prior("a") == []


def test_unclaimed_stages_are_drawn_anew():
    method = _method("a")
    before = values(method.module.net.shared)
    assert method.end_task(task()) == (False, False)
    after = values(method.module.net.shared)
    assert all(not torch.equal(before[n], after[n]) for n in before)


@pytest.mark.parametrize("options", [{}, {"order": 2}, {"selection_batch": "valid"}])
def test_a_run_that_is_resumed_in_its_second_task_is_the_uninterrupted_one(options):
    def make(params):
        return torch.optim.Adam(params, lr=0.01)

    method = _method("", **options)
    train(method, task("a"), make(add(method, task("a"))))
    method.end_task(task("a"))
    optimizer = make(add(method, task("b")))
    train(method, task("b"), optimizer)
    saved = copy.deepcopy((method.module.state_dict(), optimizer.state_dict()))
    fresh = _method("", **options)
    add(fresh, task("a"))
    again = make(add(fresh, task("b")))
    fresh.module.load_state_dict(saved[0])
    again.load_state_dict(saved[1])
    for each, steps in ((method, optimizer), (fresh, again)):
        torch.manual_seed(1)
        train(each, task("b", 1), steps)
        selection = values(each.module.selections)
        each.end_task(task("b"))
        each.selection = selection
    assert same_bits(fresh.selection, method.selection)
    assert same_bits(values(fresh.module), values(method.module))


def test_same_seed_same_weights():
    def run():
        torch.manual_seed(4)
        method = _method("", order=2, difference="paper", selection_batch="valid")
        for name in "ab":
            parameters = add(method, task(name), dropout=0.5)
            train(method, task(name), torch.optim.Adam(parameters, lr=0.01))
            method.end_task(task(name))
        return values(method.module)

    assert same_bits(run(), run())
