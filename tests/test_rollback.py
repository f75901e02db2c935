"""The roll-back: what a task did to the shared stages goes, what others did stays, bit for bit."""

from __future__ import annotations

import copy
import gc
import itertools
import warnings

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from nets import batch, small_net
from torch import nn

import lasem_fast as lf
from lasem_fast.networks.rollback import Rollback

DTYPES = {
    "mask_": torch.full((4, 4), -torch.inf).triu(1),
    "a_nan": torch.tensor([torch.nan, torch.inf, -0.0]),
    "bools": torch.tensor([True, False]),
    "a_uint8": torch.tensor([250, 3], dtype=torch.uint8),
    "a_uint16": torch.tensor([65530, 3], dtype=torch.uint16),
    "a_int64": torch.tensor(2**62),
    "a_float8": torch.tensor([1.5, 2]).to(torch.float8_e4m3fn),
    "bf16": torch.tensor([torch.inf, 2]).bfloat16(),
    "a_complex": torch.tensor([complex(torch.inf, 1), 2j]),
}


def _net_with_buffers(tasks="ab"):
    net = small_net(1, tasks=tasks)
    for name, value in DTYPES.items():
        net.shared[0].register_buffer(name, value.clone())
    return net


def _bits(tensor):
    return tensor.detach().reshape(-1).contiguous().view(torch.uint8).tolist(), tensor.shape


def _stage_bits(net):
    return {name: _bits(t) for name, t in net.shared[0].state_dict().items()}


def _step(em, task, seed=0):
    optimizer = torch.optim.SGD(em.net.task_parameters(task), lr=0.1)
    em(*batch(seed=seed), task).loss.backward()
    optimizer.step()
    optimizer.zero_grad()


@pytest.mark.parametrize("order", ["a", "aba", "abab", "ba"])
def test_constants_of_every_dtype_stay_when_open_tasks_alternate(order):
    net = _net_with_buffers()
    em = lf.LASEM(net)
    before = _stage_bits(net)
    for i, task in enumerate(order):
        _step(em, task, i)
    constants = {k: v for k, v in before.items() if k in DTYPES}
    em.end_task("a", [False])
    assert {k: v for k, v in _stage_bits(net).items() if k in DTYPES} == constants
    em.end_task("b", [False])
    assert _stage_bits(net) == before


@pytest.mark.parametrize("alone", [True, False])
def test_buffers_of_every_dtype_come_back_from_what_the_task_wrote(alone):
    net = _net_with_buffers()
    em = lf.LASEM(net)
    before = _stage_bits(net)
    for i, task in enumerate("aa" if alone else "abaab"):
        _step(em, task, i)
        if task == "a":
            for name in DTYPES:
                buffer = getattr(net.shared[0], name)
                buffer.copy_((buffer.to(torch.complex64).real * 0 + 1).to(buffer.dtype))
    em.end_task("a", [False])
    after = _stage_bits(net)
    assert {k: after[k] for k in DTYPES} == {k: before[k] for k in DTYPES}


def test_a_weight_that_only_the_task_changed_comes_back_in_an_alternation_too():
    net = small_net(2, tasks="ab")
    em = lf.LASEM(net)
    frozen = net.shared[0].requires_grad_(False)
    before = _stage_bits(net)
    for i, task in enumerate("abab"):
        _step(em, task, i)
        if task == "a":
            with torch.no_grad():
                for p in frozen.parameters():
                    p += 0.1
    em.end_task("a", set())
    assert _stage_bits(net) == before


def test_counters_lose_the_task_s_own_counts():
    net = small_net(1, tasks="ab")
    net.shared[0].register_buffer("steps", torch.tensor(254, dtype=torch.uint8))
    em = lf.LASEM(net)
    for i, task in enumerate("abbaba"):
        _step(em, task, i)
        net.shared[0].steps += 1  # past 255 on the way
    em.end_task("a", [False])
    assert int(net.shared[0].steps) == (254 + 3) % 256
    em.end_task("b", [True])
    assert int(net.shared[0].steps) == (254 + 3) % 256


class _Counting(nn.Module):
    """Writes to a buffer in its forward."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Conv2d(2, 3, 3, padding=1)
        self.register_buffer("mean", torch.zeros((), dtype=torch.float64))

    def forward(self, h):
        if self.training:
            self.mean.lerp_(h.detach().mean(), 0.5)
        return self.layer(h)


@pytest.mark.parametrize("backend", ["reference", "torch", "auto"])
def test_what_the_first_forward_writes_comes_back_too(backend):
    net = lf.TransferNet([_Counting()])
    for task in "ab":
        net.add_task(task, nn.Sequential(nn.Flatten(), nn.Linear(108, 3)))
    em = lf.LASEM(net.double(), backend=backend)
    _step(em, "a")
    left = net.shared[0].mean.clone()
    assert float(left) != 0
    _step(em, "b", 1)
    assert not torch.equal(net.shared[0].mean, left)
    em.end_task("b", [False])
    assert torch.equal(net.shared[0].mean, left)
    em.end_task("a", [False])
    assert float(net.shared[0].mean) == 0


def _grow(net):
    shared = net.shared[0]
    shared.seen = torch.cat([shared.seen, torch.ones(1)])
    shared.made_later = torch.ones(2)
    if not hasattr(shared, "new"):
        shared.register_buffer("new", torch.ones(3))


def _growing():
    net = small_net(1, tasks="ab")
    net.shared[0].register_buffer("seen", torch.zeros(1))
    net.shared[0].register_buffer("made_later", None)
    return net


@pytest.mark.parametrize(("order", "seen"), [("aa", 1), ("aba", 1), ("ab", 3), ("aab", 4)])
def test_buffers_that_change_shape_or_appear_are_put_back_whole(order, seen):
    net = _growing()
    em = lf.LASEM(net)
    for i, task in enumerate(order):
        _step(em, task, i)
        if order != "aba" or task == "a":
            _grow(net)
    state = copy.deepcopy(em.state_dict())
    twin = copy.deepcopy(em)
    twin.load_state_dict(state)
    for module in (em, twin):
        module.end_task("a", [False])
        shared = module.net.shared[0]
        assert shared.seen.shape == (seen,)
        assert shared.made_later is None and not hasattr(shared, "new")  # a's doing alone
        module.end_task("b", [False])
        assert shared.seen.tolist() == [0] and shared.made_later is None
        assert not hasattr(shared, "new")


def test_a_counter_that_another_task_lets_grow_does_not_stop_the_end():
    for ends in itertools.permutations("abc"):
        for keeps in itertools.product([False, True], repeat=3):
            net = small_net(1, tasks="abc")
            shared = net.shared[0]
            shared.register_buffer("n", torch.zeros(1, dtype=torch.int64))
            em = lf.LASEM(net)
            for i, task in enumerate("abcab"):
                em(*batch(seed=i), task)
                shared.n = torch.ones(1, dtype=torch.int64) if shared.n is None else shared.n + 1
                if i == 2:
                    shared.n = torch.cat([shared.n, shared.n])
                if i == 3 and ends[0] == "a":
                    shared.n = None
            for task, keep in zip(ends, keeps, strict=True):
                em.end_task(task, [keep])
            if not any(keeps):
                assert shared.n.tolist() == [0]


def test_a_parameter_that_went_missing_is_refused_before_anything_changes():
    net = small_net(2)
    em = lf.LASEM(net)
    _step(em, "a")
    layer = net.shared[1][0]
    weight = layer.weight
    del layer.weight
    layer.weight = weight.detach() + 1
    before = copy.deepcopy(em.state_dict())
    with pytest.raises(RuntimeError, match=r"net: expected the shared stage 2 to have '0.weight'"):
        em.end_task("a", set())
    assert all(torch.equal(before[k], t) for k, t in em.state_dict().items())
    assert net.config("a") is None
    em.end_task("a", {2})


def test_an_end_that_is_refused_leaves_what_is_kept_for_the_next_one():
    """Also while tasks alternate, where what was done so far is attributed first."""
    em = lf.LASEM(small_net(2, tasks="ab"), backend="torch")
    first = em.net.shared[0][0]
    start = first.bias.detach().clone()
    for task in "abab":
        _step(em, task)
    bias, first.bias = first.bias, None
    before = {name: value.clone() for name, value in em.state_dict().items()}
    with pytest.raises(RuntimeError, match=r"expected the shared stage 1 to have '0\.bias'"):
        em.end_task("a", set())
    after = em.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(value, after[name]) for name, value in before.items())
    first.bias = bias
    _step(em, "b")
    for task in "ab":
        em.end_task(task, set())
    assert torch.equal(first.bias, start)


class _Fused(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer, self.scale = nn.Conv2d(2, 3, 3, padding=1), nn.Parameter(torch.ones(()))

    def reset_parameters(self):
        nn.init.ones_(self.scale)

    def forward(self, h):
        return self.layer(h) * self._parameters.get("scale", 1)


@pytest.mark.parametrize("saved", [False, True])
@pytest.mark.parametrize("as_buffer", [False, True])
@pytest.mark.parametrize("order", ["a", "ba"])
def test_a_parameter_that_was_fused_away_does_not_come_back_as_a_buffer(order, as_buffer, saved):
    net = lf.TransferNet([_Fused()])
    for task in "ab":
        net.add_task(task, nn.Sequential(nn.Flatten(), nn.Linear(108, 3)))
    em = lf.LASEM(net.double(), backend="torch")
    for task in order:
        _step(em, task)
    if saved:
        em.load_state_dict(em.state_dict())
    del net.shared[0].scale
    if as_buffer:
        net.shared[0].register_buffer("scale", torch.ones(()))
    before = {name: value.clone() for name, value in em.state_dict().items()}
    with pytest.raises(RuntimeError, match="the shared stage 1 to have 'scale' as a parameter"):
        em.end_task("a", set())
    assert before.keys() == em.state_dict().keys()
    assert all(torch.equal(value, before[name]) for name, value in em.state_dict().items())


def test_drawing_anew_that_fails_leaves_the_task_open():
    def init(module):
        if fail:
            raise ArithmeticError("no such numbers")

    fail = False
    net = lf.TransferNet([nn.Conv2d(2, 3, 3, padding=1)], lf.transfer.HardParameterSharing(init))
    net.add_task("a", nn.Sequential(nn.Flatten(), nn.Linear(108, 3)))
    em = lf.LASEM(net.double(), redraw_unclaimed=True)
    _step(em, "a")
    before = copy.deepcopy(em.state_dict())
    fail = True
    with pytest.raises(ArithmeticError):
        em.end_task("a", [False])
    assert list(before) == list(em.state_dict()) and net.config("a") is None
    assert all(torch.equal(before[k], t) for k, t in em.state_dict().items())
    fail = False
    assert em.end_task("a", [False]) == (False,)


def _ended_and_open(headless, dtype=torch.float64):
    """A net with a task that has ended and shares all, and an open one; with the optimiser of both.

    Headless: the open task's head has no parameters.
    """
    net = small_net(2, tasks=("old",)).to(dtype)
    em = lf.LASEM(net)
    em(*batch(dtype=dtype), "old")
    em.end_task("old", {1, 2})
    head = nn.Flatten() if headless else nn.Sequential(nn.Flatten(), nn.Linear(108, 3))
    net.add_task("new", head.to(dtype))
    both = dict.fromkeys(net.task_parameters("old") + net.task_parameters("new"))
    return em, list(both)


@pytest.mark.parametrize("headless", [False, True])
@pytest.mark.parametrize("optimizer", ["plain", "fused"])
@pytest.mark.parametrize("order", ["old new", "new old", "new new old old", "new | new old"])
def test_a_step_together_with_a_task_that_has_ended_is_the_open_one_s(order, optimizer, headless):
    """Rehearsal: losses of old and new mini-batches in one step of the optimiser."""
    em, both = _ended_and_open(headless)
    start = [p.detach().clone() for p in em.net.shared.parameters()]
    optimizer = torch.optim.AdamW(both, lr=0.1, fused=optimizer == "fused")
    for i in range(3):
        for together in order.split(" | "):
            optimizer.zero_grad()
            x, y = batch(seed=i)
            sum(em(x, y, task).loss for task in together.split()).backward()
            optimizer.step()
    assert not torch.equal(start[0], em.net.shared[0][0].weight)
    em.end_task("new", set())
    for parameter, before in zip(em.net.shared.parameters(), start, strict=True):
        assert torch.equal(parameter, before)


def test_steps_of_a_task_that_has_ended_between_those_of_an_open_one_stay():
    em, both = _ended_and_open(headless=False)
    optimizer = torch.optim.SGD(both, lr=0.1)
    expected = [p.detach().clone() for p in em.net.shared.parameters()]
    for i, task in enumerate(("new", "old", "old", "new", "old")):
        before = [p.detach().clone() for p in em.net.shared.parameters()]
        optimizer.zero_grad()
        em(*batch(seed=i), task).loss.backward()
        optimizer.step()
        if task == "old":
            for value, p, q in zip(expected, em.net.shared.parameters(), before, strict=True):
                value += p.detach() - q
    em.end_task("new", set())
    for parameter, value in zip(em.net.shared.parameters(), expected, strict=True):
        torch.testing.assert_close(parameter.detach(), value)


def test_a_state_saved_within_a_step_knows_whose_it_is():
    em, both = _ended_and_open(headless=False)
    start = [p.detach().clone() for p in em.net.shared.parameters()]
    x, y = batch()
    losses = em(x, y, "new").loss + em(x, y, "old").loss
    state = copy.deepcopy(em.state_dict())
    again, parameters = _ended_and_open(headless=False, dtype=torch.float32)
    again.double()
    again.load_state_dict(state)
    for parameter, gradient in zip(parameters, torch.autograd.grad(losses, both), strict=True):
        with torch.no_grad():
            parameter -= 0.1 * gradient
    again.end_task("new", set())
    for parameter, before in zip(again.net.shared.parameters(), start, strict=True):
        assert torch.equal(parameter, before)


def test_two_lasems_that_train_one_net_in_turn_are_told():
    net = small_net(1, tasks="ab")
    ours, theirs = lf.LASEM(net), lf.LASEM(net)
    ours(*batch(), "a")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        ours(*batch(), "a")
        theirs.eval()(*batch(), "b")
        lf.LASEM(copy.deepcopy(net))(*batch(), "b")
    theirs.train()
    with pytest.warns(UserWarning, match="net: expected one LASEM at a time") as caught:
        theirs(*batch(), "b")
    assert caught[0].filename == __file__
    ours.end_task("a")
    theirs.end_task("b")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        net.add_task("c", copy.deepcopy(net.heads["a"]))
        ours(*batch(), "c")
        del ours  # one that is gone takes nothing back
        gc.collect()
        theirs(*batch(), "c")


def test_gradients_of_dropped_branches_and_of_what_is_rolled_back_are_freed():
    net = small_net(3, tasks="ab")
    em = lf.LASEM(net)
    dropped = list(net.specific["a"][0].parameters())
    em(*batch(), "a").loss.backward()
    em(*batch(), "b").loss.backward()
    em.end_task("a", {1})
    assert all(p.grad is None for p in dropped)
    left = {name for name, p in net.named_parameters() if p.grad is not None}
    kept = {name for name, _ in net.named_parameters() if name.startswith("shared.0.")}
    assert left == kept | {n for n, _ in net.named_parameters() if ".task_b." in n}


class _Model:
    """What the roll-back promises, from the record of all writes."""

    def __init__(self, shared):
        self.start = {name: t.clone() for name, t in shared.state_dict().items()}
        self.writes = []  # task, name, value added (sums) or left (last writer)

    def value(self, name, without, sums):
        value = self.start[name]
        for task, where, written in self.writes:
            if where == name and task not in without:
                value = value + written if sums else written
        return value


_WRITE = st.tuples(st.sampled_from(["w", "n", "m"]), st.integers(-9, 9))
_WRITES = st.tuples(st.sampled_from("abcz"), st.lists(_WRITE, max_size=3))


@settings(max_examples=60)
@given(st.lists(_WRITES, min_size=1, max_size=10), st.permutations("abc"),
       st.lists(st.booleans(), min_size=3, max_size=3), st.booleans())  # fmt: skip
def test_any_order_of_tasks_leaves_what_those_who_stay_did(turns, ends, keeps, reload):
    """Whole numbers, so that sums are exact; task z has ended before and comes back."""
    stage = nn.Module()
    stage.w = nn.Parameter(torch.tensor([1.0, 2.0]))
    stage.register_buffer("n", torch.tensor([5, 6], dtype=torch.int16))
    stage.register_buffer("m", torch.tensor([torch.nan, -torch.inf]))
    shared, rollback = nn.ModuleList([stage]), Rollback()
    model = _Model(stage)
    for task, group in itertools.groupby(turns, key=lambda turn: turn[0]):
        rollback.begin(task, task == "z", rollback.before(task, task == "z", shared))
        mask = stage.m.clone()
        for name, number in (write for _, writes in group for write in writes):
            tensor = getattr(stage, name).data
            change = torch.zeros_like(tensor)
            if name == "m":
                tensor[abs(number) % 2] = number
            else:
                change[abs(number) % 2] = number
                tensor += change
                model.writes.append((task, name, change))
        if _bits(mask) != _bits(stage.m):
            model.writes.append((task, "m", stage.m.clone()))
    without = set()
    for task, keep in zip(ends, keeps, strict=True):
        if reload:
            state, structure = copy.deepcopy(rollback.state_dict()), rollback.structure()
            rollback = Rollback()
            rollback.restore_structure(structure, shared)
            rollback.load_state_dict(state)
        rollback.end(task, (keep,), shared)
        without |= set() if keep else {task}
        for name, sums in (("w", True), ("n", True), ("m", False)):
            assert _bits(getattr(stage, name)) == _bits(model.value(name, without, sums)), name
    assert rollback.is_idle
