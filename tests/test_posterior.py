"""Likelihoods, posterior and priors, against cases worked by hand."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from nets import batch, small_net
from oracle import assert_equals, assert_step_equals, brute_force
from torch import nn

import lasem_fast as lf
from lasem_fast.search.posterior import evidence, posterior_of

# Two samples, two configurations, two classes; the true class of both samples is 0.
P = torch.tensor([[[0.5, 0.5], [0.25, 0.75]], [[0.8, 0.2], [0.1, 0.9]]], dtype=torch.float64)
Y = torch.tensor([0, 0])


def test_joint_likelihood_is_the_product_over_the_mini_batch():
    found = evidence(P.log(), Y, lf.likelihoods.Joint())
    assert_equals(
        found.log_likelihood.exp(), torch.tensor([0.125, 0.08], dtype=torch.float64), "P(y|X,c)"
    )
    assert_equals(found.nll, -torch.tensor([0.125, 0.08], dtype=torch.float64).log() / 2, "nll")
    uniform = torch.zeros(2)
    expected = torch.tensor([0.125 / 0.205, 0.08 / 0.205], dtype=torch.float64)
    assert_equals(posterior_of(uniform, found.log_likelihood), expected, "posterior")


def test_mean_likelihood_is_the_mean_over_the_mini_batch():
    found = evidence(P.log(), Y, lf.likelihoods.Mean())
    assert_equals(
        found.log_likelihood.exp(), torch.tensor([0.375, 0.45], dtype=torch.float64), "mean p"
    )


def test_gaussian_likelihood():
    output = torch.tensor([[[1.0, 2.0]], [[0.0, 0.0]]], dtype=torch.float64)
    y = torch.tensor([[1.0, 0.0]], dtype=torch.float64)
    found = evidence(output, y, lf.likelihoods.Gaussian(sigma=2.0))
    constant = 2 * (math.log(2) + 0.5 * math.log(2 * math.pi))
    expected = torch.tensor([-4 / 8 - constant, -1 / 8 - constant], dtype=torch.float64)
    assert_equals(found.log_likelihood, expected, "log-likelihood")


def test_regression_through_the_tree():
    net = small_net(2, classes=2)
    x, _ = batch()
    y = torch.randn(4, 2, dtype=torch.float64)
    em = lf.LASEM(net, likelihood=lf.likelihoods.Gaussian(0.5), backend="torch")
    step = em(x, y, "a")
    values = []
    for config in em.space.bits:
        error = (net(x, "a", config) - y) / 0.5
        values.append((-0.5 * error**2 - math.log(0.5) - 0.5 * math.log(2 * math.pi)).sum())
    assert_equals(step.log_likelihood, torch.stack(values).detach(), "log-likelihood")
    assert_equals(step.posterior, torch.stack(values).detach().softmax(0), "posterior")


def test_float8_targets_are_refused():
    em = lf.LASEM(small_net(2), likelihood=lf.likelihoods.Gaussian())
    with pytest.raises(TypeError, match=r"y: expected floating-point targets .*float8_e5m2"):
        em(batch()[0], torch.zeros(4, 3).to(torch.float8_e5m2), "a")


def test_half_precision_outputs_are_scored_in_float32():
    assert evidence(P.log().bfloat16(), Y, lf.likelihoods.Joint()).nll.dtype == torch.float32


class Correlated(lf.likelihoods.Likelihood):
    """Regression whose errors are correlated: a product of matrices, which autocast would round."""

    precision = torch.tensor([[3.0, 1.0, 0.5], [1.0, 2.0, 0.3], [0.5, 0.3, 1.0]])

    def log_prob(self, output, y):
        error = output - y
        return -0.5 * ((error @ self.precision) * error).sum(-1)


@pytest.mark.parametrize("backend", ["auto", "torch", "reference"])
def test_a_users_likelihood_is_not_rounded_under_autocast(backend):
    em = lf.LASEM(small_net(2, dtype=torch.float32), likelihood=Correlated(), backend=backend)
    x, _ = batch(dtype=torch.float32)
    y = 30 * torch.randn(4, 3)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        logits = em.evaluate(x, "a").detach().float()
        step = em(x, y, "a")
    expected = Correlated().log_prob(logits, y).sum(1)
    assert_equals(step.log_likelihood, expected, "log-likelihood", 1e-6)


def test_half_precision_scores_are_added_up_in_float32():
    class Half(lf.likelihoods.Joint):
        def log_prob(self, output, y):
            return super().log_prob(output, y).bfloat16()

    found = evidence(P.log(), Y, Half())
    assert found.log_likelihood.dtype == found.nll.dtype == torch.float32
    expected = P.log()[..., 0].bfloat16().float().sum(1)
    assert_equals(found.log_likelihood, expected, "log-likelihood", 1e-6)


@pytest.mark.parametrize("likelihood", ["joint", "mean"])
@pytest.mark.parametrize("backend", ["torch", "reference"])
def test_every_prior_is_the_one_of_brute_force_over_several_batches(likelihood, backend):
    fixed = torch.tensor([0.0, 1.0, 2.0, 1.0])
    for prior in ("count", "mean_posterior", "uniform", "historic", fixed):
        net = small_net(2)
        em = lf.LASEM(net, likelihood=likelihood, prior=prior, backend=backend)
        wins, total = torch.ones(4, dtype=torch.float64), torch.zeros(4, dtype=torch.float64)
        for i in range(5):
            x, y = batch(seed=i)
            p = {
                "count": wins / wins.sum(),
                "historic": wins / wins.sum(),
                "mean_posterior": total / i if i else torch.full((4,), 0.25),
                "uniform": torch.full((4,), 0.25),
            }.get(prior if isinstance(prior, str) else "", fixed / 4)
            assert_equals(em.prior("a").double(), p.double(), f"{prior} prior", 1e-7)
            truth = brute_force(
                net, em.space.bits, x, y, "a", log_prior=p.double().log(), likelihood=likelihood
            )
            step = em(x, y, "a")
            assert_step_equals(net, step, truth)
            wins[truth.posterior.argmax()] += 1
            total += truth.posterior
        best = total if prior == "mean_posterior" else wins
        assert em.space.index(em.best_config("a")) == int(best.argmax())


def test_historic_prior_counts_over_all_tasks_and_a_task_chooses_by_its_own():
    net = small_net(2, tasks=("a", "b"))
    em = lf.LASEM(net, prior="historic")
    em._log_prior("a")
    em._prior.states["a"].wins.copy_(torch.tensor([0, 7, 1, 0]))
    assert_equals(em.prior("b"), torch.tensor([1, 8, 2, 1]).double() / 12, "prior of b")
    em._log_prior("b")
    em._prior.states["b"].wins.copy_(torch.tensor([0, 0, 2, 0]))
    assert_equals(em.prior("b"), torch.tensor([1, 8, 4, 1]).double() / 14, "prior of b")
    assert em.best_config("b") == em.space[2]


def test_ties_go_to_the_lowest_row():
    net = small_net(2)
    em = lf.LASEM(net)
    assert em.best_config("a") == (True, True)
    em._log_prior("a")
    em._prior.states["a"].wins.copy_(torch.tensor([1, 3, 3, 0]))
    assert em.space.index(em.best_config("a")) == 1


def test_a_frozen_posterior_serves_several_m_steps_and_leaves_the_prior_alone():
    net = small_net(3)
    em = lf.LASEM(net, backend="torch")
    x, y = batch()
    step = em(x, y, "a")
    prior = em.prior("a")
    optimizer = torch.optim.SGD(net.task_parameters("a"), lr=0.1)
    for _ in range(3):
        step.loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        step = em(x, y, "a", posterior=step.posterior)
        truth = brute_force(net, em.space.bits, x, y, "a", posterior=step.posterior)
        assert_equals(step.loss.detach(), truth.loss, "loss")
        grads = torch.autograd.grad(step.loss, list(net.parameters()), retain_graph=True)
        for grad, (name, expected) in zip(grads, truth.grads.items(), strict=True):
            assert_equals(grad, expected, f"gradient of {name}")
        assert torch.equal(em.prior("a"), prior)


def test_a_users_prior_and_likelihood():
    class FavoursSharing(lf.priors.Prior):
        def log_prob(self, task):
            return torch.tensor([0.0, -1.0, -2.0, -3.0])

    class Brier(lf.likelihoods.Joint):
        def log_prob(self, output, y):
            return (
                -(output.softmax(-1) - torch.nn.functional.one_hot(y, output.shape[-1]))
                .square()
                .sum(-1)
            )

    net = small_net(2)
    em = lf.LASEM(net, prior=FavoursSharing(), likelihood=Brier())
    x, y = batch()
    step = em(x, y, "a")
    logits = em.evaluate(x, "a").detach()
    score = -(logits.softmax(-1) - torch.nn.functional.one_hot(y, 3)).square().sum((1, 2))
    assert_equals(
        step.posterior, (torch.tensor([0.0, -1, -2, -3]).double() + score).softmax(0), "posterior"
    )


@pytest.mark.parametrize("backend", ["auto", "torch", "reference"])
def test_parameters_of_a_users_prior_and_likelihood_leave_no_graph_behind(backend):
    class Tempered(lf.likelihoods.Joint):
        def __init__(self):
            self.temperature = nn.Parameter(torch.tensor(0.5))

        def reduce(self, log_prob):
            return self.temperature * super().reduce(log_prob)

    class Learned(lf.priors.MeanPosterior):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.arange(4.0))

        def log_prob(self, task):
            return super().log_prob(task) + self.weight

    for options in ({"likelihood": Tempered(), "prior": "mean_posterior"}, {"prior": Learned()}):
        em = lf.LASEM(small_net(2), backend=backend, **options)
        for _ in range(2):
            step = em(*batch(), "a")
            step.loss.backward()
        assert not any(value.requires_grad for value in step[1:])
        copied = copy.deepcopy(em)
        assert torch.equal(copied._prior.states["a"].total, em._prior.states["a"].total)


def test_a_users_prior_that_fails_leaves_all_as_it_was():
    class Failing(lf.priors.Count):
        def update(self, task, posterior, counted):
            super().update(task, posterior, counted)
            raise RuntimeError("of its own")

    em = lf.LASEM(small_net(2, extra=(lambda: nn.BatchNorm2d(3),)), prior=Failing())
    with pytest.raises(RuntimeError, match="of its own"):
        em(*batch(), "a")
    em._prior.start("a", 4, torch.device("cpu"))
    before = {name: t.clone() for name, t in em.state_dict().items()}
    with pytest.raises(RuntimeError, match="of its own"):
        em(*batch(), "a")
    assert all(torch.equal(t, before[name]) for name, t in em.state_dict().items())


@pytest.mark.parametrize("likelihood", ["joint", Correlated()])
@pytest.mark.parametrize("backend", ["auto", "torch", "reference"])
def test_a_prior_that_is_not_normalised_keeps_its_digits(backend, likelihood):
    class Accumulated(lf.priors.Prior):
        def log_prob(self, task):
            return -1e7 - torch.arange(4, dtype=torch.float64)

    em = lf.LASEM(small_net(2, dtype=torch.float32), None, likelihood, Accumulated(), backend)
    x, y = batch(dtype=torch.float32)
    step = em(x, y if likelihood == "joint" else torch.randn(4, 3), "a")
    log_prior = -torch.arange(4, dtype=torch.float64)
    assert_equals(step.posterior, posterior_of(log_prior, step.log_likelihood), "posterior", 1e-6)


class Unmade(lf.priors.Prior):
    def __init__(self):
        pass


class Uncopied(lf.priors.Prior):
    def __init__(self):
        super().__init__()
        self.draws = iter(range(3)), (i for i in range(3))


@pytest.mark.parametrize(
    ("prior", "words"),
    [
        (Unmade, r"prior: expected __init__ of Unmade to call super\(\).__init__\(\)"),
        (Uncopied, "prior: expected one that copy.deepcopy can copy, got Uncopied .*generator"),
    ],
)
def test_a_users_prior_that_cannot_be_taken_is_told_so(prior, words):
    with pytest.raises(TypeError, match=words):
        lf.LASEM(small_net(2), prior=prior())


class Unstarted(lf.priors.Prior):
    def start(self, task, n_configs, device):
        self.counts = torch.ones(n_configs)


class Misnamed(lf.priors.Count):
    def start(self, task, n_configs, device):
        super().start(f"{task}2", n_configs, device)


class Short(lf.priors.Count):
    def start(self, task, n_configs, device):
        super().start(task, n_configs - 1, device)


class Unfinished(lf.priors.Count):
    def start(self, task, n_configs, device):
        super().start(task, n_configs, device)
        raise RuntimeError("of its own")


@pytest.mark.parametrize(
    ("prior", "error", "words"),
    [
        (Unstarted, ValueError, r"prior: expected start of Unstarted .* 'a', as super.* got none"),
        (Misnamed, ValueError, "prior: expected start of Misnamed .* 'a', as super.* got none"),
        (Short, ValueError, r"prior: .* among them wins of shape \[4\], got \[3\]"),
        (Unfinished, RuntimeError, "of its own"),
    ],
)
@pytest.mark.parametrize("backend", ["auto", "torch", "reference"])
def test_a_users_prior_that_does_not_start_leaves_all_as_it_was(backend, prior, error, words):
    em = lf.LASEM(small_net(2), prior=prior(), backend=backend)
    before = list(em.state_dict()), list(vars(em._prior))
    for _ in range(2):
        with pytest.raises(error, match=words):
            em(*batch(), "a")
        with pytest.raises(error, match=words):
            em.prior("a")
    assert (list(em.state_dict()), list(vars(em._prior))) == before


@pytest.mark.parametrize("prior", ["count", "mean_posterior"])
def test_a_prior_takes_what_fits_it_alone(prior):
    prior = {"count": lf.priors.Count, "mean_posterior": lf.priors.MeanPosterior}[prior]()
    prior.start("a", 3, torch.device("cpu"))
    with pytest.raises(ValueError, match=r"posterior: expected shape \[3\], .* got \[4\]"):
        prior.update("a", torch.ones(4) / 4, torch.tensor(True))
    with pytest.raises(ValueError, match="task: expected one that was not started yet, got 'a'"):
        prior.start("a", 3, torch.device("cpu"))


def test_a_prior_object_serves_two_lasems_without_carrying_counts():
    prior = lf.priors.Count(2.0)
    first, second = (lf.LASEM(small_net(2), prior=prior) for _ in range(2))
    for i in range(3):
        first(*batch(seed=i), "a")
    assert not prior.states and second.prior("a").tolist() == [0.25] * 4
    assert_equals(first.prior("a").sum(), torch.tensor(1.0).double(), "sum")


@pytest.mark.parametrize("cast", ["half", "bfloat16", "float", "double"])
@pytest.mark.parametrize("prior", ["count", "mean_posterior", "tensor"])
@pytest.mark.parametrize("backend", ["auto", "torch", "reference"])
def test_a_cast_leaves_the_prior_s_digits_alone_and_the_next_step_runs(backend, prior, cast):
    given = torch.tensor([0.1, 0.2, 0.3, 0.4], dtype=torch.float64)
    em = lf.LASEM(small_net(2), prior=given if prior == "tensor" else prior, backend=backend)
    em(*batch(), "a")
    before = em.prior("a")
    dtypes = [b.dtype for b in em._prior.states["a"].buffers()]
    getattr(em, cast)()
    assert torch.equal(em.prior("a"), before)
    assert [b.dtype for b in em._prior.states["a"].buffers()] == dtypes
    x, y = batch(dtype=em.net.shared[0][0].weight.dtype)
    step = em(x, y, "a")
    step.loss.backward()
    assert bool(step.posterior.isfinite().all())
    expected = posterior_of(before.log(), step.log_likelihood)
    assert torch.allclose(step.posterior, expected.to(step.posterior))


def test_a_prior_moves_with_the_module():
    em = lf.LASEM(small_net(2), prior="mean_posterior")
    em(*batch(), "a")
    em.to("meta", torch.bfloat16)
    kept = em._prior.states["a"]
    assert (kept.total.device.type, kept.total.dtype) == ("meta", torch.float64)
    assert em._rollback.settled[0, "0.weight"].device.type == "meta"
    assert em._rollback.settled[0, "0.weight"].dtype == torch.bfloat16


@pytest.mark.parametrize(
    ("call", "error", "words"),
    [
        (lambda: lf.priors.Fixed(None), TypeError, "prior: expected a floating-point tensor"),
        (lambda: lf.priors.Fixed(torch.ones(2, 2)), ValueError, r"tensor \[C\], got .* \[2, 2\]"),
        (lambda: lf.priors.Fixed(torch.ones(2, device="meta")), ValueError, "on meta"),
        (lambda: lf.priors.Count("1"), TypeError, "initial: expected a finite number above 0"),
        (lambda: lf.priors.Count().log_prob("a"), ValueError, r"task: expected one of \[\]"),
        (lambda: lf.priors.Count().forget("a"), ValueError, r"task: expected one of \[\]"),
        (lambda: lf.likelihoods.Gaussian("1"), TypeError, "sigma: expected a finite number"),
    ],
)
def test_bad_priors_and_likelihoods_are_refused_in_words(call, error, words):
    with pytest.raises(error, match=words):
        call()


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
@pytest.mark.parametrize("backend", ["auto", "torch", "reference"])
def test_a_log_likelihood_that_is_none_is_told_by_its_likelihood(backend, value):
    class Own(lf.likelihoods.Joint):
        def reduce(self, log_prob):
            return super().reduce(log_prob).index_fill(0, torch.tensor([2]), value)

    em = lf.LASEM(small_net(2), likelihood=Own(), backend=backend)
    with pytest.raises(ValueError, match=r"likelihood: expected Own\.reduce .* got 1 that are NaN"):
        em(*batch(), "a")


@pytest.mark.parametrize(
    ("log_prob", "reduced", "message"),
    [
        (None, torch.zeros(2), "log_prob to return .* got NoneType"),
        (torch.zeros(2), torch.zeros(2), r"log_prob to return .*\[2, 3\] .*got .*\[2\]"),
        (torch.zeros(2, 3), 0.5, "reduce to return .* got float"),
        (torch.zeros(2, 3), torch.zeros(2, dtype=torch.int64), "reduce to return .* got .*int64"),
    ],
)
def test_what_a_likelihood_returns_is_checked(log_prob, reduced, message):
    class Own(lf.likelihoods.Likelihood):
        def log_prob(self, output, y):
            return log_prob

        def reduce(self, log_prob):
            return reduced

    with pytest.raises(TypeError, match=f"likelihood: expected Own.{message}"):
        evidence(torch.zeros(2, 3, 4), torch.zeros(3), Own())
