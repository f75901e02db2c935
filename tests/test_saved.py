"""State dicts: tensors alone, former forms, and loading that changes all or nothing."""

from __future__ import annotations

import copy
import json

import pytest
import torch
from nets import batch, small_net
from torch import nn

import lasem_fast as lf
from lasem_fast.backends import choices
from lasem_fast.networks.saved import all_or_nothing, packed, unpacked


def _em(tasks="ab", **options):
    return lf.LASEM(small_net(2, tasks=tasks), **options)


def _train(em, tasks):
    for i, task in enumerate(tasks):
        optimizer = torch.optim.SGD(em.net.task_parameters(task), lr=0.1)
        em(*batch(seed=i), task).loss.backward()
        optimizer.step()
        optimizer.zero_grad()


def _equal(a, b):
    return list(a) == list(b) and all(torch.equal(a[k], b[k]) for k in a)


def test_a_state_dict_holds_tensors_alone_and_no_memory_twice():
    em = _em(prior="mean_posterior")
    _train(em, "abab")
    state = em.state_dict()
    assert {type(value) for value in state.values()} == {torch.Tensor}
    places = [t.untyped_storage().data_ptr() for t in state.values()]
    assert len(set(places)) == len(places)
    assert unpacked(state["_extra_state"])["prior_tasks"] == ["a", "b"]


def test_safetensors_saves_and_loads_what_is_under_way(tmp_path):
    safetensors = pytest.importorskip("safetensors.torch")
    em, fresh = _em(prior="mean_posterior"), _em(prior="mean_posterior")
    _train(em, "abab")
    safetensors.save_file(em.state_dict(), tmp_path / "em.safetensors")
    fresh.load_state_dict(safetensors.load_file(tmp_path / "em.safetensors"))
    for module in (em, fresh):
        _train(module, "ba")
        module.end_task("a", {1})
    assert _equal(em.state_dict(), fresh.state_dict())


def test_accelerate_saves_and_loads_what_is_under_way(tmp_path):
    accelerate = pytest.importorskip("accelerate")
    states = []
    for load in (False, True):
        em = _em()
        optimizer = torch.optim.Adam(em.net.parameters())
        accelerator = accelerate.Accelerator(cpu=True)
        em, optimizer = accelerator.prepare(em, optimizer)
        if load:
            accelerator.load_state(tmp_path / "run")
        else:
            _train(em, "ab")
            em.end_task("b", {1})
            accelerator.save_state(tmp_path / "run")
        _train(em, "aa")
        states.append(em.state_dict())
    assert _equal(*states)


def _former(em, state):
    """The state as former versions saved it: dicts, and copies without names."""
    state["_extra_state"] = {
        "space": em.space.bits.tolist(),
        "prior_tasks": list(em._prior.states),
        "rollback": {
            "active": em._rollback.active,
            "settled": em._rollback.settled is not None,
            "anchor": em._rollback.anchor is not None,
            "changes": list(em._rollback.changes),
        },
    }
    state["net._extra_state"] = {
        "configs": {t: None if c is None else list(c) for t, c in em.net._configs.items()}
    }
    return state


@pytest.mark.parametrize("order", ["", "aa", "abab"])
def test_states_of_former_versions_load(order):
    em, fresh = _em(), _em()
    _train(em, order)
    fresh.load_state_dict(_former(em, copy.deepcopy(em.state_dict())))
    for module in (em, fresh):
        _train(module, "ba")
        module.end_task("a", {2})
        module.end_task("b", set())
    assert _equal(em.state_dict(), fresh.state_dict())


@pytest.mark.parametrize(
    ("value", "error"),
    [
        (3, TypeError),
        (torch.tensor([1, 2], dtype=torch.uint8), ValueError),
        (torch.tensor([0.5]), ValueError),
        (packed([1]), ValueError),
        (packed({"b": 1}), ValueError),
    ],
)
def test_an_extra_state_that_is_none_is_refused_in_words(value, error):
    with pytest.raises((error, TypeError), match=r"state_dict: expected .* extra state"):
        unpacked(value, "a")


def test_packed_is_utf8_json():
    state = {"tasks": ["käfer", "a.b"], "n": 1}
    assert json.loads(bytes(packed(state).tolist())) == state == unpacked(packed(state))
    assert unpacked(state) is state


def _spoilt(state, kind):
    state = copy.deepcopy(state)
    pinned = {"choices": {"cpu": {"a level": "Winograd"}}}
    state["_extra_state"] = packed(unpacked(state["_extra_state"]) | pinned)
    if kind == "shape":
        state["net.heads.task_b.1.bias"] = torch.zeros(7)
    elif kind == "missing":
        del state["net.heads.task_b.1.bias"]
    elif kind == "unknown":
        state["net.more"] = torch.zeros(1)
    elif kind == "space":
        state["_extra_state"] = packed(unpacked(state["_extra_state"]) | {"space": [[True, True]]})
    elif kind == "task":
        configs = unpacked(state["net._extra_state"])["configs"]
        state["net._extra_state"] = packed({"configs": configs | {"c": None}})
    elif kind == "prior":
        extra = unpacked(state["_extra_state"])
        state["_extra_state"] = packed(extra | {"prior_tasks": ["a", "c"]})
    elif kind == "bytes":
        state["_extra_state"] = torch.zeros(3, dtype=torch.uint8)
    return state


@pytest.mark.parametrize("assign", [False, True])
@pytest.mark.parametrize("kind", ["shape", "missing", "unknown", "space", "task", "prior", "bytes"])
@pytest.mark.usefixtures("unset")
def test_a_load_that_is_refused_changes_nothing(kind, assign):
    em, twin, other = _em(), _em(), _em()
    twin.load_state_dict(em.state_dict())
    for module in (em, twin):
        _train(module, "aba")
    em(*batch(), "a").loss.backward()
    _train(other, "b")
    other.end_task("b", {1})
    before = copy.deepcopy(em.state_dict())
    tensors = dict(em.named_parameters())
    grads = {name: p.grad for name, p in tensors.items()}
    with pytest.raises((ValueError, RuntimeError)):
        em.load_state_dict(_spoilt(other.state_dict(), kind), assign=assign)
    assert _equal(before, em.state_dict()) and choices.in_force() == {}
    assert all(p is tensors[n] and p.grad is grads[n] for n, p in em.named_parameters())
    em.load_state_dict(before)
    for module in (em, twin):
        module._prior.states["a"].wins.zero_()
        module.end_task("a", {2})
        module.end_task("b", {1, 2})
    assert _equal(em.state_dict(), twin.state_dict())


def test_of_what_a_partial_state_has_no_values_for_nothing_is_under_way():
    em = _em(prior="uniform", e_step_every=3)
    _train(em, "abab")
    kept = ("_rollback", "_posteriors")
    state = {name: t for name, t in em.state_dict().items() if not name.startswith(kept)}
    other = _em(prior="uniform", e_step_every=3)
    missing = other.load_state_dict(state, strict=False).missing_keys
    assert missing and all(name.startswith(kept) for name in missing)
    x, y = batch()
    other(x, y, "a").loss.backward()
    for parameter in other.net.shared.parameters():
        parameter.data.sub_(parameter.grad)
    for task in "ab":
        other.end_task(task, set())
    assert all(map(torch.equal, em.net.shared.parameters(), other.net.shared.parameters()))


@pytest.mark.parametrize("left_out", ["_rollback", "_rollback.settled", "_rollback.changes.task_b"])
def test_partial_states_of_an_outer_module_leave_nothing_half_either(left_out):
    em, inner = _em(e_step_every=3), _em(e_step_every=3)
    _train(em, "abab")
    kept = (f"em.{left_out}", "em._posteriors")
    state = nn.ModuleDict({"em": em}).state_dict()
    expected = [name for name in state if name.startswith("em._rollback.")]
    state = {name: t for name, t in state.items() if not name.startswith(kept)}
    found = nn.ModuleDict({"em": inner}).load_state_dict(state, strict=False)
    lost = [name for name in expected if name not in state]
    assert [name for name in found.missing_keys if "_rollback" in name] == lost
    assert inner._rollback.is_idle and not list(inner._posteriors) and not inner._posteriors.left
    _train(inner, "a")
    for task in "ab":
        inner.end_task(task, set())
    assert all(map(torch.equal, em.net.shared.parameters(), inner.net.shared.parameters()))


@pytest.mark.parametrize("prior", ["count", "mean_posterior"])
def test_a_state_without_a_task_leaves_its_prior_and_names_it_as_missing(prior):
    em, other = _em(prior=prior), _em("a", prior=prior)
    _train(em, "abb")
    _train(other, "a")
    kept = {
        n: t.clone() for n, t in em.state_dict().items() if n.startswith("_prior.states.task_b")
    }
    missing = em.load_state_dict(other.state_dict(), strict=False).missing_keys
    assert kept and kept.keys() <= set(missing)
    assert all(torch.equal(t, em.state_dict()[name]) for name, t in kept.items())
    assert torch.equal(em.prior("a"), other.prior("a"))
    em.load_state_dict(_em(prior=prior).state_dict())
    assert not list(em._prior.states)  # there the task has made no step


def test_loading_draws_no_random_numbers():
    em = _em()
    _train(em, "ab")
    em.end_task("a", {1})
    random = torch.get_rng_state()
    em.load_state_dict(em.state_dict())
    assert torch.equal(random, torch.get_rng_state())


def test_a_load_that_is_refused_leaves_how_the_next_step_is_run():
    em, other = _em(prune=0.5), _em(prune=0.5)
    em._search.few.add("a")
    with pytest.raises(RuntimeError, match="Unexpected"):
        other.load_state_dict({**em.state_dict(), "nothing": torch.ones(1)})
    assert not other._search.few


def test_a_load_that_a_net_refuses_changes_nothing():
    net = small_net(2)
    net.keep("a", {1})
    state = small_net(2).state_dict()
    state["heads.task_a.1.bias"] = torch.zeros(7)
    before = copy.deepcopy(net.state_dict())
    with pytest.raises(RuntimeError, match="size mismatch"):
        net.load_state_dict(state)
    assert _equal(before, net.state_dict()) and net.config("a") == (True, False)


def test_all_or_nothing_gives_back_modules_tensors_and_values():
    module = nn.Sequential(nn.Linear(2, 2), nn.ReLU())
    weight, value = module[0].weight, module[0].weight.detach().clone()
    calls = []
    handle = module.register_forward_hook(lambda *_: calls.append(1))

    def spoil():
        with all_or_nothing(module):
            module[0].weight.data = torch.zeros(3)
            module[0].bias = None
            module.append(nn.ReLU())
            raise ArithmeticError

    with pytest.raises(ArithmeticError):
        spoil()
    assert len(module) == 2 and module[0].bias is not None
    assert module[0].weight is weight and torch.equal(weight, value)
    handle.remove()
    module(torch.zeros(1, 2))
    assert not calls
