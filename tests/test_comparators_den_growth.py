"""DEN's growth: selection, new and useless units, splits, timestamps, resuming at any width."""

from __future__ import annotations

import copy
from itertools import pairwise

import pytest
import torch
from comparator_cases import add, conv_stages, same_bits, task, train, values
from den_cases import begin, den, linear_stages, retrained, sliced_logits
from torch import nn

from lasem_fast.comparators import DEN
from lasem_fast.comparators.den_growth import expand, remove_useless, select_units, split
from lasem_fast.lifelong.method import Phase


def _close(a, b):
    torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)


def test_units_are_selected_from_the_top():
    method = DEN(linear_stages(2, 3, 4))
    method.add_task(task("a"), nn.Linear(4, 2))
    net = method.module
    first, second, top = net.stages[0][0], net.stages[1][0], net.heads["a"]
    with torch.no_grad():
        for layer in (first, second, top):
            layer.weight.zero_()
        first.weight.fill_(1.0)
        top.weight[1, 2] = -0.5
        top.weight[0, 3] = 0.01
        second.weight[2, 0] = 1.0  # to unit 2, which the head uses
        second.weight[3, 1] = 1.0  # to unit 3
        second.weight[1, 2] = 1.0  # to a unit that the head does not use
    assert select_units(net, "a", 0.0) == [[0, 1], [2, 3]]
    assert select_units(net, "a", 0.1) == [[0], [2]]
    assert select_units(net, "a", 1.0) == [[], []]


def test_selected_features_of_a_flattened_channel_belong_together():
    stages = [conv_stages()[1], nn.Sequential(nn.Flatten(), nn.Linear(4 * 9, 5), nn.ReLU())]
    stages[0][0] = nn.Conv2d(2, 4, 3, padding=1)
    method = DEN(stages, expansion=2)
    method.add_task(task("a"), nn.Linear(5, 3))
    net = method.module
    with torch.no_grad():
        linear = net.stages[1][1]
        linear.weight.zero_()
        linear.weight[4, 2 * 9 + 5] = 1.0
        net.heads["a"].weight.zero_()
        net.heads["a"].weight[0, 4] = 1.0
    assert select_units(net, "a", 0.0) == [[2], [4]]
    x = task().train[0].float()
    before = method.logits(x, "a")
    method.end_task(task("a"))
    method.add_task(task("b"), nn.Linear(5, 3))
    expand(net, "b", 2)
    assert net.units == [6, 7] and linear.weight.shape == (7, 6 * 9)
    assert method.logits(x, "b").shape == (8, 3)
    torch.testing.assert_close(method.logits(x, "a"), before)


@pytest.mark.parametrize(("loss", "phase"), [(0.6, "expand"), (0.5, "drift"), (0.4, "drift")])
def test_the_net_expands_only_if_the_loss_is_above_the_threshold(loss, phase):
    method = den("ab", loss_threshold=0.5)
    retrained(method, loss)
    begin(method, "b", 3)
    assert method.module.phase == phase
    assert method.module.units == ([6, 6] if phase == "expand" else [4, 4])


def test_a_group_within_the_threshold_is_removed():
    method = den("ab", loss_threshold=0.0)
    net = method.module
    retrained(method, 1.0)
    begin(method, "b", 3)
    with torch.no_grad():
        net.stages[0][0].weight[4] = 0  # useless
        net.stages[0][0].bias[4] = 0
    kept = {n: p.detach().clone() for n, p in net.named_parameters()}
    identities = [id(p) for p in net.parameters()]
    x = task().test[0]
    logits, old_logits = method.logits(x, "b"), method.logits(x, "a")
    begin(method, "b", 4)
    assert net.phase == "drift" and net.units == [5, 6]
    assert torch.equal(net.stages[0][0].weight, kept["stages.0.0.weight"][[0, 1, 2, 3, 5]])
    assert torch.equal(net.stages[1][0].weight, kept["stages.1.0.weight"][:, [0, 1, 2, 3, 5]])
    assert identities == [id(p) for p in net.parameters()]
    _close(method.logits(x, "b"), logits)
    assert torch.equal(method.logits(x, "a"), old_logits)


def test_an_old_unit_is_never_removed():
    method = den("ab")
    net = method.module
    expand(net, "b", 2)
    with torch.no_grad():
        net.stages[0][0].weight[0] = 0
        net.stages[1][0].weight[4:] = 0
    remove_useless(net, "b", 0.0)
    assert net.units == [6, 4] and net.heads["b"][1].weight.shape == (3, 4 * 9)


def test_a_split_by_hand():
    method = DEN(linear_stages(1, 2, 1), expansion=1)
    method.add_task(task("a"), nn.Linear(1, 1))
    net = method.module
    with torch.no_grad():
        net.stages[0][0].weight.copy_(torch.tensor([[1.0], [2.0]]))
        net.stages[0][0].bias.copy_(torch.tensor([0.5, 0.25]))
        net.stages[1][0].weight.copy_(torch.tensor([[3.0, 4.0]]))
        net.stages[1][0].bias.zero_()
    method.end_task(task("a"))
    method.add_task(task("b"), nn.Linear(1, 1, bias=False))
    with torch.no_grad():
        net.stages[0][0].weight += torch.tensor([[0.04], [-0.5]])  # the second one drifts
        net.stages[0][0].bias += 1.0
        net.stages[1][0].weight += torch.tensor([[0.03, 0.03]])  # by 0.042
        net.heads["b"].weight.fill_(7.0)
    split(net, "b", 0.05, 10)
    assert net.units == [3, 1]
    expected = [([[1.04], [2.0], [1.5]], [1.5, 0.25, 1.25]), ([[3.03, 4.03, 4.03]], [0.0])]
    for stage, (weight, bias) in zip(net.stages, expected, strict=True):
        torch.testing.assert_close(stage[0].weight.detach(), torch.tensor(weight))
        torch.testing.assert_close(stage[0].bias.detach(), torch.tensor(bias))
    assert net.heads["b"].weight.tolist() == [[7.0]]


def test_where_every_unit_splits_the_old_task_is_restored_and_the_new_one_goes_on():
    torch.manual_seed(0)
    method = den("ab", split_threshold=0.0)
    net, x = method.module, task().test[0]
    old_logits, then = method.logits(x, "a"), values(net.stages)
    expand(net, "b", 2)
    with torch.no_grad():
        for p in net.stages.parameters():
            p += 0.1 * torch.randn_like(p)
    logits = method.logits(x, "b")
    split(net, "b", 0.0, 99)
    assert net.units == [10, 10]
    _close(method.logits(x, "b"), logits)
    assert torch.equal(method.logits(x, "a"), old_logits)
    for name, old in then.items():
        block = tuple(slice(0, n) for n in old.shape)
        assert torch.equal(dict(net.stages.named_parameters())[name][block], old)


def test_the_units_that_moved_most_are_split_first():
    method = den("ab")
    net = method.module
    with torch.no_grad():
        for unit, by in enumerate((0.2, 0.4, 0.1, 0.3)):
            net.stages[0][0].weight[unit, 0, 0, 0] += by
    now = net.stages[0][0].weight.detach().clone()
    split(net, "b", 0.15, 2)
    assert net.units == [6, 4]
    assert torch.equal(net.stages[0][0].weight[4:], now[[1, 3]])
    assert torch.equal(net.stages[0][0].weight[0], now[0])  # moved, but not among the first two


def _sequence(tasks, **options):
    torch.manual_seed(3)
    method = den("", loss_threshold=0.0, split_threshold=0.01, group_lasso=0.01, **options)
    for i, name in enumerate(tasks):
        optimizer = torch.optim.Adam(add(method, task(name), dropout=0.5), lr=0.05)
        train(method, task(name, i), optimizer, epochs=6)
        method.end_task(task(name))
    return method


def test_tasks_keep_their_stamps_while_the_net_grows():
    method = _sequence("abc")
    net = method.module.eval()
    stamps = [net.stamps[name] for name in "abc"]
    assert stamps[0] == [4, 4] and stamps[2] == net.units
    for older, younger in pairwise(stamps):
        assert all(a < b for a, b in zip(older, younger, strict=True))
    x = task().test[0]
    for name in "abc":
        _close(method.logits(x, name), sliced_logits(method, x, name, net.stamps[name]))
    old = method.logits(x, "a"), method.logits(x, "b")
    add(method, task("d"))
    expand(net, "d", 2)
    assert torch.equal(method.logits(x, "a"), old[0])
    assert torch.equal(method.logits(x, "b"), old[1])
    with torch.no_grad():  # what only task d uses
        net.stages[0][0].weight[stamps[2][0] :] = 9
        net.stages[1][0].weight[:, stamps[2][0] :] = 9
    assert torch.equal(method.logits(x, "b"), old[1])
    assert method.kept_parameters() == sum(p.numel() for p in net.parameters())
    assert method.config("a") is None and method.prior("a") == [] and method.labels == []


def test_same_seed_same_weights():
    assert same_bits(values(_sequence("abc").module), values(_sequence("abc").module))


def _constant(layer):
    for parameter in layer.parameters():
        nn.init.constant_(parameter, 0.1)


def _growing():
    torch.manual_seed(0)
    return den("", loss_threshold=0.0, split_threshold=0.01, group_lasso=0.01, init=_constant)


def _added(method, name):
    torch.manual_seed(ord(name))
    return torch.optim.SGD(add(method, task(name)), lr=0.1)


def test_tasks_that_are_added_up_front_are_trained_as_in_turn():
    ended = []
    for up_front in (True, False):
        method, x = _growing(), task().test[0]
        optimizers = {name: _added(method, name) for name in "abc"} if up_front else {}
        for i, name in enumerate("abc"):
            optimizer = optimizers[name] if up_front else _added(method, name)
            train(method, task(name, i), optimizer, epochs=6)
            for waiting in "abc"[i:] if up_front else "":
                assert method.logits(x, waiting).shape == (8, 3)
            method.end_task(task(name))
        ended.append(method.module)
    assert ended[0].stamps == ended[1].stamps and ended[0].units[0] > 4
    assert same_bits(values(ended[0]), values(ended[1]))


def test_a_run_is_resumed_while_a_task_waits():
    method = _growing()
    optimizers = {name: _added(method, name) for name in "abc"}
    for i, name in enumerate("ab"):
        train(method, task(name, i), optimizers[name], epochs=6)
        if name == "a":
            method.end_task(task(name))
    saved = copy.deepcopy(method.module.state_dict())
    fresh = _growing()
    again = {name: _added(fresh, name) for name in "abc"}
    fresh.module.load_state_dict(saved)
    for each, made in ((method, optimizers), (fresh, again)):
        each.end_task(task("b"))
        train(each, task("c", 2), made["c"], epochs=6)
        each.end_task(task("c"))
    assert fresh.module.stamps == method.module.stamps
    assert same_bits(values(fresh.module), values(method.module))


def test_an_initialiser_that_fails_at_the_end_leaves_the_task_open():
    def draw(layer):
        if fails:
            raise ArithmeticError("no such numbers")

    fails = False
    method = den("", loss_threshold=0.0, init=draw)
    optimizers = {name: _added(method, name) for name in "abc"}
    for i, name in enumerate("ab"):
        train(method, task(name, i), optimizers[name], epochs=6)
        before, stamps, fails = values(method.module), dict(method.module.stamps), name == "b"
        if name == "a":
            method.end_task(task(name))
    with pytest.raises(ArithmeticError):
        method.end_task(task("b"))
    assert same_bits(values(method.module), before) and method.module.stamps == stamps
    assert method.module.current == "b" and method.module.phase == "settle"
    fails = False
    method.end_task(task("b"))
    assert method.module.current == "c" and method.module.phase == "select"


@pytest.mark.parametrize("at", range(1, 6))
def test_a_run_that_is_resumed_in_any_phase_is_the_uninterrupted_one(at):
    def go(method, optimizer, epochs):
        for epoch in epochs:
            method.begin_epoch(t, Phase(epoch, 6))
            for i in range(3):
                rows = (torch.arange(4) + i) % 8
                method.step(t.train[0][rows], t.train[1][rows], "c", optimizer)

    t = task("c", 5)
    method = _sequence("ab")
    optimizer = torch.optim.Adam(add(method, t), lr=0.05)
    go(method, optimizer, range(1, at + 1))
    saved = copy.deepcopy((method.module.state_dict(), optimizer.state_dict()))
    fresh = den("", loss_threshold=0.0, split_threshold=0.01, group_lasso=0.01)
    for name in "ab":
        add(fresh, task(name), dropout=0.5)
    again = torch.optim.Adam(add(fresh, t), lr=0.05)
    fresh.module.load_state_dict(saved[0])
    again.load_state_dict(saved[1])
    for each, steps in ((method, optimizer), (fresh, again)):
        torch.manual_seed(7)
        go(each, steps, range(at + 1, 7))
        each.end_task(t)
    assert fresh.module.units == method.module.units
    assert fresh.module.stamps == method.module.stamps
    assert same_bits(values(fresh.module), values(method.module))


def test_a_state_that_is_refused_leaves_all_as_it_was():
    method, other = _sequence("ab"), den("ab")
    state = method.module.state_dict()
    before, units = values(other.module), other.module.units
    del state["stages.0.0.weight"]
    with pytest.raises(RuntimeError, match="Missing key"):
        other.module.load_state_dict(state)
    assert same_bits(values(other.module), before) and other.module.units == units
    assert other.module.stages[0][0].out_channels == 4
    other.logits(task().test[0], "a")


def test_what_an_initialiser_leaves_alone_is_zero():
    """And not whatever was in memory: this one draws weights, and no biases."""
    method = DEN(linear_stages(2, 3, 4), init=_draws_weights_alone)
    method.add_task(task("a"), nn.Linear(4, 2))
    layer = method.module.stages[0][0]
    before = values(layer)
    torch.use_deterministic_algorithms(True)  # fills what empty() returns with NaN
    try:
        expand(method.module, "a", 2)
    finally:
        torch.use_deterministic_algorithms(False)
    assert torch.equal(layer.bias, torch.cat([before["bias"], torch.zeros(2).double()]))
    assert bool(torch.isfinite(layer.weight).all())


def _draws_weights_alone(module):
    for layer in module.modules():
        if isinstance(layer, nn.Linear):
            nn.init.normal_(layer.weight)
