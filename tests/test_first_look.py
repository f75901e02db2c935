"""The first mini-batch of a task: stages that mix samples or write to their input, by name."""

from __future__ import annotations

import random
import threading
import warnings

import pytest
import torch
import torch.nn.functional as F
from nets import Residual, batch
from oracle import assert_equals, assert_step_equals, brute_force
from torch import nn

import lasem_fast as lf
from lasem_fast.search import first_look

FAST = ("torch", "auto")


class Own(nn.Module):
    """A stage of a user's own, with a weight, a buffer and a count of its calls."""

    def __init__(self, function):
        super().__init__()
        self.function = function
        self.shift = nn.Parameter(torch.ones(1))
        self.register_buffer("seen", torch.zeros(()))
        self.calls = 0

    def reset_parameters(self):
        nn.init.ones_(self.shift)

    def forward(self, h):
        self.calls += 1
        self.seen += 1
        return self.function(h, self.shift)


def _net(stage, place="stage", dtype=torch.float64):
    conv = nn.Conv2d(2, 3, 3, padding=1)
    layers = [nn.Flatten(), nn.Linear(108, 3)]
    if place == "head":
        net = lf.TransferNet([conv, nn.Conv2d(3, 3, 1)])
        net.add_task("a", nn.Sequential(stage, *layers))
    else:
        net = lf.TransferNet([conv, stage])
        net.add_task("a", nn.Sequential(*layers))
    return net.to(dtype)


class Drawing(Own):
    """Mixes on some mini-batches, by random numbers that it declares or not."""

    def __init__(self, how, declared):
        super().__init__(None)
        self.how, self.declared = how, declared
        if declared:
            self.stochastic = True

    def forward(self, h):
        if not self.training:
            return h * self.shift
        if self.how == "flip":
            return 0.7 * h + 0.3 * h.flip(0) * self.shift
        if random.random() > 0.5:
            return h * self.shift
        return 0.7 * h + 0.3 * h[torch.randperm(len(h))].detach() * self.shift


@pytest.mark.parametrize("backend", FAST)
@pytest.mark.parametrize(("how", "declared"), [("flip", True), ("mix", True), ("mix", False)])
def test_a_stage_that_mixes_at_random_is_refused(how, declared, backend):
    em = lf.LASEM(_net(Drawing(how, declared)), backend=backend)
    with pytest.raises(ValueError, match=r"net: expected stages that treat .* got stage 2"):
        em(*batch(), "a")


def test_a_look_at_random_numbers_is_short(monkeypatch):
    """Of PyTorch's dropout nothing is to be seen, of the same code in both branches once."""
    runs = []
    run = first_look._run
    counted = lambda *args, **options: runs.append(options) or run(*args, **options)  # noqa: E731
    monkeypatch.setattr(first_look, "_run", counted)

    class Own(nn.Module):
        def __init__(self, *layers):
            super().__init__()
            self.layers = nn.Sequential(nn.Conv2d(3, 3, 1), *layers)

        def forward(self, h):
            return self.layers(h)

    def at_random(*layers):
        runs.clear()
        lf.LASEM(_net(Own(*layers)))(*batch(), "a")
        return sum(options.get("calm") is False for options in runs)

    assert at_random(nn.Dropout(0.5), nn.Dropout2d(0.5), nn.RReLU()) == 0
    declared = StochasticDepth()
    declared.stochastic = True
    assert at_random(declared) == 33
    monkeypatch.setattr(first_look, "_LARGE", 3)
    assert at_random(declared) == 9
    alike = nn.Dropout(0.5)
    alike.stochastic = True
    assert at_random(alike) == 9


@pytest.mark.parametrize("backend", FAST)
def test_a_stage_that_draws_for_every_sample_is_not(backend):
    class Noise(Own):
        stochastic = True

        def forward(self, h):
            mask = torch.rand(len(h), 1, 1, 1, dtype=h.dtype) > random.random()
            return h * mask * self.shift

    lf.LASEM(_net(Noise(None)), backend=backend)(*batch(), "a", torch.ones(4) / 4)


@pytest.mark.parametrize("backend", FAST)
@pytest.mark.parametrize("says_so", [False, True])
def test_a_stage_that_draws_and_does_not_say_so_is_told(says_so, backend):
    class Dropping(Own):
        def forward(self, h):
            return F.dropout(h * self.shift, 0.5, self.training)

    stage = Dropping(None)
    stage.stochastic = says_so
    em = lf.LASEM(_net(stage), backend=backend)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        em.eval()(*batch(), "a")
        assert not caught
        em.train()(*batch(), "a")
    assert len(caught) == (not says_so)
    for warning in caught:
        assert "got stage 2 (Dropping())" in str(warning.message)
        assert "in which Dropping draws some" in str(warning.message)
        assert "stochastic = True" in str(warning.message)


class StochasticDepth(nn.Module):
    """Leaves a sample's branch out, as in torchvision."""

    def forward(self, h):
        if not self.training:
            return h
        return h * torch.empty(len(h), 1, 1, 1, dtype=h.dtype).bernoulli_(0.5)


@pytest.mark.parametrize("backend", FAST)
@pytest.mark.parametrize("draws", ["in training", "always"])
def test_layers_that_draw_inside_a_stage_are_named(draws, backend):
    torch.manual_seed(0)
    stage = nn.Sequential(nn.Conv2d(3, 3, 1), StochasticDepth(), Residual(3), StochasticDepth())
    if draws == "always":
        stage.append(Own(lambda h, shift: F.dropout(h * shift)))
    net, (x, y) = _net(stage), batch()
    em = lf.LASEM(net, backend=backend)
    with pytest.warns(UserWarning, match="got stage 2") as caught:
        em(x, y, "a")
    named = "in which '1' (StochasticDepth), '3' (StochasticDepth) draw some" in str(caught[0])
    assert named == (draws == "in training")
    for layer in net.modules():
        if isinstance(layer, StochasticDepth):
            layer.stochastic = True
    found = em(x, y, "a").log_likelihood
    calm = brute_force(net.eval(), em.space.bits, x, y, "a").log_likelihood
    assert torch.allclose(found, calm) == (draws == "in training")


@pytest.mark.parametrize("backend", FAST)
def test_a_layer_that_comes_later_is_looked_at(backend):
    em = lf.LASEM(_net(nn.Sequential(nn.Conv2d(3, 3, 1), nn.ReLU())), backend=backend)
    em(*batch(), "a")
    em.net.specific["a"][1][1] = Own(MIXING["roll"]).double()
    with pytest.raises(ValueError, match=r"net: expected stages that treat .* got stage 2"):
        em(*batch(), "a")


MIXING = {
    "mean": lambda h, _: h - h.mean(0),
    "roll": lambda h, _: h.roll(1, 0),
    "what came before": lambda h, _: h.cumsum(0),
    "largest": lambda h, _: h / h.abs().max(),
    "number of samples": lambda h, _: h / h.shape[0],
    "attention over the batch": lambda h, _: (
        (h.flatten(1) @ h.flatten(1).T / 100).softmax(1) @ h.flatten(1)
    ).view_as(h),
}


@pytest.mark.parametrize("place", ["stage", "head"])
@pytest.mark.parametrize("kind", MIXING)
@pytest.mark.parametrize("backend", FAST)
def test_what_mixes_samples_is_refused_by_name(kind, place, backend):
    em = lf.LASEM(_net(Own(MIXING[kind]), place), backend=backend)
    where = "stage 2" if place == "stage" else "the head of task 'a'"
    before = em.state_dict()
    for call in (lambda: em(*batch(), "a"), lambda: em.evaluate(batch()[0], "a")):
        with pytest.raises(ValueError, match=f"net: .*independently, got {where} .*Own"):
            call()
    assert list(before) == list(em.state_dict())


@pytest.mark.parametrize("samples", [1, 4])
def test_behind_a_relu_that_is_shut_too(samples):
    """Of the shared branch all that comes is zero, and zeros mixed are zeros."""
    shut = nn.Sequential(nn.Conv2d(2, 3, 3, padding=1), nn.ReLU())
    net = lf.TransferNet([shut, Own(MIXING["mean"])])
    net.add_task("a", nn.Sequential(nn.Flatten(), nn.Linear(108, 3)))
    nn.init.constant_(net.shared[0][0].bias, -1e3)
    x, y = batch(samples, dtype=torch.float32)
    with pytest.raises(ValueError, match="independently, got stage 2"):
        lf.LASEM(net, backend="torch")(x, y, "a")


@pytest.mark.parametrize(
    "function",
    [
        lambda h, shift: h + shift,
        lambda h, _: h + torch.randn_like(h),
        lambda h, _: h * random.random(),
        lambda h, _: (h * 1e3).round() / 1e3,
        lambda h, _: h.sort(dim=1).values,
        lambda h, _: (h - h.mean((1, 2, 3), keepdim=True)) / h.std((1, 2, 3), keepdim=True),
        lambda h, _: h.bfloat16().to(h.dtype),
    ],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_what_treats_samples_alone_is_not(function, dtype):
    for seed in range(5):
        x, y = batch(seed=seed, dtype=dtype)
        lf.LASEM(_net(Own(function), dtype=dtype))(x, y, "a").loss.backward()


class Recurrent(nn.Module):
    """What leaves it has other strides than a tensor of its shape."""

    def __init__(self, width):
        super().__init__()
        self.gru = nn.GRU(width, 8, batch_first=True)

    def forward(self, h):
        return self.gru(h)[0]


def test_recurrent_stages_under_autocast_are_not():
    net = lf.TransferNet([Recurrent(6), Recurrent(8)])
    net.add_task("a", nn.Sequential(nn.Flatten(), nn.Linear(80, 3)))
    with torch.autocast("cpu", torch.bfloat16):
        lf.LASEM(net)(torch.randn(4, 10, 6), torch.arange(4) % 3, "a").loss.backward()


@pytest.mark.parametrize("backend", FAST)
@pytest.mark.parametrize("kind", ["of the mini-batch", "asserted", "of the stage before"])
def test_a_mask_kept_outside_is_told_by_name(kind, backend):
    x, y = batch()
    masks = [torch.ones(len(x), 1, 1, 1, dtype=x.dtype)]

    class Masked(Own):
        def forward(self, h):
            if kind == "asserted":
                assert len(h) == len(masks[0])
            return h * masks[0] * self.shift

    class Masking(nn.Conv2d):
        def forward(self, h):
            masks[0] = torch.ones_like(h[:, :1, :1, :1])
            return super().forward(h)

    net = _net(Masked(None))
    if kind == "of the stage before":
        net = lf.TransferNet([Masking(2, 3, 3, padding=1), nn.Conv2d(3, 3, 1), Masked(None)])
        net.add_task("a", nn.Sequential(nn.Flatten(), nn.Linear(108, 3)))
        net.double()
    stage = len(net.shared)
    with pytest.raises(
        ValueError, match=rf"net: expected .* number of samples, got stage {stage} \(Masked\(\)\)"
    ):
        lf.LASEM(net, backend=backend)(x, y, "a")
    lf.LASEM(net, backend="reference")(x, y, "a")


class Attention(nn.Module):
    """A block that keeps its last attention map, as many do for pictures."""

    def __init__(self):
        super().__init__()
        self.query, self.key = nn.Linear(6, 6), nn.Linear(6, 6)
        self.maps = []

    def forward(self, h):
        self.map = (self.query(h) @ self.key(h).transpose(-2, -1)).softmax(dim=-1)
        self.maps = [{"last": self.map}, self.maps[:1]]
        return h + self.map @ h


@pytest.mark.parametrize("backend", ["torch", "auto", "reference"])
@pytest.mark.parametrize("place", ["stage", "head"])
def test_what_keeps_a_computed_tensor_is_looked_at_again(place, backend):
    net, (x, y) = _net(Attention(), place), batch()
    em = lf.LASEM(net, backend=backend)
    em(x, y, "a").loss.backward()
    block = net.shared[1] if place == "stage" else net.heads["a"][0]
    em.eval()
    em(x, y, "a")
    em.train()
    net.add_task("b", nn.Sequential(nn.Flatten(), nn.Linear(108, 3)).double())
    assert_step_equals(net, em(x, y, "b"), brute_force(net, em.space.bits, x, y, "b"))
    block.maps.append(block.maps)
    em.end_task("a")
    assert_equals(net.freeze("a")(x), net(x, "a").detach(), "output")


@pytest.mark.parametrize("backend", FAST)
def test_a_head_that_cannot_be_copied_is_refused_in_words(backend):
    head = Own(lambda h, shift: h + shift)
    head.lock = threading.Lock()
    em = lf.LASEM(_net(head, "head"), backend=backend)
    words = r"net: expected a module that copy.deepcopy can copy, got Sequential \(cannot pickle"
    with pytest.raises(ValueError, match=words):
        em(*batch(), "a")


def test_the_look_leaves_no_trace():
    calls = []
    net = _net(Own(lambda h, shift: h + shift * torch.randn_like(h).sign().abs()))
    net.shared[1].register_forward_hook(lambda *_: calls.append(1))
    state, python_state = torch.get_rng_state(), random.getstate()
    em = lf.LASEM(net, backend="torch").eval()
    em(*batch(), "a")
    once = (net.shared[1].calls, float(net.shared[1].seen), len(calls))
    used = torch.get_rng_state()
    torch.set_rng_state(state)
    em(*batch(), "a")  # the second call does not look
    assert torch.equal(torch.get_rng_state(), used) and random.getstate() == python_state
    assert once == (1, 1.0, 1) and net.shared[1].calls == 2


def test_only_the_first_mini_batch_of_more_than_one_sample_is_looked_at(monkeypatch):
    looks = []
    look = first_look.look
    monkeypatch.setattr(first_look, "look", lambda *a: looks.append(1) or look(*a))
    em = lf.LASEM(_net(Own(lambda h, shift: h + shift)))
    x, y = batch()
    for samples in (1, 1, 4, 4, 1):
        em(x[:samples], y[:samples], "a")
    assert len(looks) == 2


WRITING = {
    "add_": lambda h, shift: h.add_(shift),
    "a part": lambda h, shift: torch.cat([h[:, :1].mul_(2), h[:, 1:] * shift], 1),
    "through a view": lambda h, shift: h.flatten(1).add_(shift).view_as(h),
    "through data": lambda h, shift: h + shift * h.data.add_(1).sum((1, 2, 3), keepdim=True),
}


@pytest.mark.parametrize("place", ["first", "stage", "head", "group"])
@pytest.mark.parametrize("kind", WRITING)
@pytest.mark.parametrize("backend", ["torch", "auto", "reference"])
def test_what_writes_to_its_input_does_no_harm(kind, place, backend):
    stage = Own(WRITING[kind])
    if place == "first":
        net = lf.TransferNet([stage, nn.Conv2d(2, 3, 3, padding=1)])
        net.add_task("a", nn.Sequential(nn.Flatten(), nn.Linear(108, 3)))
        net.double()
    else:
        net = _net(stage, place)
    x, y = batch()
    kept = x.clone()
    em = lf.LASEM(net, lf.ConfigSpace(2, [2] if place == "group" else None), backend=backend)
    for _ in range(2):
        log_prior = em.prior("a").log()
        truth = brute_force(net, em.space.bits, x.clone(), y, "a", log_prior=log_prior)
        assert_step_equals(net, em(x, y, "a"), truth)
        assert torch.equal(x, kept)


def test_what_begins_to_write_later_is_refused_by_name():
    writes = []
    net = _net(Own(lambda h, shift: h.add_(shift) if writes else h + shift))
    em = lf.LASEM(net, backend="torch")
    em(*batch(), "a")
    writes.append(True)
    wins = em._prior.states["a"].wins.clone()
    with pytest.raises(RuntimeError, match=r"net: expected stages that leave .*got stage 2 .*Own"):
        em(*batch(), "a")
    assert torch.equal(em._prior.states["a"].wins, wins)


@pytest.mark.parametrize(
    ("function", "error", "words"),
    [
        (lambda h, _: h.flatten(0, 1), ValueError, r"stage 2 .*Own.* keep the number of samples"),
        (lambda h, _: h.sum(), ValueError, r"stage 2 .*Own.* keep the number of samples"),
        (lambda h, _: (h, h), TypeError, r"a tensor from stage 2 \(Own\(\)\), got tuple"),
        (lambda h, _: None, TypeError, r"a tensor from stage 2 \(Own\(\)\), got NoneType"),
    ],
)
@pytest.mark.parametrize("backend", FAST)
def test_outputs_that_a_tree_cannot_hold_are_refused_by_name(function, error, words, backend):
    em = lf.LASEM(_net(Own(function)), backend=backend)
    for samples in (4, 1):
        x, y = batch(samples)
        with pytest.raises(error, match=words):
            em(x, y, "a")


def test_the_stage_is_named_behind_a_stage_that_dropout_cuts():
    later = []
    stages = [
        nn.Sequential(nn.Conv2d(2, 3, 3, padding=1), nn.Dropout(0.5), Residual(3)),
        Own(lambda h, _: h.flatten(0, 1) if later else h),
    ]
    net = lf.TransferNet(stages)
    net.add_task("a", nn.Sequential(nn.Flatten(), nn.Linear(108, 3)))
    em = lf.LASEM(net.double())
    em(*batch(), "a")
    later.append(True)
    with pytest.raises(ValueError, match=r"stage 2 .*Own"):
        em(*batch(), "a")


def test_a_first_mini_batch_of_one_sample_shows_what_mixes_too():
    class Mixes(nn.Module):
        def forward(self, h):
            return h - 0.5 * h.mean(0)

    net = lf.TransferNet([nn.Linear(4, 3), Mixes()])
    net.add_task("a", nn.Linear(3, 2))
    with pytest.raises(ValueError, match=r"net: expected stages .* got stage 2 \(Mixes\(\)\)"):
        lf.LASEM(net, backend="torch")(torch.randn(1, 4), torch.tensor([1]), "a")


def test_dropout_of_pytorch_is_not_looked_at(monkeypatch):
    monkeypatch.delattr(first_look, "_run")
    stage = nn.Sequential(nn.Conv2d(3, 3, 1), nn.Dropout(0.5), nn.ReLU(), nn.AlphaDropout(0.5))
    lf.LASEM(_net(stage), backend="torch")(*batch(), "a")


def test_devices_that_are_not_the_inputs_keep_their_random_state(monkeypatch):
    for device in ("cuda", "xpu", "mps", "mtia"):
        monkeypatch.delattr(f"torch.{device}.manual_seed", raising=False)
        monkeypatch.delattr(f"torch.{device}.manual_seed_all", raising=False)
    lf.LASEM(_net(Own(lambda h, _: F.relu(h))), backend="torch")(*batch(), "a")
