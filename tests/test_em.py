"""LASEM: the step in a training loop, tasks beginning, alternating, ending and coming back."""

from __future__ import annotations

import copy
import warnings

import numpy as np
import pytest
import torch
from nets import batch, small_net
from oracle import assert_equals, assert_step_equals, brute_force, logits_of
from torch import nn
from torch.nn import functional as F
from torch.nn.utils import parametrizations, parametrize
from torch.utils.checkpoint import checkpoint

import lasem_fast as lf
from lasem_fast.networks import checks


def _train(em, task, steps, optimizer=None, seed=0):
    optimizer = optimizer or torch.optim.SGD(em.net.task_parameters(task), lr=0.1)
    for i in range(steps):
        x, y = batch(seed=seed + i)
        optimizer.zero_grad()
        em(x, y, task=task).loss.backward()
        optimizer.step()


def _shared(net):
    return [p.detach().clone() for p in net.shared.parameters()]


def _same(a, b):
    return all(torch.equal(p, q) for p, q in zip(a, b, strict=True))


def _state(em):
    return copy.deepcopy(em.state_dict())


def _same_state(a, b):
    if list(a) != list(b):
        return False
    return all(
        torch.equal(a[k], b[k]) if isinstance(a[k], torch.Tensor) else a[k] == b[k] for k in a
    )


def test_the_documented_loop():
    net = small_net(2)
    em = lf.LASEM(net)
    optimizer = torch.optim.Adam(net.task_parameters("a"))
    x, y = batch()
    losses = []
    for _ in range(30):
        optimizer.zero_grad()
        step = em(x, y, task="a")
        step.loss.backward()
        optimizer.step()
        losses.append(float(step.loss))
    assert losses[-1] < losses[0]
    assert all(not t.requires_grad for t in step[1:])
    assert (step.posterior.shape, step.dropped_mass.shape, float(step.dropped_mass)) == (
        (4,),
        (),
        0,
    )
    config = em.end_task("a")
    assert config == em.best_config("a") == net.config("a") and len(config) == 2
    assert_equals(net(x, task="a").detach(), logits_of(net, config, x, "a").detach(), "logits")


@pytest.mark.parametrize("config", [{1, 2, 3}, {1}, {3}, set()])
def test_end_of_a_task_rolls_back_what_it_does_not_share(config):
    net = small_net(3)
    em = lf.LASEM(net)
    before = _shared(net)
    _train(em, "a", 3)
    after = _shared(net)
    assert not _same(before, after)
    bits = em.end_task("a", config)
    for i, shared in enumerate(bits):
        expected = (after if shared else before)[2 * i : 2 * i + 2]
        assert _same(net.shared[i].parameters(), expected)
        assert (net.specific["a"][i] is None) == shared


def test_the_next_task_starts_from_what_the_last_one_left():
    net = small_net(2, tasks=("a", "b"))
    em = lf.LASEM(net)
    _train(em, "a", 3)
    em.end_task("a", {1})
    between = _shared(net)
    _train(em, "b", 3, seed=5)
    em.end_task("b", set())
    assert _same(between, _shared(net))


def test_tasks_that_alternate_keep_their_own_priors_and_take_back_their_own_changes():
    net = small_net(2, tasks=("a", "b"))
    em = lf.LASEM(net)
    before = _shared(net)
    optimizers = {t: torch.optim.SGD(net.task_parameters(t), lr=0.1) for t in ("a", "b")}
    changes = {t: [torch.zeros_like(p) for p in before] for t in ("a", "b")}
    for i, task in enumerate("abbabaab"):
        last = _shared(net)
        _train(em, task, 1, optimizers[task], seed=i)
        for change, new, old in zip(changes[task], _shared(net), last, strict=True):
            change += new - old
    assert [int(em._prior.states[t].wins.sum()) for t in "ab"] == [4, 4]
    last = _shared(net)
    em.end_task("a", {2})
    for now, then, change in list(zip(_shared(net), last, changes["a"], strict=True))[:2]:
        assert_equals(now, then - change, "stage 1 without what a did")
    assert _same(_shared(net)[2:], last[2:])
    em.end_task("b", {2})
    assert _same(_shared(net)[:2], before[:2])


def test_alternating_tasks_that_share_nothing_leave_the_shared_weights_as_they_were():
    net = small_net(2, tasks=("a", "b"))
    em = lf.LASEM(net)
    before = _shared(net)
    for i, task in enumerate("abab"):
        _train(em, task, 1, seed=i)
    em.end_task("b", set())
    _train(em, "a", 2)
    em.end_task("a", set())
    assert _same(before, _shared(net))


def test_ending_a_task_without_a_step_touches_nothing():
    net = small_net(2, tasks=("a", "b"))
    em = lf.LASEM(net)
    _train(em, "a", 2)
    after = _shared(net)
    assert em.end_task("b") == (True, True)
    em_b = net.config("b")
    assert em_b == (True, True) and _same(after, _shared(net))


def test_a_task_that_comes_back_trains_its_configuration_and_keeps_what_it_learns():
    net = small_net(2, tasks=("a", "b"))
    em = lf.LASEM(net)
    _train(em, "a", 2)
    em.end_task("a", {1})
    prior = em.prior("a")
    x, y = batch(seed=9)
    step = em(x, y, task="a")
    net.zero_grad()
    step.loss.backward()
    assert step.posterior.tolist() == [0, 1, 0, 0] and torch.equal(em.prior("a"), prior)
    assert torch.isinf(step.log_likelihood).tolist() == [True, False, True, True]
    grads = [p.grad.clone() for p in net.task_parameters("a")]
    loss = nn.functional.cross_entropy(net(x, task="a"), y)
    expected = torch.autograd.grad(loss, net.task_parameters("a"))
    assert_equals(step.loss.detach(), loss.detach(), "loss")
    for grad, truth in zip(grads, expected, strict=True):
        assert_equals(grad, truth, "gradient")
    # in the middle of task b, whose changes are taken back while a's stay
    _train(em, "b", 1)
    middle = _shared(net)
    _train(em, "a", 2)
    learnt = [new - old for new, old in zip(_shared(net), middle, strict=True)]
    start = _shared(net)
    _train(em, "b", 1)
    em.end_task("b", set())
    assert any(float(c.abs().max()) > 0 for c in learnt) and not _same(start, _shared(net))


@pytest.mark.parametrize("interrupt", [1, 3, 5])
def test_resumed_run_equals_the_uninterrupted_one_bit_for_bit(interrupt, tmp_path):
    def run(stop=None):
        torch.manual_seed(3)
        net = small_net(2, tasks=("a", "b"), extra=(lambda: nn.Dropout(0.2),), dtype=torch.float32)
        em = lf.LASEM(net, prior="mean_posterior")
        optimizers = {t: torch.optim.Adam(net.task_parameters(t)) for t in "ab"}
        start = 0
        if stop is not None and (tmp_path / "run.pt").exists():
            saved = torch.load(tmp_path / "run.pt", weights_only=True)
            em.load_state_dict(saved["em"])
            optimizers = {t: torch.optim.Adam(net.task_parameters(t)) for t in "ab"}
            for t in "ab":
                optimizers[t].load_state_dict(saved[t])
            torch.set_rng_state(saved["rng"])
            start = stop
        for i, task in enumerate("aabaXbb"):
            if i < start:
                continue
            if i == stop and start == 0:
                state = {t: optimizers[t].state_dict() for t in "ab"}
                state |= {"em": em.state_dict(), "rng": torch.get_rng_state()}
                torch.save(state, tmp_path / "run.pt")
                return None
            if task == "X":
                em.end_task("a", {2})
                optimizers["a"] = torch.optim.Adam(net.task_parameters("a"))
                continue
            x, y = batch(seed=i, dtype=torch.float32)
            optimizers[task].zero_grad()
            em(x, y, task=task).loss.backward()
            optimizers[task].step()
        em.end_task("b")
        return _state(em)

    whole = run()
    assert run(stop=interrupt) is None
    assert _same_state(run(stop=interrupt), whole)


def test_loading_needs_the_same_tasks_and_the_same_space():
    em = lf.LASEM(small_net(2))
    _train(em, "a", 1)
    state = em.state_dict()
    with pytest.raises((ValueError, RuntimeError), match="add_task"):
        lf.LASEM(small_net(2, tasks=("b",))).load_state_dict(state)
    with pytest.raises((ValueError, RuntimeError), match="same space"):
        lf.LASEM(small_net(2), lf.ConfigSpace(2, groups=[2])).load_state_dict(state)


def test_loading_an_earlier_state_brings_dropped_branches_back():
    net = small_net(2)
    em = lf.LASEM(net)
    _train(em, "a", 2)
    state = _state(em)
    em.end_task("a", {1})
    em.load_state_dict(state)
    assert net.config("a") is None and _same_state(em.state_dict(), state)
    em.end_task("a", {2})


def test_the_state_moves_and_copies_with_the_module():
    em = lf.LASEM(small_net(2), prior="mean_posterior")
    _train(em, "a", 2)
    twin = copy.deepcopy(em)
    x, y = batch()
    assert torch.equal(twin(x, y, "a").posterior, em(x, y, "a").posterior)
    assert _same_state(twin.state_dict(), em.state_dict())
    em.float()
    assert em(x.float(), y, "a").loss.dtype == torch.float32


BAD_CALLS = [
    (lambda x, y: (x[:0], y[:0], "a"), ValueError, "x: expected at least one sample"),
    (lambda x, y: (x, y[:-1], "a"), ValueError, "y: expected one target for each of the 4"),
    (lambda x, y: (x, y[:, None][:, :0], "a"), ValueError, r"y: expected .* got shape \[4, 0\]"),
    (
        lambda x, y: (x, y + 1, "a"),
        ValueError,
        r"y: expected class labels in 0..2 .* got labels from 1 to 3",
    ),
    (lambda x, y: (x, y - 1, "a"), ValueError, "y: expected class labels in 0..2"),
    (lambda x, y: (x, y.double(), "a"), TypeError, "y: expected class labels of dtype torch.int64"),
    (lambda x, y: (x, y.int(), "a"), TypeError, "y: expected class labels of dtype torch.int64"),
    (lambda x, y: (x, y.unsqueeze(1), "a"), ValueError, r"y: expected class labels of shape \[4\]"),
    (lambda x, y: (x, y, "z"), ValueError, r"task: expected one of \['a'\], got 'z'"),
    (lambda x, y: (x, y, None), TypeError, "task: expected a name"),
    (lambda x, y: (x.tolist(), y, "a"), TypeError, "x: expected a tensor"),
    (lambda x, y: (x, y.tolist(), "a"), TypeError, "y: expected a tensor"),
    (lambda x, y: (x[:, :1], y, "a"), ValueError, r"x: .*\[4, 1, 6, 6\].*stage 1 .*cannot take"),
    (lambda x, y: (x[..., :4], y, "a"), ValueError, "the head of task 'a' cannot take"),
    (lambda x, y: (x.float(), y, "a"), ValueError, "torch.float32"),
    (lambda x, y: (x * torch.nan, y, "a"), ValueError, "x: expected finite values, got 288"),
    (lambda x, y: (x / 0, y, "a"), ValueError, "x: expected finite values"),
    (lambda x, y: (x, y, "a", torch.ones(4)), ValueError, "posterior: expected weights"),
    (lambda x, y: (x, y, "a", torch.ones(3) / 3), ValueError, r"posterior: expected shape \[4\]"),
    (
        lambda x, y: (x, y, "a", torch.tensor([2.0, -1, 0, 0])),
        ValueError,
        "posterior: expected weights",
    ),
    (lambda x, y: (x, y, "a", [1, 0, 0, 0]), TypeError, "posterior: expected a tensor"),
]


@pytest.mark.parametrize("backend", ["torch", "reference"])
@pytest.mark.parametrize("started", [False, True])
@pytest.mark.parametrize(("arguments", "error", "words"), BAD_CALLS)
def test_bad_input_is_refused_before_anything_changes(backend, started, arguments, error, words):
    em = lf.LASEM(small_net(2), backend=backend)
    if started:
        _train(em, "a", 1)
    before = _state(em)
    with pytest.raises(error, match=words):
        em(*arguments(*batch()))
    assert _same_state(before, em.state_dict())
    _train(em, "a", 1)


class _Masked(nn.Linear):
    def forward(self, h, mask):
        return super().forward(h) * mask


@pytest.mark.parametrize("backend", ["torch", "auto", "reference"])
@pytest.mark.parametrize("place", [0, 1, "head"])
def test_what_cannot_be_called_with_one_tensor_is_refused_by_name(place, backend):
    stages = [nn.Linear(3, 3), nn.Linear(3, 3), nn.Linear(3, 3)]
    stages[2 if place == "head" else place] = _Masked(3, 3)
    net = lf.TransferNet(stages[:2])
    net.add_task("a", stages[2])
    em, x, y = lf.LASEM(net, backend=backend), torch.randn(4, 3), torch.tensor([0, 1, 2, 0])
    where = "the head of task 'a'" if place == "head" else f"stage {place + 1}"
    words = rf"net: expected stages .* one tensor, got {where} \(_Masked.*'mask'.*passes the rest"
    for call in (lambda: em(x, y, "a"), lambda: em.evaluate(x, "a"), lambda: net(x, "a", {1, 2})):
        with pytest.raises(TypeError, match=words):
            call()
    masked = net.heads["a"] if place == "head" else net.shared[place]
    masked.register_forward_pre_hook(lambda layer, given: (*given, torch.ones(3)))
    net(x, "a", {1, 2})
    masked.register_forward_pre_hook(lambda layer, given: given[:1])
    with pytest.raises(TypeError, match="required positional argument: 'mask'"):
        net(x, "a", {1, 2})


def test_a_message_shows_so_much_of_a_module():
    large = nn.Sequential(*[nn.Linear(3, 3) for _ in range(50)])
    assert checks.name_of(nn.Linear(3, 3)) == "Linear(in_features=3, out_features=3, bias=True)"
    shown = checks.name_of(large)
    assert shown.startswith("Sequential( (0): Linear(in_features=3") and shown.endswith(" ...)")
    assert len(shown) < 250


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_weights_that_are_not_finite_are_refused_by_name(value):
    net = small_net(2)
    em = lf.LASEM(net)
    with torch.no_grad():
        net.specific["a"][1][0].bias[1] = value
    before = _state(em)
    with pytest.raises(
        ValueError, match=r"net: expected finite weights, .*specific\['a'\].1.0.bias"
    ):
        em(*batch(), "a")
    assert list(before) == list(em.state_dict())


@pytest.mark.parametrize(
    ("head", "words"),
    [
        (lambda: nn.Flatten(0), r"head of task 'b': expected logits \[N, K\]"),
        (lambda: nn.Flatten(), "y: expected class labels in 0..107"),
        (lambda: nn.Conv2d(3, 2, 1), r"head: expected logits \[N, K\] for classification"),
    ],
)
def test_a_head_with_the_wrong_output_is_refused(head, words):
    net = small_net(2)
    net.add_task("b", head().double())
    x, y = batch()
    with pytest.raises(ValueError, match=words):
        lf.LASEM(net)(x, y + 200, "b")


@pytest.mark.parametrize(
    ("call", "error", "words"),
    [
        (lambda n: lf.LASEM(nn.ReLU()), TypeError, "net: expected a TransferNet"),
        (
            lambda n: lf.LASEM(n, lf.ConfigSpace(3)),
            ValueError,
            "space: expected .* 2 stages, got depth 3",
        ),
        (lambda n: lf.LASEM(n, 4), TypeError, "space: expected a ConfigSpace"),
        (lambda n: lf.LASEM(n, likelihood="x"), ValueError, "likelihood: expected one of"),
        (lambda n: lf.LASEM(n, likelihood=3), TypeError, "likelihood: expected one of"),
        (lambda n: lf.LASEM(n, prior="x"), ValueError, "prior: expected one of"),
        (lambda n: lf.LASEM(n, prior=3), TypeError, "prior: expected one of"),
        (lambda n: lf.LASEM(n, prior=torch.ones(3)), ValueError, "prior: expected 4 probabilities"),
        (lambda n: lf.LASEM(n, prior=-torch.ones(4)), ValueError, "prior: expected finite"),
        (lambda n: lf.LASEM(n, backend="x"), ValueError, "backend: expected one of"),
        (lambda n: lf.LASEM(n, backend=3), TypeError, "backend: expected a name"),
        (lambda n: lf.LASEM(n).end_task("z"), ValueError, "task: expected one of"),
        (lambda n: lf.LASEM(n).end_task("a", {3}), ValueError, "config: expected a set of stages"),
        (lambda n: lf.LASEM(n).evaluate(batch()[0], "z"), ValueError, "task: expected one of"),
    ],
)
def test_bad_arguments_are_refused_in_words(call, error, words):
    with pytest.raises(error, match=words):
        call(small_net(2))


def test_settings_are_what_it_was_made_of():
    em = lf.LASEM(small_net(2), prune=np.float32(0.25), max_memory=np.int64(2**30))
    assert (em.prune, em.max_memory, em.m_step_draws, em.e_step_every) == (0.25, 2**30, None, 1)
    names = ("space", "likelihood", "backend", "max_memory", "prune", "m_step_draws",
             "e_step_every")  # fmt: skip
    for name in names:
        with pytest.raises(AttributeError):
            setattr(em, name, getattr(em, name))


@pytest.mark.parametrize("value", [2, -1, "yes", None, torch.ones(2, dtype=torch.bool)])
@pytest.mark.parametrize("name", ["validate", "redraw_unclaimed"])
def test_flags_are_true_or_false(name, value):
    assert getattr(lf.LASEM(small_net(2), **{name: np.True_}), name) is True
    with pytest.raises(TypeError, match=f"{name}: expected True or False, got"):
        lf.LASEM(small_net(2), **{name: value})


def test_a_task_ends_without_a_mini_batch_with_a_warning():
    em = lf.LASEM(small_net(2, tasks=("a", "b", "c")))
    with pytest.warns(UserWarning, match="at least one mini-batch in training mode, got 'a'"):
        assert em.end_task("a") == (True, True)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        em.end_task("b", {1})
        em(*batch(), "c")
        em.end_task("c")


@pytest.mark.parametrize("backend", ["torch", "auto"])
def test_an_ensemble_under_vmap(backend):
    ems = [lf.LASEM(small_net(2), prior="uniform", backend=backend) for _ in range(2)]
    weights, _ = torch.func.stack_module_state([em.net for em in ems])
    x, y = batch()

    def loss(weights):
        named = {f"net.{name}": weight for name, weight in weights.items()}
        return torch.func.functional_call(ems[0], named, (x, y, "a")).loss

    found = torch.func.vmap(loss)(weights)
    want = torch.stack([em(x, y, "a").loss for em in ems])
    torch.testing.assert_close(found, want)


@pytest.mark.parametrize("backend", ["torch", "auto"])
def test_a_default_device_of_one_step_is_not_that_of_the_next(backend):
    em = lf.LASEM(small_net(2), lf.ConfigSpace(2, [2]), prune=0.1, backend=backend)
    x, y = batch()
    with torch.device("meta"):
        em(x, y, "a").loss.backward()
    em(x, y, "a").loss.backward()


@pytest.mark.parametrize("backend", ["torch", "auto"])
def test_a_likelihood_with_a_method_of_its_own(backend):
    likelihood = lf.likelihoods.Joint()
    own = likelihood.log_prob
    likelihood.log_prob = lambda output, y: own(2 * output, y)
    em = lf.LASEM(small_net(2), likelihood=likelihood, backend=backend)
    other = lf.LASEM(em.net, likelihood=likelihood, backend="reference")
    torch.testing.assert_close(em(*batch(), "a").nll, other(*batch(), "a").nll)


def test_an_ended_task_is_refused_where_its_branches_would_be_needed():
    em = lf.LASEM(small_net(2))
    em.end_task("a")
    x, y = batch()
    for call in (
        lambda: em.end_task("a"),
        lambda: em.evaluate(x, "a"),
        lambda: em(x, y, "a", posterior=torch.ones(4, dtype=torch.float64) / 4),
    ):
        with pytest.raises(ValueError, match="ended"):
            call()


def test_a_prior_without_mass_on_any_usable_configuration_is_refused():
    net = small_net(2)
    with torch.no_grad():
        for stage in net.specific["a"]:
            for p in stage.parameters():
                p *= 1e300
    em = lf.LASEM(net, prior=torch.tensor([0.0, 0.0, 0.0, 1.0]))
    before = _state(em)
    with pytest.raises(ValueError, match="prior: expected probability above 0"):
        em(*batch(), "a")
    assert _same_state(before, em.state_dict())


def test_validate_off_the_host_shows_as_nan_loss_and_keeps_the_posterior_usable(monkeypatch):
    net = small_net(2)
    with torch.no_grad():
        for stage in net.specific["a"]:
            for p in stage.parameters():
                p *= 1e300
    em = lf.LASEM(net, backend="torch")
    monkeypatch.setattr(lf.LASEM, "_reads_values", lambda self, x: False)
    x, y = batch()
    step = em(x, y, "a")
    truth = brute_force(net, em.space.bits, x, y, "a")
    assert bool(torch.isnan(step.loss)) and float(step.posterior[3]) == 0
    assert_equals(step.posterior, truth.posterior, "posterior")
    assert bool(torch.isnan(em(x, y + 7, "a").loss))
    assert int(em._prior.states["a"].wins.sum()) == 1


def test_backends_say_what_is_there():
    found = lf.backends()
    assert found["reference"] == found["torch"] == "available"
    for name, says in found.items():
        if says != "available":
            with pytest.raises(RuntimeError, match=f"backend '{name}': {says[:20]}"):
                lf.LASEM(small_net(1), backend=name)


@pytest.mark.parametrize("prior", ["count", "mean_posterior"])
def test_a_first_call_in_inference_mode_does_not_spoil_the_next(prior):
    em = lf.LASEM(small_net(2), prior=prior)
    state = lf.LASEM(small_net(2), prior=prior)
    _train(state, "a", 1)
    with torch.inference_mode():
        em(*batch(), "a")
        em.prior("a")
    _train(em, "a", 2)
    with torch.inference_mode():
        em.load_state_dict(state.state_dict())
    _train(em, "a", 2)
    em.end_task("a", set())


def test_a_net_that_is_put_into_training_mode_without_its_lasem_is_told():
    em = lf.LASEM(small_net(2))
    _train(em, "a", 1)
    before = em.eval().prior("a")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        em(*batch(), "a")
        em.net.train()
        with torch.no_grad():
            em(*batch(), "a")
        em.train().net.eval()  # frozen layers
        em(*batch(), "a", before)
        em.eval().net.train()
    with pytest.warns(UserWarning, match="em: expected the mode of its net") as caught:
        em(*batch(), "a")
    assert caught[0].filename == __file__
    assert torch.equal(em.prior("a"), before)


def test_a_first_call_that_fails_leaves_no_prior_behind_and_a_later_one_no_count():
    class Fails(lf.transfer.HardParameterSharing):
        fails = True

        def auxiliary_loss(self, shared, adapters):
            if self.fails:
                raise ArithmeticError("no such loss")

    net = lf.TransferNet(list(small_net(2).shared), Fails())
    net.add_task("a", nn.Sequential(nn.Flatten(), nn.Linear(108, 3)).double())
    for backend in ("auto", "torch", "reference"):
        em = lf.LASEM(net, backend=backend)
        for _ in range(2):
            before = _state(em)
            with pytest.raises(ArithmeticError):
                em(*batch(), "a")
            assert _same_state(before, em.state_dict())
            net.mechanism.fails = False
            _train(em, "a", 1)
            net.mechanism.fails = True


def test_what_is_made_later_is_not_listed_but_moves_and_saves():
    em = lf.LASEM(small_net(2, tasks=("a", "b")), prior="mean_posterior")
    before = [name for name, _ in em.named_buffers()]
    for i, task in enumerate("abab"):
        _train(em, task, 1, seed=i)
    assert [name for name, _ in em.named_buffers()] == before
    saved = "".join(em.state_dict())
    assert "_prior.states.task_b.total" in saved and "_rollback.changes.task_a" in saved


@pytest.mark.parametrize("use_buffers", [False, True])
def test_an_averaged_model_made_before_the_first_step(use_buffers):
    em = lf.LASEM(small_net(2, tasks=("a", "b")))
    averaged = torch.optim.swa_utils.AveragedModel(em, use_buffers=use_buffers)
    seen = []
    for i, task in enumerate("aabab"):
        _train(em, task, 1, seed=i)
        averaged.update_parameters(em)
        seen.append([p.detach().clone() for p in em.net.parameters()])
    for got, *values in zip(averaged.module.net.parameters(), *seen, strict=True):
        assert_equals(got.detach(), torch.stack(values).mean(0), "mean weight")
    x, _ = batch()
    assert averaged.module.net(x, "a", config=em.best_config("a")).shape == (4, 3)


class _Broken(lf.priors.Prior):
    def __init__(self, values):
        super().__init__()
        self.values = torch.tensor(values)

    def log_prob(self, task):
        return self.values


@pytest.mark.parametrize("backend", ["auto", "torch", "reference"])
@pytest.mark.parametrize(
    ("values", "error", "words"),
    [
        ([0.0, torch.inf, 0.0, 0.0], ValueError, "prior: expected .* below infinity, got 1 that"),
        ([0.0, torch.nan, 0.0, 0.0], ValueError, "prior: expected .* below infinity, got 1 that"),
        ([0.0, 0.0], ValueError, r"prior: expected log_prob to give shape \[4\]"),
        ([0, 0, 0, 0], TypeError, "prior: expected log_prob to give a floating-point tensor"),
    ],
)
def test_a_prior_that_is_no_probability_is_refused(backend, values, error, words):
    em = lf.LASEM(small_net(2), prior=_Broken(values), backend=backend)
    before = _state(em)
    with pytest.raises(error, match=words):
        em(*batch(), "a")
    assert _same_state(before, em.state_dict())


@pytest.mark.parametrize("value", [complex("nan"), complex(0, float("inf"))])
def test_complex_weights_that_are_not_finite_are_refused(value):
    net = small_net(2)
    net.shared[0][0].extra = nn.Parameter(torch.ones(2, dtype=torch.complex64))
    lf.LASEM(net)(*batch(), "a")
    with torch.no_grad():
        net.shared[0][0].extra[1] = value
    with pytest.raises(ValueError, match=r"net: expected finite weights, .*shared.0.0.extra"):
        lf.LASEM(net)(*batch(), "a")


def _without_state(em, x, y, kind):
    if kind == "evaluation":
        em.eval()
        step = em(x, y, "a")
        em.train()
        return step
    with torch.no_grad() if kind == "no_grad" else torch.inference_mode():
        return em(x, y, "a")


@pytest.mark.parametrize("kind", ["evaluation", "no_grad", "inference_mode"])
@pytest.mark.parametrize("prior", ["count", "mean_posterior", "historic"])
@pytest.mark.parametrize("backend", ["auto", "torch", "reference"])
def test_a_validation_loss_changes_no_state(kind, prior, backend):
    x, y = batch(dtype=torch.float32)
    em = lf.LASEM(small_net(2, dtype=torch.float32), prior=prior, backend=backend)
    twin = copy.deepcopy(em)
    for started in (False, True):
        before = _state(em)
        step = _without_state(em, x, y, kind)
        assert _same_state(before, em.state_dict()) and em._rollback.is_idle is not started
        expected = twin(x, y, "a")
        assert torch.equal(step.posterior, expected.posterior)
        assert torch.equal(step.loss, expected.loss)
        em(x, y, "a").loss.backward()  # a first call under inference_mode poisons nothing
        assert _same_state(em.state_dict(), twin.state_dict())
    em.end_task("a", {1})
    before = _state(em)
    _without_state(em, x, y, kind)
    assert _same_state(before, em.state_dict())


class Scaled8(nn.Module):
    """Takes samples in 8 bits, and holds a constant in 8 bits."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(2, 3)
        scale = torch.full((2,), 0.5).to(torch.float8_e4m3fn)
        self.scale = nn.Parameter(scale, requires_grad=False)

    def forward(self, h):
        return self.layer(h.double() * self.scale.double())


@pytest.mark.parametrize("samples", [1, 4])
@pytest.mark.parametrize("backend", ["auto", "torch", "reference"])
def test_samples_and_constants_in_8_bits(backend, samples):
    net = lf.TransferNet([Scaled8(), nn.Linear(3, 3)])
    net.add_task("a", nn.Linear(3, 3))
    for parameter in net.parameters():
        parameter.data = parameter.data.double() if parameter.requires_grad else parameter.data
    em = lf.LASEM(net, backend=backend)
    x, y = torch.randn(samples, 2).to(torch.float8_e4m3fn), torch.arange(samples) % 3
    values = [F.log_softmax(net(x, "a", config), 1)[range(samples), y] for config in em.space.bits]
    log_likelihood = torch.stack(values).detach().sum(1)
    step = em(x, y, "a")
    assert_equals(step.log_likelihood, log_likelihood, "log-likelihood")
    step.loss.backward()
    assert all(p.grad is not None for p in net.parameters() if p.requires_grad)
    bad = torch.full((samples, 2), torch.nan).to(x.dtype)
    with pytest.raises(ValueError, match=f"x: expected finite values, got {2 * samples} that are"):
        em(bad, y, "a")


@pytest.mark.parametrize("backend", ["auto", "torch", "reference"])
def test_a_cache_that_gives_branches_the_same_weights_is_refused(backend):
    stages = [nn.Linear(2, 3), parametrizations.weight_norm(nn.Linear(3, 3))]
    net = lf.TransferNet(stages)
    net.add_task("a", nn.Linear(3, 3))
    em = lf.LASEM(net.double(), backend=backend)
    x, y = torch.randn(4, 2, dtype=torch.float64), torch.tensor([0, 1, 2, 0])
    before = list(em.state_dict())
    calls = (lambda: em(x, y, "a"), lambda: em.evaluate(x, "a"), lambda: net(x, "a", 0))
    for call in calls:
        with parametrize.cached(), pytest.raises(ValueError, match=r"outside of .*cached\(\)"):
            call()
    assert list(em.state_dict()) == before
    assert_step_equals(net, em(x, y, "a"), brute_force(net, em.space.bits, x, y, "a"))
    with parametrize.cached():
        lf.LASEM(small_net(2), backend=backend)(*batch(), "a")  # nothing is parametrised


@pytest.mark.parametrize("backend", ["auto", "torch", "reference"])
def test_a_step_inside_a_checkpoint_infers_once_or_is_refused(backend):
    em, (x, y) = lf.LASEM(small_net(2), backend=backend), batch()
    before = list(em.state_dict())
    x.requires_grad_()
    with pytest.raises(ValueError, match=r"em: expected a step .* outside of torch\.utils"):
        checkpoint(lambda x: em(x, y, "a").loss, x, use_reentrant=False)
    assert list(em.state_dict()) == before
    truth = brute_force(em.net, em.space.bits, x, y, "a")
    for options in ({"use_reentrant": True}, {"use_reentrant": False, "posterior": True}):
        posterior = truth.posterior if options.pop("posterior", False) else None
        em.net.zero_grad()
        checkpoint(lambda x, p=posterior: em(x, y, "a", p).loss, x, **options).backward()
        for name, parameter in em.net.named_parameters():
            assert_equals(parameter.grad, truth.grads[name], f"gradient of {name}")


def test_a_frozen_posterior_in_a_validation_loss_changes_no_state():
    em = lf.LASEM(small_net(2))
    with torch.no_grad():
        em(*batch(), "a", posterior=torch.ones(4, dtype=torch.float64) / 4)
    assert em._rollback.is_idle and "a" not in em._prior.states


@pytest.mark.parametrize(("arguments", "error", "words"), BAD_CALLS)
def test_a_refused_call_draws_no_random_numbers(arguments, error, words):
    em = lf.LASEM(small_net(2, extra=(lambda: nn.Dropout(0.5),)))
    state = torch.get_rng_state()
    with pytest.raises(error, match=words):
        em(*arguments(*batch()))
    assert torch.equal(state, torch.get_rng_state()) and "a" not in em._prior.states


@pytest.mark.parametrize("backend", ["torch", "auto", "reference"])
def test_an_index_out_of_range_is_refused_in_words(backend):
    net = lf.TransferNet([nn.Embedding(10, 3), nn.Linear(3, 3)])
    net.add_task("a", nn.Sequential(nn.Flatten(), nn.Linear(12, 3)))
    x, y = torch.zeros(4, 4, dtype=torch.int64), torch.zeros(4, dtype=torch.int64)
    lf.LASEM(net, backend=backend)(x, y, "a")
    x[2, 1] = 12
    with pytest.raises(ValueError, match=r"x: expected .*stage 1 \(Embedding.*from 0 to 12"):
        lf.LASEM(net, backend=backend)(x, y, "a")


@pytest.mark.parametrize(
    ("arguments", "error", "words"),
    [
        (lambda x, y: (x.to_sparse(), y), TypeError, "x: expected a dense tensor, got .*sparse"),
        (lambda x, y: (x, y.to_sparse()), TypeError, "y: expected a dense tensor, got .*sparse"),
        (lambda x, y: (x.to("meta"), y), ValueError, "x: expected a tensor with values|y: .*meta"),
        (lambda x, y: (x.to("meta"), y.to("meta")), ValueError, "x: .* got one on the meta device"),
    ],
)
def test_tensors_without_plain_values_are_refused(arguments, error, words):
    em = lf.LASEM(small_net(2))
    with pytest.raises(error, match=words):
        em(*arguments(*batch()), "a")


def _old_spectral_norm(layer):
    # its weight can be copied only while it carries no graph
    with torch.no_grad():
        return nn.utils.spectral_norm(layer)


@pytest.mark.parametrize("norm", [nn.utils.parametrizations.spectral_norm, _old_spectral_norm])
@pytest.mark.parametrize("backend", ["torch", "auto", "reference"])
def test_spectral_norm_in_training_mode_is_refused_by_name(norm, backend):
    stages = [nn.Conv2d(2, 3, 3, padding=1), norm(nn.Conv2d(3, 3, 1))]
    as_it_is = lf.transfer.HardParameterSharing(init=lambda stage: None)
    net = lf.TransferNet(stages, transfer=as_it_is)
    net.add_task("a", nn.Sequential(nn.Flatten(), nn.Linear(108, 3)))
    em = lf.LASEM(net.double(), backend=backend)
    with pytest.raises(ValueError, match=r"net: expected layers .*shared.1.*spectral norm"):
        em(*batch(), "a")
    em.eval()
    em(*batch(), "a").loss.backward()


@pytest.mark.parametrize("place", [0, 1])
def test_counted_tokens_are_those_of_the_mini_batch_or_refused_by_name(place, backend):
    """The gradient of a token is over how often the batch has it, and a tree has larger batches."""
    torch.manual_seed(0)
    stages = [nn.Embedding(5, 3, scale_grad_by_freq=True), nn.Tanh()]
    stages.insert(1 - place, nn.Identity())
    net = lf.TransferNet(stages)
    net.add_task("a", nn.Sequential(nn.Flatten(), nn.Linear(6, 3)))
    x, y = torch.tensor([[0, 1], [1, 1], [4, 0]]), torch.tensor([0, 2, 1])
    em = lf.LASEM(net.double(), backend=backend)
    if place == 1:
        with pytest.raises(ValueError, match=r"shared.1 \(Embedding\), whose scale_grad_by_freq"):
            em(x, y, "a")
        return
    assert_step_equals(net, em(x, y, "a"), brute_force(net, em.space.bits, x, y, "a"))


def test_a_prior_that_is_refused_has_not_begun():
    class Own(lf.priors.Prior):
        def log_prob(self, task):
            return "certain"

        def score(self, task):
            return torch.zeros(3)

    em = lf.LASEM(small_net(2), prior=Own())
    with pytest.raises(TypeError, match=r"prior: expected log_prob .* got str"):
        em.prior("a")
    assert not list(em._prior.states)
    em._prior.start("a", 4, torch.device("cpu"))
    with pytest.raises(ValueError, match=r"prior: expected score to give \[4\] numbers"):
        em.end_task("a")


def test_a_refused_state_dict_leaves_gradients_and_random_state():
    em = lf.LASEM(small_net(2))
    _train(em, "a", 1)
    em.end_task("a", {1})
    for parameter in em.net.parameters():
        parameter.grad = torch.ones_like(parameter)
    random = torch.get_rng_state()
    with pytest.raises(RuntimeError, match="nothing"):
        em.load_state_dict({**em.state_dict(), "nothing": torch.ones(1)})
    assert all(p.grad is not None for p in em.net.parameters())
    assert torch.equal(random, torch.get_rng_state())
