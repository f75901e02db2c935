"""M-steps that follow the posterior: what they leave out, and that the rest is exact."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from nets import batch, cases, small_net
from oracle import assert_equals, assert_step_equals, brute_force
from row_lists import PLAIN, evaluator_of
from torch import nn

import lasem_fast as lf
from lasem_fast.backends import cpu_ops
from lasem_fast.search import search
from lasem_fast.search.m_step import MStep, drawn, pruned

needs_kernels = pytest.mark.skipif(not cpu_ops.supported(), reason=cpu_ops.why_unsupported())

MASSES = st.sampled_from([1e-6, 1e-2, 0.1, 0.3, 0.9])


def _searches(case, **options):
    """LASEMs that run the M-step in each of the ways that there are."""
    for backend in ("torch", "reference"):
        yield lf.LASEM(case.net, case.space, backend=backend, **options)
    em = lf.LASEM(case.net, case.space, backend="torch", **options)
    em._search.everything = evaluator_of(case.space, PLAIN)
    yield em
    em = lf.LASEM(case.net, case.space, backend="torch", **options)
    em._search.few.add("a")
    yield em


@settings(max_examples=30)
@given(cases(max_depth=4), MASSES)
def test_a_pruned_gradient_is_that_of_the_configurations_kept(case, mass):
    exact = brute_force(case.net, case.space.bits, case.x, case.y, "a")
    for em in _searches(case, prune=mass):
        step = em(case.x, case.y, "a")
        kept = pruned(step.posterior, mass)
        assert float(step.dropped_mass) <= mass
        assert_equals(step.posterior, exact.posterior, "posterior")
        truth = brute_force(case.net, case.space.bits, case.x, case.y, "a", posterior=kept.weights)
        truth = truth._replace(posterior=exact.posterior)
        assert_step_equals(case.net, step, truth)


def test_the_error_of_a_pruned_gradient_is_within_the_mass_dropped():
    net = small_net()
    x, y = batch(samples=1)  # few samples leave several configurations probable
    space, mass = lf.ConfigSpace(3), 0.3
    step = lf.LASEM(net, prune=mass, backend="torch")(x, y, "a")
    step.loss.backward()
    assert 0 < float(step.dropped_mass) <= mass
    exact = brute_force(net, space.bits, x, y, "a")
    alone = [
        brute_force(net, space.bits, x, y, "a", posterior=row).grads
        for row in torch.eye(len(space), dtype=torch.float64)
    ]
    for name, parameter in net.named_parameters():
        grad = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
        error = (grad - exact.grads[name]).norm()
        largest = max(float(grads[name].norm()) for grads in alone)
        assert error <= float(step.dropped_mass) * largest * (1 + 1e-12)


@settings(max_examples=20)
@given(cases(max_depth=4), st.integers(1, 5))
def test_a_drawn_gradient_is_that_of_the_draws(case, draws):
    exact = brute_force(case.net, case.space.bits, case.x, case.y, "a")
    for em in _searches(case, m_step_draws=draws):
        with torch.random.fork_rng():
            step = em(case.x, case.y, "a")
        weights = drawn(step.posterior, draws)  # the same draws: the state was put back
        truth = brute_force(
            case.net, case.space.bits, case.x, case.y, "a", posterior=weights.weights
        )
        assert_step_equals(case.net, step, truth._replace(posterior=exact.posterior))
        assert_equals(step.dropped_mass.detach(), weights.dropped_mass, "dropped_mass")


def test_draws_are_unbiased():
    torch.manual_seed(0)
    posterior = torch.tensor([0.5, 0.3, 0.15, 0.05, 0.0], dtype=torch.float64)
    rounds, draws = 4000, 3
    mean = sum(drawn(posterior, draws).weights for _ in range(rounds)) / rounds
    deviation = (posterior * (1 - posterior) / (rounds * draws)).sqrt()
    assert bool(((mean - posterior).abs() <= 5 * deviation).all())


def test_pruning_drops_the_least_probable_first():
    posterior = torch.tensor([0.1, 0.6, 0.05, 0.25])
    assert pruned(posterior, 0.16).weighs.tolist() == [False, True, False, True]
    assert pruned(posterior, 0.14).weighs.tolist() == [True, True, False, True]
    assert pruned(posterior, 0.01).weighs.tolist() == [True] * 4
    assert float(pruned(posterior, 0.16).dropped_mass) == pytest.approx(0.15)
    below_one = torch.tensor([0.4999, 0.5])
    assert pruned(below_one, 1 - 1e-12).weighs.tolist() == [False, True]


@pytest.mark.parametrize("backend", ["reference", "torch", "cpp"])
@pytest.mark.parametrize("prior", ["count", "mean_posterior"])
def test_with_nothing_to_leave_out_a_step_is_the_exact_one(backend, prior):
    if lf.backends()[backend] != "available":
        pytest.skip(lf.backends()[backend])
    results = []
    for mass in (0.0, 1e-30):
        torch.manual_seed(0)
        net = small_net(dtype=torch.float32)
        em = lf.LASEM(net, backend=backend, prior=prior, prune=mass)
        for seed in (1, 2):  # the second one sees what the prior has counted
            net.zero_grad()
            step = em(*batch(seed=seed, dtype=torch.float32), "a")
            step.loss.backward()
        assert float(step.dropped_mass) == 0
        gradients = [p.grad for p in net.parameters()]
        results.append([step.loss, step.posterior, step.nll, em.prior("a"), *gradients])
    for exact, pruned_ in zip(*results, strict=True):
        assert torch.equal(exact, pruned_)


@needs_kernels
@pytest.mark.parametrize("likelihood", ["joint", "mean"])
@pytest.mark.parametrize("options", [{"prune": 0.3}, {"m_step_draws": 3}], ids=str)
def test_a_fused_head_scores_once_and_follows_what_is_kept(options, likelihood, monkeypatch):
    """In float64 the levels are PyTorch's, so that only the head is the kernel's."""
    net = small_net()
    x, y = batch(samples=1)  # few samples leave several configurations probable
    em = lf.LASEM(net, backend="cpp", likelihood=likelihood, **options)
    exact = brute_force(net, em.space.bits, x, y, "a", likelihood=likelihood)
    calls = []
    head = cpu_ops._posterior_head
    monkeypatch.setattr(search, "evidence", lambda *_: pytest.fail("scored a second time"))
    monkeypatch.setattr(cpu_ops, "_posterior_head", lambda *a: calls.append(a) or head(*a))
    with torch.random.fork_rng():
        step = em(x, y, "a")
    kept = MStep(options.get("prune", 0.0), options.get("m_step_draws")).weights(step.posterior)
    assert len(calls) == 1 and float(step.dropped_mass) > 0
    assert_equals(step.dropped_mass, kept.dropped_mass, "dropped_mass")
    truth = brute_force(
        net, em.space.bits, x, y, "a", likelihood=likelihood, posterior=kept.weights
    )
    assert_step_equals(net, step, truth._replace(posterior=exact.posterior))


@needs_kernels
def test_a_pruned_step_through_a_fused_head_has_gradients_of_gradients():
    net, found = small_net(extra=(nn.Tanh,)), []
    x, y = batch(samples=1)
    x.requires_grad_()
    for backend in ("cpp", "reference"):
        loss = lf.LASEM(net, backend=backend, prune=0.3)(x, y, "a").loss
        (first,) = torch.autograd.grad(loss, x, create_graph=True)
        found.append((first.detach(), *torch.autograd.grad(first.square().sum(), x)))
    for got, want in zip(*found, strict=True):
        assert_equals(got, want, "gradient")


@needs_kernels
def test_what_overflows_is_left_out_of_a_pruned_step_through_a_fused_head():
    net = small_net()
    x, y = batch(samples=1)
    with torch.no_grad():
        net.shared[0][0].weight.mul_(1e200)
        net.shared[1][0].weight.mul_(1e200)
    steps = [lf.LASEM(net, backend=b, prune=0.3)(x, y, "a") for b in ("cpp", "reference")]
    assert bool((steps[0].posterior == 0).any()) and float(steps[0].dropped_mass) > 0
    for name, got, want in zip(steps[0]._fields, *steps, strict=True):
        assert_equals(got.detach(), want.detach(), name)


@needs_kernels
@pytest.mark.parametrize("scale", [1, 1e200])
def test_where_values_are_not_read_a_bad_step_shows_in_its_loss(scale, monkeypatch):
    net = small_net()
    x, y = batch(samples=1)
    steps = []
    for backend, prior in (("cpp", "count"), ("torch", "count"), ("cpp", None)):
        em = lf.LASEM(net, backend=backend, prior=prior or _Nothing(), prune=0.3)
        monkeypatch.setattr(em, "_reads_values", lambda x: False)
        steps.append(em(scale * scale * x, y, "a"))
    for name, got, want in zip(steps[0]._fields, *steps[:2], strict=True):
        if scale == 1 or name == "loss":
            assert_equals(got.detach().nan_to_num(7), want.detach().nan_to_num(7), name)
    assert steps[0].loss.isnan() == (scale > 1) and steps[2].loss.isnan()


class _Nothing(lf.priors.Prior):
    """Excludes every configuration."""

    def log_prob(self, task):
        return super().log_prob(task) - torch.inf


@pytest.mark.parametrize("extra", [(), (lambda: nn.Dropout(0.5),), (lambda: nn.GroupNorm(1, 3),)])
def test_what_is_not_followed_has_a_gradient_of_zeros(extra):
    """In every way of evaluating, so that optimisers with momentum or decay go on alike."""
    net = small_net(2, extra=extra)
    x, y = batch()
    posterior = torch.tensor([0.0, 0.0, 0.3, 0.7]).double()  # the first stage's own branch alone
    ems = [lf.LASEM(net, backend=b, prune=0.2) for b in ("torch", "auto", "reference")]
    ems.append(lf.LASEM(net, backend="torch", prune=0.2, max_memory=0.5))
    ems.append(lf.LASEM(net, backend="torch", prune=0.2))
    ems[-1]._search.few.add("a")
    for em in ems:
        prior = lf.LASEM(net, backend=em.backend, prior=posterior, prune=0.2,
                         max_memory=em.max_memory)  # fmt: skip
        prior._search.few = set(em._search.few)
        for frozen in (None, posterior):
            net.zero_grad()
            prior(x, y, "a", frozen).loss.backward()
            assert all(not p.grad.any() for p in net.shared[0].parameters())
            assert all(p.grad is not None for p in net.parameters())
            assert net.specific["a"][0][0].weight.grad.any()


@pytest.mark.parametrize("options", [{"prune": 0.9}, {"m_step_draws": 1}], ids=str)
@pytest.mark.parametrize("backend", ["torch", "auto"])
def test_a_validation_loss_decides_nothing(options, backend):
    """Nor does a step that fails, though it is known by then how little it follows."""

    class Failing(lf.transfer.HardParameterSharing):
        fails = False

        def auxiliary_loss(self, shared, adapters):
            if self.fails:
                raise RuntimeError("of its own")

    stage = lambda: nn.Sequential(nn.Linear(3, 3), nn.LayerNorm(3), nn.Dropout(0.5))  # noqa: E731
    net = lf.TransferNet([stage() for _ in range(4)], Failing())
    net.add_task("a", nn.Linear(3, 2))
    em = lf.LASEM(net, backend=backend, **options)
    x, y = torch.randn(40, 3), torch.arange(40) % 2
    before = em.state_dict()["_extra_state"]
    em.eval()
    em(x, y, "a")
    em.train()
    net.mechanism.fails = True
    with pytest.raises(RuntimeError, match="of its own"):
        em(x, y, "a")
    assert not em._search.few and torch.equal(before, em.state_dict()["_extra_state"])
    net.mechanism.fails = False
    em(x, y, "a")
    assert em._search.few == {"a"}


def test_a_reused_posterior_that_overflows_is_inferred_anew():
    net = lf.TransferNet([nn.Sequential(nn.Linear(2, 2, bias=False))])
    net.add_task("a", nn.Linear(2, 2))
    with torch.no_grad():
        net.shared[0][0].weight.copy_(1e30 * torch.eye(2))
        net.specific["a"][0][0].weight.copy_(-torch.eye(2))
        net.heads["a"].weight.copy_(torch.eye(2))
        net.heads["a"].bias.zero_()
    em = lf.LASEM(net, backend="torch", e_step_every=3)
    x, y = torch.tensor([[1.0, -1.0]] * 80), torch.zeros(80, dtype=torch.int64)
    found = [em(factor * x, y, "a").posterior.tolist() for factor in (1, 1e10, 1e10, 1e10, 1)]
    assert found == [[1, 0], [0, 1], [0, 1], [0, 1], [1, 0]]
    assert em._prior.states["a"].wins.tolist() == [2, 1]
    with pytest.raises(ValueError, match="posterior: expected weight above 0"):
        em(1e10 * x, y, "a", torch.tensor([1.0, 0.0]))


def test_dropout_goes_with_pruning():
    net = small_net(extra=(lambda: nn.Dropout(0.5),))
    x, y = batch()
    em = lf.LASEM(net, backend="torch", prune=0.2)
    exact = lf.LASEM(net, backend="torch")
    torch.manual_seed(3)
    step = em(x, y, "a")
    assert_equals(step.posterior, exact(x, y, "a").posterior, "posterior")
    step.loss.backward()


def test_a_posterior_is_reused_and_counted_once():
    net = small_net()
    em = lf.LASEM(net, backend="torch", e_step_every=3)
    drawn_batches = [batch(seed=seed) for seed in range(1, 8)]
    steps = [em(x, y, "a") for x, y in drawn_batches]
    for i, step in enumerate(steps):
        assert torch.equal(step.posterior, steps[i - i % 3].posterior)
        x, y = drawn_batches[i]
        truth = brute_force(net, em.space.bits, x, y, "a", posterior=step.posterior)
        assert_step_equals(net, step, truth)
    assert int(em._prior.states["a"].wins.sum()) == 3


@pytest.mark.parametrize("backend", ["auto", "torch", "reference"])
def test_what_a_step_gives_may_be_written_to(backend):
    net = small_net(2)
    em = lf.LASEM(net, backend=backend, e_step_every=3)
    first = em(*batch(seed=1), "a").posterior.clone()
    for seed in (2, 3):
        x, y = batch(seed=seed)
        step = em(x, y, "a")
        truth = brute_force(net, em.space.bits, x, y, "a", posterior=first)
        assert_step_equals(net, step, truth)
        assert float(step.dropped_mass) == 0
        for tensor in step[1:]:
            tensor += 1


def test_a_reused_and_pruned_posterior_evaluates_what_it_follows():
    net = small_net()
    x, y = batch(samples=1)
    em = lf.LASEM(net, backend="torch", e_step_every=2, prune=0.3)
    first = em(x, y, "a")
    again = em(x, y, "a")
    kept = pruned(first.posterior, 0.3).weighs
    assert torch.equal(torch.isnan(again.nll), ~kept)
    assert_equals(again.nll[kept], first.nll[kept], "nll")
    assert torch.equal(again.dropped_mass, first.dropped_mass)


@pytest.mark.parametrize(
    "options",
    [
        {"prune": 0.2},
        {"m_step_draws": 2},
        {"e_step_every": 3},
        {"prune": 0.2, "e_step_every": 2, "max_memory": 66_000},
    ],
    ids=str,
)
def test_a_resumed_run_equals_an_uninterrupted_one(options):
    def fresh():
        torch.manual_seed(0)
        net = small_net()
        em = lf.LASEM(net, backend="torch", **options)
        return em, torch.optim.SGD(net.task_parameters("a"), lr=0.1)

    def train(em, optimizer, seeds):
        for seed in seeds:
            torch.manual_seed(seed)
            optimizer.zero_grad()
            em(*batch(seed=seed), "a").loss.backward()
            optimizer.step()

    whole, optimizer = fresh()
    train(whole, optimizer, range(9))
    half, optimizer = fresh()
    train(half, optimizer, range(4))
    resumed, optimizer = fresh()
    resumed.load_state_dict(half.state_dict())
    train(resumed, optimizer, range(4, 9))
    saved, expected = resumed.state_dict(), whole.state_dict()
    assert saved.keys() == expected.keys()
    assert all(torch.equal(saved[name], expected[name]) for name in expected)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"prune": 1.0}, r"prune: expected a posterior mass from 0 to below 1, got 1\.0"),
        ({"prune": "a"}, "prune: expected a posterior mass, got str"),
        ({"m_step_draws": 0}, "m_step_draws: expected a whole number of at least 1, got 0"),
        ({"m_step_draws": 1.5}, "m_step_draws: expected a whole number of at least 1, got float"),
        ({"m_step_draws": 1, "prune": 0.1}, "m_step_draws: expected None together with prune"),
        ({"e_step_every": 0}, "e_step_every: expected a whole number of at least 1, got 0"),
        ({"max_memory": 0}, "max_memory: expected bytes"),
        ({"max_memory": 1.5}, "max_memory: expected bytes"),
        ({"max_memory": "1 GB"}, "max_memory: expected None, bytes"),
    ],
)
def test_wrong_arguments_are_named(options, message):
    with pytest.raises((TypeError, ValueError), match=message):
        lf.LASEM(small_net(), **options)


def test_a_budget_that_cannot_be_met_says_what_the_least_is():
    em = lf.LASEM(small_net(), backend="torch", max_memory=1000)
    with pytest.raises(ValueError, match=r"max_memory: expected at least \d+ bytes") as refused:
        em(*batch(), "a")
    least = int(str(refused.value).split("at least ")[1].split()[0])
    em = lf.LASEM(small_net(), backend="torch", max_memory=least)
    em(*batch(), "a").loss.backward()


@pytest.mark.parametrize("transfer", ["hps", "tf"])
def test_a_bounded_search_may_be_asked_in_inference_mode_first(transfer):
    def net():
        torch.manual_seed(0)
        made = lf.TransferNet(list(small_net().shared), transfer)
        made.add_task("a", nn.Sequential(nn.Flatten(), nn.Linear(108, 3)))
        return made.double()

    x, y = batch()
    em = lf.LASEM(net(), backend="torch", max_memory=66_000)
    with torch.inference_mode():
        em(x, y, "a")
    step, exact = em(x, y, "a"), lf.LASEM(net(), backend="torch")(x, y, "a")
    assert_equals(step.loss.detach(), exact.loss.detach(), "loss")
    step.loss.backward()
