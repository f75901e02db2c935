"""DEN: each phase by its formula, growth and splits on constructed cases, timestamps, resuming."""

from __future__ import annotations

import copy
from itertools import pairwise

import pytest
import torch
import torch.nn.functional as F
from comparator_cases import add, conv_stages, same_bits, task, train, values
from torch import nn

from lasem_fast.comparators import DEN
from lasem_fast.comparators.den import PHASES
from lasem_fast.comparators.den_growth import expand, remove_useless, select_units, split
from lasem_fast.lifelong.method import Phase
from lasem_fast.optim import TFRMSprop

LR = 0.1


def _method(tasks="a", stages=None, **options):
    """The tasks but the last have ended."""
    method = DEN(stages or conv_stages(), **{"expansion": 2, **options})
    method.module.double()
    for name in tasks:
        if method.module.tasks:
            method.end_task(task(method.module.tasks[-1]))
        add(method, task(name))
    return method


def _begin(method, name, epoch, epochs=5):
    method.begin_epoch(task(name), Phase(epoch, epochs, 0))


def _logits(method, x, name, units):
    """From slices of the weights."""
    net, h = method.module, x
    m = 2
    for stage, n in zip(net.stages, units, strict=True):
        h = F.relu(F.conv2d(h, stage[0].weight[:n, :m], stage[0].bias[:n], padding=1))
        m = n
    linear = net.heads[name][-1]
    return F.linear(F.max_pool2d(h, 2).flatten(1), linear.weight, linear.bias)


def _soft(w, by):
    return torch.where(w > by, w - by, torch.where(w < -by, w + by, torch.zeros_like(w)))


def _rmsprop(p, g):
    return p - LR * g / (0.9 + 0.1 * g * g + 1e-10).sqrt()


def _step_by_formula(method, name, extra):
    """Parameters of the net and what one step of the optimiser makes of them, unmasked."""
    net = method.module
    x, y = task(name).train
    named = {n: p for n, p in net.named_parameters() if "heads" not in n or f"task_{name}" in n}
    loss = F.cross_entropy(_logits(method, x, name, net.units), y)
    found = torch.autograd.grad(loss + extra(named), list(named.values()))
    new = {n: _rmsprop(p, g).detach() for (n, p), g in zip(named.items(), found, strict=True)}
    old = {n: p.detach().clone() for n, p in named.items()}
    step = method.step(x, y, name, TFRMSprop(list(named.values()), lr=LR))
    assert float(step.loss) == pytest.approx(loss.item(), rel=1e-12) and step.posterior is None
    return old, new, {n: p.detach() for n, p in named.items()}


def _close(a, b):
    torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)


HEAD = "heads.task_b.1.weight"


@pytest.mark.parametrize(("shrinkage", "scale"), [("objective", LR), ("per_step", 1.0)])
def test_the_first_task_shrinks_all_weights(shrinkage, scale):
    method = _method("a", l1=0.3, shrinkage=shrinkage)
    _, new, found = _step_by_formula(method, "a", lambda named: 0.0)
    for name in new:
        expected = _soft(new[name], scale * 0.3) if new[name].dim() > 1 else new[name]
        _close(found[name], expected)
    assert any(bool((found[n] == 0).any()) for n in found)


def test_selecting_trains_the_head_alone():
    method = _method("ab", l1=0.3)
    _begin(method, "b", 1)
    old, new, found = _step_by_formula(method, "b", lambda named: 0.0)
    for name in new:
        if name == HEAD:
            _close(found[name], _soft(new[name], LR * 0.3))
        elif "heads" in name:
            _close(found[name], new[name])
        else:
            assert torch.equal(found[name], old[name])


def _linear(*sizes):
    return [nn.Sequential(nn.Linear(a, b), nn.ReLU()) for a, b in pairwise(sizes)]


def test_units_are_selected_from_the_top():
    method = DEN(_linear(2, 3, 4))
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


def test_retraining_moves_the_selected_subnetwork():
    method = _method("ab", l2=0.2)
    net = method.module
    with torch.no_grad():
        net.heads["b"][1].weight[:, :9] = 0  # unit 0 of the last stage is not used
        net.stages[1][0].weight[1:, 3] = 0  # and unit 3 below feeds only that one
    _begin(method, "b", 2)
    assert net.selected == [[0, 1, 2], [1, 2, 3]] and net.phase == "retrain"
    masks = {name: torch.ones_like(p) for name, p in net.named_parameters()}
    masks["stages.0.0.weight"][3] = masks["stages.0.0.bias"][3] = 0
    masks["stages.1.0.weight"][0] = masks["stages.1.0.bias"][0] = 0
    masks["stages.1.0.weight"][:, 3] = 0
    masks[HEAD][:, :9] = 0

    def extra(named):
        squares = [(masks[n] * p).square().sum() for n, p in named.items() if p.dim() > 1]
        return 0.2 / 2 * sum(squares)

    old, new, found = _step_by_formula(method, "b", extra)
    for name in new:
        _close(found[name], torch.where(masks[name] > 0, new[name], old[name]))
        assert torch.equal(found[name][masks[name] == 0], old[name][masks[name] == 0])


def _retrained(method, loss):
    """The task b at the end of retraining with this mean loss."""
    for epoch in (1, 2):
        _begin(method, "b", epoch)
    method.module.loss_sum += 3 * loss
    method.module.batches += 3


@pytest.mark.parametrize(("loss", "phase"), [(0.6, "expand"), (0.5, "drift"), (0.4, "drift")])
def test_the_net_expands_only_if_the_loss_is_above_the_threshold(loss, phase):
    method = _method("ab", loss_threshold=0.5)
    _retrained(method, loss)
    _begin(method, "b", 3)
    assert method.module.phase == phase
    assert method.module.units == ([6, 6] if phase == "expand" else [4, 4])


def test_expanding_trains_new_weights_with_both_penalties():
    torch.manual_seed(1)
    method = _method("ab", loss_threshold=0.0, l1=0.02, group_lasso=0.6)
    net = method.module
    x = task().test[0]
    old_logits = method.logits(x, "a")  # with its graph, which must not stand in the way
    before = values(net)
    _retrained(method, 1.0)
    _begin(method, "b", 3)
    assert net.stages[0][0].weight.shape == (6, 2, 3, 3) and net.stages[0][0].out_channels == 6
    assert net.stages[1][0].weight.shape == (6, 6, 3, 3) and net.stages[1][0].in_channels == 6
    assert net.heads["b"][1].weight.shape == (3, 6 * 9)
    assert net.heads["a"][1].weight.shape == (3, 4 * 9)
    assert torch.equal(net.stages[1][0].weight[:4, :4], before["stages.1.0.weight"])
    assert torch.equal(net.heads["b"][1].weight[:, : 4 * 9], before[HEAD])
    assert torch.equal(method.logits(x, "a"), old_logits)
    masks = {name: torch.zeros_like(p) for name, p in net.named_parameters()}
    for name in ("stages.0.0.weight", "stages.0.0.bias", "stages.1.0.weight", "stages.1.0.bias"):
        masks[name][4:] = 1
    masks["stages.1.0.weight"][:, 4:] = 1
    masks[HEAD][:, 4 * 9 :] = 1
    old, new, found = _step_by_formula(method, "b", lambda named: 0.0)
    for name in new:
        expected = _soft(new[name], LR * 0.02) if new[name].dim() > 1 else new[name]
        if name.startswith("stages") and expected.dim() > 1:
            for unit in (4, 5):
                norm = expected[unit].square().sum().sqrt()
                expected[unit] *= max(0.0, 1 - LR * 0.6 / float(norm))
        _close(found[name], torch.where(masks[name] > 0, expected, old[name]))
        assert torch.equal(found[name][masks[name] == 0], old[name][masks[name] == 0])
    assert torch.equal(method.logits(x, "a"), old_logits)


def test_a_group_within_the_threshold_is_removed():
    method = _method("ab", loss_threshold=0.0)
    net = method.module
    _retrained(method, 1.0)
    _begin(method, "b", 3)
    with torch.no_grad():
        net.stages[0][0].weight[4] = 0  # useless
        net.stages[0][0].bias[4] = 0
    kept = {n: p.detach().clone() for n, p in net.named_parameters()}
    identities = [id(p) for p in net.parameters()]
    x = task().test[0]
    logits, old_logits = method.logits(x, "b"), method.logits(x, "a")
    _begin(method, "b", 4)
    assert net.phase == "drift" and net.units == [5, 6]
    assert torch.equal(net.stages[0][0].weight, kept["stages.0.0.weight"][[0, 1, 2, 3, 5]])
    assert torch.equal(net.stages[1][0].weight, kept["stages.1.0.weight"][:, [0, 1, 2, 3, 5]])
    assert identities == [id(p) for p in net.parameters()]
    _close(method.logits(x, "b"), logits)
    assert torch.equal(method.logits(x, "a"), old_logits)


def test_an_old_unit_is_never_removed():
    method = _method("ab")
    net = method.module
    expand(net, "b", 2)
    with torch.no_grad():
        net.stages[0][0].weight[0] = 0
        net.stages[1][0].weight[4:] = 0
    remove_useless(net, "b", 0.0)
    assert net.units == [6, 4] and net.heads["b"][1].weight.shape == (3, 4 * 9)


@pytest.mark.parametrize("phase", ["drift", "settle"])
def test_drift_and_settling_hold_weights_to_their_old_values(phase):
    method = _method("ab", regularization=0.7, split_threshold=1e9)
    net = method.module
    then = values(net.stages)
    expand(net, "b", 2)
    net.set_phase(phase)
    with torch.no_grad():
        for p in net.stages.parameters():
            p += 0.1 * torch.randn_like(p)

    def extra(named):
        moved = 0.0
        for name, old in then.items():
            block = tuple(slice(0, n) for n in old.shape)
            moved = moved + (named[f"stages.{name}"][block] - old).square().sum()
        return 0.7 / 2 * moved

    _, new, found = _step_by_formula(method, "b", extra)
    for name in new:
        _close(found[name], new[name])


def test_a_split_by_hand():
    method = DEN(_linear(1, 2, 1), expansion=1)
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
    method = _method("ab", split_threshold=0.0)
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
    method = _method("ab")
    net = method.module
    with torch.no_grad():
        for unit, by in enumerate((0.2, 0.4, 0.1, 0.3)):
            net.stages[0][0].weight[unit, 0, 0, 0] += by
    now = net.stages[0][0].weight.detach().clone()
    split(net, "b", 0.15, 2)
    assert net.units == [6, 4]
    assert torch.equal(net.stages[0][0].weight[4:], now[[1, 3]])
    assert torch.equal(net.stages[0][0].weight[0], now[0])  # moved, but not among the first two


def test_phases_of_a_task_and_their_epochs():
    method = _method("ab", phases=(1, 4, 2, 1, 2), loss_threshold=0.0)
    seen = []
    for epoch in range(1, 21):
        method.begin_epoch(task("b"), Phase(epoch, 20, 0))
        method.module.batches += 1
        method.module.loss_sum += 1
        seen.append(method.module.phase)
    assert [seen.count(phase) for phase in PHASES] == [2, 8, 4, 2, 4]
    for epochs in (5, 6, 7, 50):
        method = _method("ab", phases=(0.001, 1, 0.001, 0.001, 0.001), loss_threshold=0.0)
        seen = []
        for epoch in range(1, epochs + 1):
            method.begin_epoch(task("b"), Phase(epoch, epochs, 0))
            method.module.loss_sum += 1
            method.module.batches += 1
            seen.append(method.module.phase)
        assert [seen.count(phase) for phase in PHASES] == [1, epochs - 4, 1, 1, 1]


def test_the_optimiser_begins_anew_in_every_phase():
    method = _method("ab")
    optimizer = torch.optim.Adam(method.module.parameters(), lr=0.01)
    for epoch in range(1, 6):
        _begin(method, "b", epoch)
        x, y = task("b").train
        for steps in (1, 2):
            method.step(x, y, "b", optimizer)
            assert max(int(s["step"]) for s in optimizer.state.values()) == steps


def _sequence(tasks, **options):
    torch.manual_seed(3)
    method = _method("", loss_threshold=0.0, split_threshold=0.01, group_lasso=0.01, **options)
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
        _close(method.logits(x, name), _logits(method, x, name, net.stamps[name]))
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


@pytest.mark.parametrize("at", range(1, 6))
def test_a_run_that_is_resumed_in_any_phase_is_the_uninterrupted_one(at):
    def go(method, optimizer, epochs):
        for epoch in epochs:
            method.begin_epoch(t, Phase(epoch, 6, 0))
            for i in range(3):
                rows = (torch.arange(4) + i) % 8
                method.step(t.train[0][rows], t.train[1][rows], "c", optimizer)

    t = task("c", 5)
    method = _sequence("ab")
    optimizer = torch.optim.Adam(add(method, t), lr=0.05)
    go(method, optimizer, range(1, at + 1))
    saved = copy.deepcopy((method.module.state_dict(), optimizer.state_dict()))
    fresh = _method("", loss_threshold=0.0, split_threshold=0.01, group_lasso=0.01)
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
    method, other = _sequence("ab"), _method("ab")
    state = method.module.state_dict()
    before, units = values(other.module), other.module.units
    del state["stages.0.0.weight"]
    with pytest.raises(RuntimeError, match="Missing key"):
        other.module.load_state_dict(state)
    assert same_bits(values(other.module), before) and other.module.units == units
    assert other.module.stages[0][0].out_channels == 4
    other.logits(task().test[0], "a")


def test_bad_arguments_are_refused_in_words():
    for name in ("l1", "l2", "group_lasso", "regularization", "loss_threshold", "zero",
                 "split_threshold"):  # fmt: skip
        with pytest.raises(ValueError, match=f"{name}: expected a finite number of at least 0"):
            DEN(conv_stages(), **{name: -1.0})
    with pytest.raises(ValueError, match="expansion: expected a whole number of at least 1"):
        DEN(conv_stages(), expansion=0)
    with pytest.raises(ValueError, match="phases: expected 5 lengths"):
        DEN(conv_stages(), phases=(1, 2))
    with pytest.raises(ValueError, match="phases: expected a finite number above 0"):
        DEN(conv_stages(), phases=(1, 2, 0, 1, 1))
    with pytest.raises(ValueError, match="shrinkage: expected 'objective' or 'per_step'"):
        DEN(conv_stages(), shrinkage="none")
    with pytest.raises(ValueError, match=r"stages\[0\]: expected one convolution"):
        DEN([nn.Conv2d(2, 2, 3, groups=2)])
    with pytest.raises(ValueError, match=r"stages\[1\]: expected a layer that takes the 3 units"):
        DEN([nn.Conv2d(2, 3, 3), nn.Conv2d(4, 4, 3)])
    method = _method("a")
    for bad in (nn.Conv2d(4, 3, 1), nn.Linear(5, 3), nn.Identity(),
                nn.Sequential(nn.GroupNorm(1, 4), nn.Linear(4, 3))):  # fmt: skip
        with pytest.raises(ValueError, match="head: expected its first layer with parameters"):
            method.add_task(task("b"), bad)
    assert method.module.tasks == ("a",) and method.module.phase == "first"
    method.end_task(task("a"))
    add(method, task("b"))
    with pytest.raises(ValueError, match="epochs: expected at least 5, one for each"):
        _begin(method, "b", 1, epochs=4)
    x, y = task().train
    with pytest.raises(ValueError, match="has not ended, got 'a'"):
        method.step(x, y, "a", torch.optim.SGD(method.module.parameters(), lr=0.1))
