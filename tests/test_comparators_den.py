"""DEN's training: what each phase changes, by its formula; phases and epochs; arguments."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from comparator_cases import add, conv_stages, task, values
from den_cases import begin, den, retrained, sliced_logits
from torch import nn

from lasem_fast.comparators import DEN
from lasem_fast.comparators.den import PHASES
from lasem_fast.comparators.den_growth import expand
from lasem_fast.lifelong.method import Phase
from lasem_fast.optim import TFRMSprop

LR = 0.1


def _soft(w, by):
    return torch.where(w > by, w - by, torch.where(w < -by, w + by, torch.zeros_like(w)))


def _rmsprop(p, g):
    return p - LR * g / (0.9 + 0.1 * g * g + 1e-10).sqrt()


def _step_by_formula(method, name, extra):
    """Parameters of the net and what one step of the optimiser makes of them, unmasked."""
    net = method.module
    x, y = task(name).train
    named = {n: p for n, p in net.named_parameters() if "heads" not in n or f"task_{name}" in n}
    loss = F.cross_entropy(sliced_logits(method, x, name, net.units), y)
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
    method = den("a", l1=0.3, shrinkage=shrinkage)
    _, new, found = _step_by_formula(method, "a", lambda named: 0.0)
    for name in new:
        expected = _soft(new[name], scale * 0.3) if new[name].dim() > 1 else new[name]
        _close(found[name], expected)
    assert any(bool((found[n] == 0).any()) for n in found)


def test_selecting_trains_the_head_alone():
    method = den("ab", l1=0.3)
    begin(method, "b", 1)
    old, new, found = _step_by_formula(method, "b", lambda named: 0.0)
    for name in new:
        if name == HEAD:
            _close(found[name], _soft(new[name], LR * 0.3))
        elif "heads" in name:
            _close(found[name], new[name])
        else:
            assert torch.equal(found[name], old[name])


def test_retraining_moves_the_selected_subnetwork():
    method = den("ab", l2=0.2)
    net = method.module
    with torch.no_grad():
        net.heads["b"][1].weight[:, :9] = 0  # unit 0 of the last stage is not used
        net.stages[1][0].weight[1:, 3] = 0  # and unit 3 below feeds only that one
    begin(method, "b", 2)
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


def test_expanding_trains_new_weights_with_both_penalties():
    torch.manual_seed(1)
    method = den("ab", loss_threshold=0.0, l1=0.02, group_lasso=0.6)
    net = method.module
    x = task().test[0]
    old_logits = method.logits(x, "a")  # with its graph, which must not stand in the way
    before = values(net)
    retrained(method, 1.0)
    begin(method, "b", 3)
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


@pytest.mark.parametrize("phase", ["drift", "settle"])
def test_drift_and_settling_hold_weights_to_their_old_values(phase):
    method = den("ab", regularization=0.7, split_threshold=1e9)
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


def test_phases_of_a_task_and_their_epochs():
    method = den("ab", phases=(1, 4, 2, 1, 2), loss_threshold=0.0)
    seen = []
    for epoch in range(1, 21):
        method.begin_epoch(task("b"), Phase(epoch, 20))
        method.module.batches += 1
        method.module.loss_sum += 1
        seen.append(method.module.phase)
    assert [seen.count(phase) for phase in PHASES] == [2, 8, 4, 2, 4]
    for epochs in (5, 6, 7, 50):
        method = den("ab", phases=(0.001, 1, 0.001, 0.001, 0.001), loss_threshold=0.0)
        seen = []
        for epoch in range(1, epochs + 1):
            method.begin_epoch(task("b"), Phase(epoch, epochs))
            method.module.loss_sum += 1
            method.module.batches += 1
            seen.append(method.module.phase)
        assert [seen.count(phase) for phase in PHASES] == [1, epochs - 4, 1, 1, 1]


def test_the_optimiser_begins_anew_in_every_phase():
    method = den("ab")
    optimizer = torch.optim.Adam(method.module.parameters(), lr=0.01)
    for epoch in range(1, 6):
        begin(method, "b", epoch)
        x, y = task("b").train
        for steps in (1, 2):
            method.step(x, y, "b", optimizer)
            assert max(int(s["step"]) for s in optimizer.state.values()) == steps


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
    method = den("a")
    for bad in (nn.Conv2d(4, 3, 1), nn.Linear(5, 3), nn.Identity(),
                nn.Sequential(nn.GroupNorm(1, 4), nn.Linear(4, 3))):  # fmt: skip
        with pytest.raises(ValueError, match="head: expected its first layer with parameters"):
            method.add_task(task("b"), bad)
    assert method.module.tasks == ("a",) and method.module.phase == "first"
    method.end_task(task("a"))
    add(method, task("b"))
    with pytest.raises(ValueError, match="epochs: expected at least 5, one for each"):
        begin(method, "b", 1, epochs=4)
    x, y = task().train
    with pytest.raises(ValueError, match="has not ended, got 'a'"):
        method.step(x, y, "a", torch.optim.SGD(method.module.parameters(), lr=0.1))
