"""ProgNN: lateral connections by their formula, old columns that never change."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from comparator_cases import add, conv_stages, head, same_bits, task, train, values
from torch import nn

from lasem_fast.comparators import ProgNN
from lasem_fast.initialisers import release_
from lasem_fast.optim import TFRMSprop


def _method(tasks="ab", **options):
    method = ProgNN(conv_stages(), **options)
    method.module.double()
    for name in tasks:
        add(method, task(name))
    return method


def _by_formula(method, x, tasks):
    """The logits of the last of `tasks`, written out."""
    hidden = []
    for t, name in enumerate(tasks):
        column = method.module.columns[name]
        first, second = column.stages
        h0 = F.relu(F.conv2d(x, first[0].weight, first[0].bias, padding=1))
        z = F.conv2d(h0, second[0].weight, second[0].bias, padding=1)
        for k in range(t):
            lateral = column.laterals[1][k]
            narrow = F.conv2d(lateral.alpha * hidden[k], lateral.narrow.weight, lateral.narrow.bias)
            z = z + F.conv2d(F.relu(narrow), lateral.widen.weight, padding=1)
        hidden.append(h0)
        h1 = F.max_pool2d(F.relu(z), 2)
    linear = method.module.heads[tasks[-1]][-1]
    return F.linear(h1.flatten(1), linear.weight, linear.bias)


@pytest.mark.parametrize("tasks", ["a", "ab", "abc"])
def test_logits_are_the_formula_s(tasks):
    method = _method(tasks)
    x = task().train[0]
    expected = _by_formula(method, x, tasks)
    torch.testing.assert_close(method.logits(x, tasks[-1]), expected, rtol=1e-12, atol=1e-12)


def test_a_lateral_connection_by_hand():
    stages = [nn.Sequential(nn.Linear(1, 1), nn.ReLU()), nn.Sequential(nn.Linear(1, 1), nn.ReLU())]
    method = ProgNN(stages)
    for name in "ab":
        method.add_task(task(name), nn.Linear(1, 1))
    net = method.module
    with torch.no_grad():
        for p in net.parameters():
            p.fill_(1.0)
        lateral = net.columns["b"].laterals[1][0]
        lateral.alpha.fill_(3.0)
        lateral.narrow.weight.fill_(2.0)
        lateral.widen.weight.fill_(-0.5)
    # column a: 5 -> 6 -> 7; column b: 6, then 6 + 1 - 0.5 relu(2 * 3 * 6 + 1) = -11.5, cut at 0
    x = torch.tensor([[5.0]])
    assert method.logits(x, "a").item() == 8.0
    assert method.logits(x, "b").item() == 1.0
    with torch.no_grad():
        lateral.widen.weight.fill_(0.5)
    assert method.logits(x, "b").item() == 6 + 1 + 0.5 * 37 + 1


@pytest.mark.parametrize(("scale", "widths"), [(1.0, [4, 2]), (2.0, [2, 1]), (100.0, [1, 1])])
def test_widths_kernels_and_initial_values(scale, widths):
    torch.manual_seed(0)
    method = ProgNN(conv_stages((2, 8, 16)), scale=scale, init=release_)
    for i, name in enumerate("abc"):
        parameters = method.add_task(task(name), head(16 * 9))
        column = method.module.columns[name]
        assert len(column.laterals[0]) == 0 and len(column.laterals[1]) == i
        own = [p for part in (column, method.module.heads[name]) for p in part.parameters()]
        assert {id(p) for p in parameters} == {id(p) for p in own}
        for lateral in column.laterals[1]:
            width = max(1, int(8 / (scale * (i + 1))))
            assert lateral.narrow.weight.shape == (width, 8, 1, 1)
            assert lateral.widen.weight.shape == (16, width, 3, 3) and lateral.widen.bias is None
            assert bool((lateral.narrow.bias == 0.2).all())
            assert all(0 < float(p.detach().abs().max()) <= 0.1 for p in
                       (lateral.alpha, lateral.narrow.weight, lateral.widen.weight))  # fmt: skip
        if i:
            assert bool((column.stages[0][0].bias == 0.2).all())
            assert column.laterals[1][0].narrow.out_channels == widths[i - 1]


def test_one_step_of_the_release_s_optimiser():
    method = _method()
    method.end_task(task("a"))
    t = task("b")
    parameters = [p for p in method.module.parameters() if p.requires_grad]
    before = [p.detach().clone() for p in parameters]
    x, y = t.train
    loss = F.cross_entropy(_by_formula(method, x, "ab"), y)
    gradients = torch.autograd.grad(loss, parameters)
    step = method.step(x, y, "b", TFRMSprop(parameters, lr=0.1))
    assert float(step.loss) == pytest.approx(loss.item(), rel=1e-12) and step.posterior is None
    for p, old, g in zip(parameters, before, gradients, strict=True):
        new = old - 0.1 * g / (0.9 + 0.1 * g * g + 1e-10).sqrt()
        torch.testing.assert_close(p.detach(), new, rtol=1e-11, atol=1e-13)


def test_old_columns_and_old_logits_never_change():
    torch.manual_seed(1)
    method, x = _method(""), task().test[0]
    left, logits = {}, {}
    for i, name in enumerate("abc"):
        parameters = add(method, task(name, seed=i), dropout=0.5)
        train(method, task(name, seed=i), torch.optim.SGD(parameters, lr=0.1, weight_decay=0.1))
        method.end_task(task(name))
        method.module.eval()
        for old in left:
            assert same_bits(values(method.module.columns[old]), left[old])
            assert torch.equal(method.logits(x, old), logits[old])
        left[name] = values(method.module.columns[name])
        logits[name] = method.logits(x, name)
        method.module.train()
        assert not any(p.requires_grad for p in method.module.parameters())
        assert not any(m.training for m in method.module.columns[name].modules())
    assert method.config("a") is None and method.prior("a") == [] and method.labels == []
    assert method.kept_parameters() == sum(p.numel() for p in method.module.parameters())


def test_same_seed_same_weights():
    def run():
        torch.manual_seed(4)
        method = _method("")
        for name in "ab":
            parameters = add(method, task(name), dropout=0.5)
            train(method, task(name), torch.optim.Adam(parameters, lr=0.01))
            method.end_task(task(name))
        return values(method.module)

    assert same_bits(run(), run())


def test_a_run_that_is_resumed_in_its_second_task_is_the_uninterrupted_one():
    def started():
        method = _method("")
        train(method, task("a"), torch.optim.SGD(add(method, task("a")), lr=0.1))
        method.end_task(task("a"))
        parameters = add(method, task("b"))
        optimizer = torch.optim.SGD(parameters, lr=0.1, momentum=0.9)
        train(method, task("b"), optimizer)
        return method, optimizer

    method, optimizer = started()
    saved, saved_steps = copy.deepcopy((method.module.state_dict(), optimizer.state_dict()))
    train(method, task("b", 1), optimizer)
    fresh = _method("")
    add(fresh, task("a"))
    parameters = add(fresh, task("b"))
    fresh.module.load_state_dict(saved)
    again = torch.optim.SGD(parameters, lr=0.1, momentum=0.9)
    again.load_state_dict(saved_steps)
    assert not any(p.requires_grad for p in fresh.module.columns["a"].parameters())
    train(fresh, task("b", 1), again)
    assert same_bits(values(fresh.module), values(method.module))


@pytest.mark.parametrize("init", [None, release_, lambda stage: nn.init.ones_(stage[0].weight)])
def test_further_columns_are_frozen_where_the_stages_were_given_so(init):
    def started(ended):
        stages = conv_stages()
        stages[0][0].bias.requires_grad_(False)
        stages[1].requires_grad_(False)
        method = ProgNN(stages, init=init)
        add(method, task("a"))
        if ended:
            method.end_task(task("a"))
        parameters = add(method, task("b"))
        return [p.shape for p in parameters], method.module.columns["b"].stages

    (shapes, stages), (resumed, _) = started(ended=True), started(ended=False)
    assert shapes == resumed
    assert stages[0][0].bias.requires_grad == (init is None)
    assert stages[0][0].weight.requires_grad and stages[1][0].bias.requires_grad


def test_bad_arguments_are_refused_in_words():
    with pytest.raises(ValueError, match="scale: expected a finite number above 0"):
        ProgNN(conv_stages(), scale=0)
    with pytest.raises(ValueError, match=r"stages\[0\]: expected one convolution"):
        ProgNN([nn.Sequential(nn.Conv2d(2, 2, 3), nn.BatchNorm2d(2))])
    with pytest.raises(TypeError, match="init: expected a function"):
        ProgNN(conv_stages(), init=3)
    method = _method("ab")
    x, y = task().train
    optimizer = torch.optim.SGD(method.module.parameters(), lr=0.1)
    with pytest.raises(ValueError, match="expected a new name, got 'a'"):
        add(method, task("a"))
    with pytest.raises(ValueError, match=r"task: expected one of \['a', 'b'\], got 'z'"):
        method.step(x, y, "z", optimizer)
    with pytest.raises(ValueError, match="predecessors have ended, got 'b' while"):
        method.step(x, y, "b", optimizer)
    method.end_task(task("a"))
    with pytest.raises(ValueError, match="has not ended, got 'a'"):
        method.step(x, y, "a", optimizer)
    with pytest.raises(ValueError, match="y: expected one target for each of the 8"):
        method.step(x, y[:3], "b", optimizer)
    other = _method("ac")
    state = values(other.module)
    with pytest.raises(ValueError, match=r"state_dict: expected the tasks \['a', 'c'\]"):
        other.module.load_state_dict(method.module.state_dict())
    assert same_bits(values(other.module), state)
