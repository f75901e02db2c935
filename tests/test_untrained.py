"""A warning where an optimiser lacks a task's own parameters, and none where it does not."""

from __future__ import annotations

import gc
import warnings
import weakref

import pytest
import torch
from nets import batch, small_net

import lasem_fast as lf

STEPS = 8


def _train(em, optimizers, tasks="a", steps=STEPS, every=1, m_steps=1):
    """Trains; returns what was warned of."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for i in range(steps):
            for task in tasks:
                step = em(*batch(seed=i), task)
                for _ in range(m_steps - 1):
                    step.loss.backward()
                    step = em(*batch(seed=i), task, posterior=step.posterior)
                step.loss.backward()
                optimizer = optimizers[task]
                optimizer = optimizer if isinstance(optimizer, list) else [optimizer]
                if i % every == every - 1:
                    turn = optimizer[(i // every) % len(optimizer)]
                    turn.step()
                    turn.zero_grad()
    return [str(w.message) for w in caught if "optimizer:" in str(w.message)]


@pytest.mark.parametrize("kind", ["SGD", "Adam", "foreach"])
def test_an_optimizer_made_before_the_task_is_noticed_once(kind):
    net = small_net(2, tasks=())
    options = {"foreach": True} if kind == "foreach" else {}
    make = getattr(torch.optim, kind, torch.optim.Adam)
    optimizer = make(net.parameters(), lr=0.01, **options)
    net.add_task("a", small_net(2).heads["a"])
    net.double()
    em = lf.LASEM(net)
    found = _train(em, {"a": optimizer})
    assert len(found) == 1 and "'a'" in found[0] and "head and specific branches" in found[0]


def test_what_is_left_out_is_named():
    net = small_net(2)
    left = [*net.shared.parameters(), *net.heads["a"].parameters()]
    found = _train(lf.LASEM(net), {"a": torch.optim.SGD(left, lr=0.1)})
    assert len(found) == 1 and "specific branches have" in found[0] and "head" not in found[0]
    net = small_net(2)
    left = [*net.shared.parameters(), *net.specific["a"].parameters()]
    found = _train(lf.LASEM(net), {"a": torch.optim.SGD(left, lr=0.1)})
    assert len(found) == 1 and "its head has" in found[0]


def _all(net, task="a", **options):
    return torch.optim.SGD(net.task_parameters(task), **{"lr": 0.1, **options})


@pytest.mark.parametrize("options", [{}, {"lr": 0.0}, {"momentum": 0.9}])
@pytest.mark.parametrize("every", [1, 4])
@pytest.mark.parametrize("m_steps", [1, 2])
def test_no_false_alarm(options, every, m_steps):
    net = small_net(2)
    assert not _train(lf.LASEM(net), {"a": _all(net, **options)}, every=every, m_steps=m_steps)


def test_no_false_alarm_for_frozen_parts_tasks_that_alternate_and_optimizers_that_take_turns():
    net = small_net(2)
    net.heads["a"].requires_grad_(False)
    assert not _train(lf.LASEM(net), {"a": _all(net)})
    net = small_net(2)
    net.shared.requires_grad_(False)
    assert not _train(lf.LASEM(net), {"a": _all(net)})
    net = small_net(2, tasks=("a", "b"))
    optimizers = {"a": _all(net), "b": _all(net, "b", lr=0.0)}
    assert not _train(lf.LASEM(net), optimizers, tasks="ab", every=4)
    net = small_net(2)
    own = [*net.specific["a"].parameters(), *net.heads["a"].parameters()]
    turns = [torch.optim.SGD(p, lr=0.1) for p in (net.shared.parameters(), own)]
    assert not _train(lf.LASEM(net), {"a": turns})


def test_no_false_alarm_for_fused_optimizers_which_count_no_changes():
    class Both:
        def __init__(self, *optimizers):
            self.optimizers = optimizers

        def step(self):
            [optimizer.step() for optimizer in self.optimizers]

        def zero_grad(self):
            [optimizer.zero_grad() for optimizer in self.optimizers]

    net = small_net(2)
    own = [*net.specific["a"].parameters(), *net.heads["a"].parameters()]
    plain = torch.optim.SGD(net.shared.parameters(), lr=0.1)
    assert not _train(lf.LASEM(net), {"a": Both(plain, torch.optim.Adam(own, fused=True))})


def test_no_false_alarm_without_an_optimizer():
    net = small_net(2)
    assert not _train(lf.LASEM(net), {"a": _all(net)}, every=100)


def test_branches_that_no_configuration_takes_are_not_missed(recwarn):
    net = small_net(2)
    em = lf.LASEM(net, lf.ConfigSpace.from_configs([{1, 2}], depth=2))
    optimizer = torch.optim.SGD(net.task_parameters("a"), lr=0.1)
    for _ in range(6):
        optimizer.zero_grad()
        em(*batch(), "a").loss.backward()
        optimizer.step()
    assert not [w for w in recwarn if "optimizer" in str(w.message)]


def test_parameters_that_were_replaced_while_nothing_moved_are_looked_at():
    """An optimiser of the new ones lacks the head: noticed, whatever the old ones did."""
    net = small_net(2)
    em = lf.LASEM(net)
    for _ in range(5):
        em(*batch(), "a").loss.backward()
    for module in (net.shared[0][0], net.specific["a"][0][0]):
        module.weight = torch.nn.Parameter(module.weight.detach().clone())
    left = [*net.shared.parameters(), *net.specific["a"].parameters()]
    found = _train(em, {"a": torch.optim.SGD(left, lr=0.1)})
    assert len(found) == 1 and "its head has" in found[0]


def test_what_is_frozen_while_nothing_moved_is_not_missed():
    net = small_net(2)
    em = lf.LASEM(net)
    for _ in range(2):
        em(*batch(), "a").loss.backward()
    net.heads["a"].requires_grad_(False)
    left = [*net.shared.parameters(), *net.specific["a"].parameters()]
    assert not _train(em, {"a": torch.optim.SGD(left, lr=0.1)})


def test_what_a_task_has_dropped_is_not_held():
    net = small_net(2)
    em = lf.LASEM(net)
    for _ in range(2):
        em(*batch(), "a")
    dropped = weakref.ref(net.specific["a"][0][0].weight)
    em.end_task("a", {1, 2})
    gc.collect()
    assert dropped() is None
