"""The Triton posterior head in Triton's interpreter, against the plain path in float64."""

from __future__ import annotations

import random

import pytest
import torch
from launches import launches

import lasem_fast as lf
from lasem_fast.backends import head_gradient, triton_head_op
from lasem_fast.backends.triton_head_op import posterior_head
from lasem_fast.kernels import posterior_head as kernels
from lasem_fast.likelihoods import Gaussian, Joint, Mean
from lasem_fast.search import search
from lasem_fast.search.posterior import evidence, expected_nll, posterior_of

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")  # numpy's, for -inf - -inf

SIGMA = 0.7
LIKELIHOODS = {"joint": Joint(), "mean": Mean(), "gaussian": Gaussian(SIGMA)}
EPS = torch.finfo(torch.float32).eps
NAMES = ("log_likelihood", "posterior", "nll", "loss", "dlogits")


def plain(logits, y, log_prior, likelihood, dtype):
    """The library's own path at a precision, without configurations that overflow."""
    leaf = logits.detach().to(dtype).requires_grad_()
    y = y.to(dtype) if y.is_floating_point() else y
    nll = evidence(leaf, y, LIKELIHOODS[likelihood]).nll
    keep = torch.isfinite(nll).nonzero().squeeze(1)
    kept = evidence(leaf[keep], y, LIKELIHOODS[likelihood])
    posterior = posterior_of(log_prior[keep], kept.log_likelihood)
    loss = expected_nll(posterior, kept.nll)
    (dlogits,) = torch.autograd.grad(loss, leaf)

    def spread(values, fill):
        return values.new_full((len(logits),), fill).index_copy(0, keep, values).detach()

    return (
        spread(kept.log_likelihood, -torch.inf),
        spread(posterior, 0.0),
        spread(kept.nll, torch.inf),
        loss.detach(),
        dlogits,
    )


def run(logits, y, scale=1.0, **options):
    leaf = logits.detach().requires_grad_()
    options = {"likelihood": "joint", "sigma": SIGMA, **options}
    *out, loss = posterior_head(leaf, y, **options)
    (dlogits,) = torch.autograd.grad(loss, leaf, torch.tensor(scale))
    assert dlogits.dtype == logits.dtype
    return *out, loss.detach(), dlogits


def assert_near(got, logits, y, log_prior, likelihood, k=2):
    """Within k times the error of plain float32, or k roundings.

    A rounding of L_c is a relative error of the posterior and of all that it weights.
    """
    truth = plain(logits, y, log_prior, likelihood, torch.float64)
    peer = plain(logits, y, log_prior.float(), likelihood, torch.float32)
    finite = truth[0][torch.isfinite(truth[0])]
    rounding = EPS * max(1.0, float(finite.abs().max()))
    for name, value, exact, plainly in zip(NAMES, got, truth, peer, strict=True):
        good = torch.isfinite(exact)
        assert torch.equal(value.double()[~good], exact[~good]), name
        error = (value.double() - exact)[good].abs().max()
        peer_error = (plainly.double() - exact)[good].abs().max()
        size = 1.0 if name in ("log_likelihood", "nll") else float(exact[good].abs().max())
        assert error <= k * max(peer_error, rounding * size), (name, float(error))


def drawn(seed):
    pick = random.Random(seed)
    torch.manual_seed(seed)
    configs, samples = pick.choice([1, 2, 5, 9]), pick.choice([1, 2, 7, 10])
    outputs = pick.choice([1, 2, 3, 10, 33])
    likelihood = pick.choice(list(LIKELIHOODS))
    size = pick.choice([0.1, 1.0, 10.0])
    layout = pick.choice(["plain", "samples first", "classes first", "sliced", "expanded"])
    if layout == "plain":
        logits = torch.randn(configs, samples, outputs)
    elif layout == "samples first":
        logits = torch.randn(samples, configs, outputs).transpose(0, 1)
    elif layout == "classes first":
        logits = torch.randn(outputs, configs, samples).permute(1, 2, 0)
    elif layout == "sliced":
        logits = torch.randn(configs, 2 * samples, outputs + 3)[:, ::2, 1 : outputs + 1]
    else:
        logits = torch.randn(1, samples, outputs).expand(configs, -1, -1)
    if likelihood == "gaussian":
        y = torch.randn(outputs, samples).T
    else:
        y = torch.randint(outputs, (2 * samples,))[::2]
    return pick, logits * size if layout != "expanded" else logits, y, likelihood


def small_blocks(monkeypatch):
    """Blocks so small that every loop of the kernels goes round several times."""
    monkeypatch.setattr(kernels, "_TILE", 8)
    monkeypatch.setattr(kernels, "_LONGEST", 4)
    monkeypatch.setattr(kernels, "_MOST_PROGRAMS", 2)


@pytest.mark.parametrize("seed", range(24))
def test_drawn_problems(seed, monkeypatch):
    pick, logits, y, likelihood = drawn(seed)
    if seed % 2:
        small_blocks(monkeypatch)
    configs = len(logits)
    log_prior = torch.randn(configs, dtype=torch.float64).log_softmax(0)
    if configs > 1 and pick.random() < 0.5:
        log_prior[pick.randrange(configs)] = -torch.inf
    got = run(logits, y, log_prior=log_prior, likelihood=likelihood)
    assert_near(got, logits, y, log_prior, likelihood)
    assert not got[4][torch.isneginf(log_prior)].any()


@pytest.mark.parametrize("likelihood", LIKELIHOODS)
def test_count_prior_and_its_new_count(likelihood, monkeypatch):
    small_blocks(monkeypatch)
    torch.manual_seed(0)
    logits = torch.randn(6, 5, 3)
    y = torch.randn(5, 3) if likelihood == "gaussian" else torch.randint(3, (5,))
    wins = torch.tensor([0, 4, 1, 0, 2**40, 7])
    before = wins.clone()
    for initial in (1.0, 0.25):
        log_prior = (wins.double() + initial).log()
        got = run(logits, y, wins=wins, initial=initial, likelihood=likelihood)
        assert_near(got, logits, y, log_prior, likelihood)
        before[got[1].argmax()] += 1
        assert torch.equal(wins, before)


def test_uniform_prior_counts_too():
    logits, y = torch.randn(3, 4, 2), torch.tensor([0, 1, 1, 0])
    wins = torch.zeros(3, dtype=torch.int64)
    got = run(logits, y, wins=wins)
    assert_near(got, logits, y, torch.zeros(3, dtype=torch.float64), "joint")
    assert wins.sum() == 1 and wins[got[1].argmax()] == 1


def test_the_lowest_row_wins_a_tie(monkeypatch):
    small_blocks(monkeypatch)
    logits = torch.randn(1, 4, 3).expand(11, -1, -1).clone()
    logits[:3] -= 5 * torch.nn.functional.one_hot(torch.tensor([0, 1, 2, 0]), 3)
    wins = torch.zeros(11, dtype=torch.int64)
    run(logits, torch.tensor([0, 1, 2, 0]), wins=wins)
    assert wins.tolist() == [0, 0, 0, 1, 0, 0, 0, 0, 0, 0, 0]


@pytest.mark.parametrize("likelihood", LIKELIHOODS)
@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
def test_bad_configurations_are_left_out(bad, likelihood):
    torch.manual_seed(0)
    logits = torch.randn(5, 4, 3)
    y = torch.randn(4, 3) if likelihood == "gaussian" else torch.tensor([0, 1, 2, 0])
    logits[2, 1, 1] = bad
    wins = torch.tensor([0, 0, 9, 0, 0])
    log_prior = (wins.double() + 1).log()
    got = run(logits, y, wins=wins, initial=1.0, likelihood=likelihood)
    assert got[0][2] == -torch.inf and got[2][2] == torch.inf and got[1][2] == 0
    assert not got[4][2].any() and got[3].isnan()
    loss = plain(logits, y, log_prior, likelihood, torch.float64)[3].float()
    assert_near((*got[:3], loss, got[4]), logits, y, log_prior, likelihood)
    assert wins[2] == 9 and wins.sum() == 10


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_a_prior_that_is_no_probability_shows_and_is_not_counted(value):
    wins, log_prior = torch.zeros(2, dtype=torch.int64), torch.tensor([0.0, value])
    logits, y = torch.randn(2, 3, 4), torch.tensor([0, 1, 2])
    assert run(logits, y, wins=wins, log_prior=log_prior)[3].isnan() and not wins.any()


@pytest.mark.parametrize("cause", ["logits", "label too large", "label negative", "prior"])
def test_nothing_left(cause):
    logits, y = torch.randn(2, 3, 4), torch.tensor([0, 1, 2])
    wins, log_prior = torch.zeros(2, dtype=torch.int64), None
    if cause == "logits":
        logits[:, 0] = torch.nan
    elif cause == "prior":
        log_prior = torch.full((2,), -torch.inf)
    else:
        y[1] = 4 if cause == "label too large" else -1
    got = run(logits, y, wins=wins, log_prior=log_prior)
    assert got[3].isnan() and not got[1].any() and not got[4].any() and not wins.any()


def test_log_likelihoods_of_a_thousand():
    torch.manual_seed(0)
    logits = 100 * torch.randn(4, 10, 5)
    logits[1:] = logits[0] + 1e-3 * torch.randn(3, 10, 5)
    y = torch.randint(5, (10,))
    got = run(logits, y)
    assert got[0].abs().min() > 500
    assert_near(got, logits, y, torch.zeros(4, dtype=torch.float64), "joint")


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_read_as_float32(dtype):
    torch.manual_seed(0)
    logits, y = torch.randn(3, 4, 5).to(dtype), torch.randint(5, (4,))
    got, want = run(logits, y), run(logits.float(), y)
    for name, value, exact in zip(NAMES, got, want, strict=True):
        assert torch.equal(value, exact.to(value.dtype)), name


def test_the_scale_of_the_loss_comes_before_half_precision():
    logits, y = torch.zeros(2, 1, 2, dtype=torch.float16), torch.tensor([0])
    log_prior = torch.tensor([0.0, -18.0])  # a posterior that float16 rounds to 0 on its own
    got = run(logits, y, scale=2.0**12, log_prior=log_prior)
    assert got[4][1].abs().min() > 0


@pytest.mark.parametrize("pair", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_a_gradient_that_is_known_to_be_one_multiplies_nothing(dtype, pair):
    torch.manual_seed(0)
    logits = torch.randn(*[2] * pair, 3, 4, 5).to(dtype).requires_grad_()
    loss = posterior_head(logits, torch.randint(5, (4,)))[-1]
    (want,) = torch.autograd.grad(loss, logits, torch.ones(()), retain_graph=True)
    one = head_gradient.one(loss)
    with launches() as counted:
        (got,) = torch.autograd.grad(loss, logits, one)
    assert torch.equal(got, want) and got.dtype == dtype
    assert not counted.kernels


@pytest.mark.parametrize("likelihood", LIKELIHOODS)
def test_opcheck(likelihood):
    torch.manual_seed(0)
    logits = torch.randn(5, 3, 4).transpose(0, 1)
    y = torch.randn(5, 4) if likelihood == "gaussian" else torch.randint(4, (5,))
    kind = triton_head_op.LIKELIHOODS.index(likelihood)
    wins = torch.zeros(3, dtype=torch.int64)
    torch.use_deterministic_algorithms(False)
    for others in ((None, wins, 1.0), (None, wins, None), (torch.zeros(3), None, None)):
        torch.library.opcheck(
            torch.ops.lasem_fast.posterior_head_triton.default, (logits, y, *others, kind, SIGMA)
        )


GOOD = {"logits": torch.zeros(2, 3, 4), "target": torch.zeros(3).long()}


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"logits": torch.zeros(2, 3)}, "logits: expected shape"),
        ({"logits": torch.zeros(2, 0, 4)}, "logits: expected shape .* not empty"),
        ({"logits": torch.zeros(2, 3, 4).double()}, "logits: expected float32"),
        ({"target": torch.zeros(2).long()}, r"target: expected shape \[3\]"),
        ({"target": torch.zeros(3).int()}, "target: expected labels of torch.int64"),
        ({"likelihood": "gaussian"}, "target: expected floating-point"),
        ({"log_prior": torch.zeros(3)}, r"log_prior: expected shape \[2\]"),
        ({"wins": torch.zeros(2)}, "wins: expected torch.int64"),
        ({"wins": torch.zeros(4).long()[::2]}, "wins: expected a contiguous tensor"),
        ({"initial": 1.0}, "initial: expected wins and no log_prior"),
        ({"likelihood": "gaussian", "target": torch.zeros(3, 4), "sigma": 0.0}, "sigma: expected"),
        ({"logits": torch.zeros(2, 2, 3, 4), "nll_grad": True}, "nll_grad: expected logits"),
    ],
)
def test_errors(changed, message):
    arguments = {**GOOD, **changed}
    with pytest.raises(ValueError, match=message):
        posterior_head(arguments.pop("logits"), arguments.pop("target"), **arguments)


@pytest.mark.parametrize("likelihood", LIKELIHOODS)
@pytest.mark.parametrize("prior", ["count", "uniform", "mean_posterior", "historic", "tensor"])
def test_a_whole_step_equals_the_plain_backend(prior, likelihood):
    torch.manual_seed(0)
    net = lf.TransferNet([torch.nn.Sequential(torch.nn.Linear(3, 3), torch.nn.Tanh())])
    net.add_task("a", torch.nn.Linear(3, 2))
    x = torch.randn(4, 3)
    y = torch.randn(4, 2) if likelihood == "gaussian" else torch.randint(2, (4,))
    results = []
    for backend in ("triton", "torch"):
        chosen = torch.tensor([0.25, 0.75]) if prior == "tensor" else prior
        em = lf.LASEM(net, likelihood=LIKELIHOODS[likelihood], prior=chosen, backend=backend)
        for _ in range(2):
            net.zero_grad()
            step = em(x, y, "a")
            step.loss.backward()
        grads = torch.cat([p.grad.flatten() for p in net.parameters()])
        results.append((*step, em.prior("a"), em._prior.score("a"), grads))
    for got, want in zip(*results, strict=True):
        torch.testing.assert_close(got.float(), want.float())


@pytest.mark.parametrize("likelihood", LIKELIHOODS)
def test_gradients_of_gradients(likelihood):
    logits = torch.randn(4, 3, 5)
    logits[2] = torch.nan
    y = torch.randn(3, 5) if likelihood == "gaussian" else torch.tensor([0, 4, 2])

    def both(leaf, loss):
        (first,) = torch.autograd.grad(loss(leaf), leaf, create_graph=True)
        return first.detach(), torch.autograd.grad(first.square().sum(), leaf)[0]

    options = {"likelihood": likelihood, "sigma": SIGMA}
    posterior = posterior_head(logits, y, **options)[1]
    got = both(logits.clone().requires_grad_(), lambda z: posterior_head(z, y, **options)[3])
    kept = [0, 1, 3]

    def plain(dtype):
        target = y.to(dtype) if likelihood == "gaussian" else y
        return both(
            logits.to(dtype).requires_grad_(),
            lambda z: expected_nll(
                posterior[kept], evidence(z[kept], target, LIKELIHOODS[likelihood]).nll
            ),
        )

    for a, b, want in zip(got, plain(torch.float32), plain(torch.float64), strict=True):
        assert not a[2].any()
        # k = 2, or the rounding of the result itself
        assert (a - want).norm() <= max(2 * (b - want).norm(), EPS * want.norm())


@pytest.mark.parametrize("likelihood", LIKELIHOODS)
@pytest.mark.parametrize("bad", [None, torch.inf])
def test_logits_of_the_m_step_beside_those_of_the_e_step(likelihood, bad):
    """Posterior, scores and count are the first ones', loss and gradient the second ones'."""
    generator = torch.Generator().manual_seed(0)
    e_step, m_step = torch.randn(2, 5, 3, 4, generator=generator)
    y = torch.randn(3, 4) if likelihood == "gaussian" else torch.tensor([0, 3, 1])
    if bad is not None:
        e_step[1, 0, 0] = bad
    wins = torch.zeros(5, dtype=torch.int64)
    pair = torch.stack([e_step, m_step])
    *out, loss, gradient = run(pair, y, likelihood=likelihood, wins=wins, initial=1.0)
    *alone, _, _ = run(e_step, y, likelihood=likelihood)
    for got, want in zip(out, alone, strict=True):
        assert torch.equal(got, want)
    assert wins.tolist() == torch.nn.functional.one_hot(out[1].argmax(), 5).tolist()
    leaf = m_step.double().requires_grad_()
    exact = y.double() if y.is_floating_point() else y
    want = expected_nll(out[1].double(), evidence(leaf, exact, LIKELIHOODS[likelihood]).nll)
    torch.testing.assert_close(loss.double(), want.detach(), rtol=4 * EPS, atol=0)
    (right,) = torch.autograd.grad(want, leaf)
    torch.testing.assert_close(gradient[1].double(), right, rtol=16 * EPS, atol=EPS)
    assert not gradient[0].any()


@pytest.mark.parametrize("likelihood", LIKELIHOODS)
def test_the_nll_has_a_gradient_for_other_weights(likelihood):
    """Nothing of a configuration without weight is read, and a label out of range stops nothing."""
    logits = torch.randn(4, 3, 5)
    weights = torch.tensor([0.5, 0.0, 1e-3, 0.2])
    y = torch.randn(3, 5) if likelihood == "gaussian" else torch.tensor([0, 4, 2])

    def gradient(nll, leaf):
        return torch.autograd.grad((weights.to(nll.dtype) * nll).sum(), leaf)[0]

    def fused(logits, y):
        leaf = logits.clone().requires_grad_()
        options = {"likelihood": likelihood, "sigma": SIGMA, "nll_grad": True}
        return gradient(posterior_head(leaf, y, **options)[2], leaf)

    def plainly(dtype):
        leaf = logits.to(dtype, copy=True).requires_grad_()
        target = y.to(dtype) if likelihood == "gaussian" else y
        return gradient(evidence(leaf, target, LIKELIHOODS[likelihood]).nll, leaf)

    exact = plainly(torch.float64)
    allowed = max((plainly(torch.float32) - exact).abs().max(), EPS * exact.abs().max())
    assert (fused(logits, y) - exact).abs().max() <= 2 * allowed
    logits[1] = torch.nan
    assert torch.equal(fused(logits, y)[1], torch.zeros(3, 5))
    if likelihood != "gaussian":
        fused(logits, torch.tensor([0, 9, -1]))


@pytest.mark.parametrize("options", [{"prune": 0.3}, {"m_step_draws": 2}], ids=str)
def test_a_step_that_leaves_something_out_scores_once(options, monkeypatch):
    net = lf.TransferNet([torch.nn.Sequential(torch.nn.Linear(3, 3), torch.nn.Tanh())])
    net.add_task("a", torch.nn.Linear(3, 2))
    x, y = torch.randn(4, 3), torch.randint(2, (4,))
    results = []
    for backend in ("torch", "triton"):
        em = lf.LASEM(net, prior=torch.tensor([0.8, 0.2]), backend=backend, **options)
        net.zero_grad()
        with torch.random.fork_rng():
            step = em(x, y, "a")
        step.loss.backward()
        results.append((*step, torch.cat([p.grad.flatten() for p in net.parameters()])))
        monkeypatch.setattr(search, "evidence", lambda *_: pytest.fail("scored a second time"))
    for got, want in zip(*reversed(results), strict=True):
        torch.testing.assert_close(got, want)
