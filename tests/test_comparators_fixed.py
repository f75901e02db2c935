"""The fixed-probability ablation: P-weighted gradients of all configurations, no E-step."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from comparator_cases import add, conv_stages, same_bits, task, train, values
from oracle import logits_of

from lasem_fast import ConfigSpace
from lasem_fast.comparators import FixedProbability


def _method(tasks="a", **options):
    method = FixedProbability(conv_stages(), **{"config": {2}, "probability": 0.7, **options})
    method.module.double()
    for name in tasks:
        add(method, task(name))
    return method


@pytest.mark.parametrize("probability", [0.0, 0.25, 0.7, 1.0])
def test_the_gradient_is_the_weighted_sum_of_each_configuration_s(probability):
    method = _method(probability=probability)
    net, t = method.module.net, task()
    x, y = t.train
    parameters = net.task_parameters("a")
    expected = [torch.zeros_like(p) for p in parameters]
    loss = 0.0
    for config in ([1, 1], [1, 0], [0, 1], [0, 0]):
        weight = probability if config == [0, 1] else (1 - probability) / 3
        one = F.cross_entropy(logits_of(net, config, x, "a"), y)
        loss += weight * float(one.detach())
        found = torch.autograd.grad(one, parameters, allow_unused=True)
        expected = [e + weight * g if g is not None else e
                    for e, g in zip(expected, found, strict=True)]  # fmt: skip
    before = [p.detach().clone() for p in parameters]
    step = method.step(x, y, "a", torch.optim.SGD(parameters, lr=1.0))
    assert float(step.loss) == pytest.approx(loss, rel=1e-12)
    for p, old, g in zip(parameters, before, expected, strict=True):
        torch.testing.assert_close(p.detach(), old - g, rtol=1e-10, atol=1e-12)
    assert step.posterior.tolist() == method.prior("a")
    rest = (1 - probability) / 3
    assert method.prior("a") == pytest.approx([rest, rest, probability, rest])
    assert method.labels == ["{1,2}", "{1}", "{2}", "{}"]


def test_there_is_no_e_step(monkeypatch):
    method = _method()
    calls = []
    method.module.net.heads["a"].register_forward_hook(lambda *args: calls.append(args))
    method.module.net.heads["a"].insert(1, torch.nn.Dropout(0.5))
    train(method, task(), torch.optim.SGD(method.module.net.task_parameters("a"), lr=0.1), steps=1)
    # the first mini-batch is also looked at by itself; from the second on there is one forward
    calls.clear()
    train(method, task(), torch.optim.SGD(method.module.net.task_parameters("a"), lr=0.1), steps=1)
    assert len(calls) == 1 and calls[0][2].shape == (4 * 4, 3)


@pytest.mark.parametrize(
    ("probability", "kept"), [(0.7, (False, True)), (0.25, (True, True)), (0.1, (True, True))]
)
def test_the_most_probable_configuration_is_kept_and_the_rest_rolled_back(probability, kept):
    method = _method("", probability=probability, redraw_unclaimed=False)
    shared = method.module.net.shared
    parameters = add(method, task())
    before = [values(stage) for stage in shared]
    train(method, task(), torch.optim.SGD(parameters, lr=0.1))
    assert method.config("a") == kept
    after = [values(stage) for stage in shared]
    assert method.end_task(task()) == kept
    for stage, bit, old, new in zip(shared, kept, before, after, strict=True):
        assert not same_bits(old, new)
        assert same_bits(values(stage), new if bit else old)
    assert method.config("a") == kept == method.module.net.config("a")
    logits = method.logits(task().test[0], "a")
    assert torch.equal(logits, method.module.net(task().test[0], "a"))
    used = method.module.net.task_parameters("a")
    assert method.kept_parameters() == sum(p.numel() for p in used)


def test_a_certain_configuration_is_trained_as_by_itself():
    method, twin = _method(probability=1.0), _method(probability=1.0)
    twin.module.load_state_dict(method.module.state_dict())
    train(method, task(), torch.optim.SGD(method.module.net.task_parameters("a"), lr=0.1))
    net = twin.module.net
    optimizer = torch.optim.SGD(net.task_parameters("a"), lr=0.1)
    x, y = task().train
    for i in range(3):
        rows = (torch.arange(4) + i) % len(x)
        optimizer.zero_grad()
        F.cross_entropy(net(x[rows], "a", config={2}), y[rows]).backward()
        optimizer.step()
    ours, theirs = values(method.module.net), values(net)
    for name in ours:
        torch.testing.assert_close(ours[name], theirs[name], rtol=1e-10, atol=1e-12)


def test_over_dfcnn_and_over_a_space_of_one():
    method = _method(transfer="dfcnn", probability=0.5)
    train(method, task(), torch.optim.SGD(method.module.net.task_parameters("a"), lr=0.1))
    assert method.end_task(task()) == (False, True)
    one = _method(space=ConfigSpace.from_configs([[False, True]]), probability=1)
    assert one.prior("a") == [1.0]


def test_a_run_that_is_resumed_in_its_second_task_is_the_uninterrupted_one():
    method = _method("")
    train(method, task("a"), torch.optim.SGD(add(method, task("a")), lr=0.1))
    method.end_task(task("a"))
    optimizer = torch.optim.SGD(add(method, task("b")), lr=0.1)
    train(method, task("b"), optimizer)
    saved = copy.deepcopy(method.module.state_dict())
    fresh = _method("")
    add(fresh, task("a"))
    again = torch.optim.SGD(add(fresh, task("b")), lr=0.1)
    fresh.module.load_state_dict(saved)
    for each, steps in ((method, optimizer), (fresh, again)):
        torch.manual_seed(1)
        train(each, task("b", 1), steps)
        each.end_task(task("b"))
    assert same_bits(values(fresh.module), values(method.module))


def test_same_seed_same_weights():
    def run():
        torch.manual_seed(4)
        method = _method("")
        train(method, task("a"), torch.optim.Adam(add(method, task("a"), dropout=0.5), lr=0.01))
        method.end_task(task("a"))
        return values(method.module)

    assert same_bits(run(), run())


def test_bad_arguments_are_refused_in_words():
    for bad in (-0.1, 1.1, float("nan")):
        with pytest.raises(ValueError, match="probability: expected a"):
            _method(probability=bad)
    with pytest.raises(TypeError, match="probability: expected a finite number"):
        _method(probability="0.5")
    with pytest.raises(ValueError, match="probability: expected 1, because the space"):
        _method(space=ConfigSpace.from_configs([[False, True]]), probability=0.5)
    with pytest.raises(ValueError, match=r"config: expected a set of stages in 1\.\.2"):
        _method(config={3})
    with pytest.raises(ValueError, match="config: expected one of the 1 configurations"):
        _method(space=ConfigSpace.from_configs([[True, True]]), probability=1)
