"""The posterior head with its linear layer in Triton's interpreter, against float64."""

from __future__ import annotations

import copy
import random

import pytest
import torch
import torch.nn.functional as F
from launches import launches
from nets import batch
from oracle import brute_force
from torch import nn

import lasem_fast as lf
from lasem_fast.backends import head_gradient, triton_scores
from lasem_fast.backends.triton_scored_linear_op import scored_linear
from lasem_fast.kernels import scored_linear as kernels
from lasem_fast.likelihoods import Gaussian, Joint, Mean
from lasem_fast.search.posterior import evidence, expected_nll, posterior_of

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")  # numpy's, for -inf - -inf

SIGMA = 0.7
LIKELIHOODS = {"joint": Joint(), "mean": Mean(), "gaussian": Gaussian(SIGMA)}
NAMES = ("log_likelihood", "posterior", "nll", "loss", "dx", "dweight", "dbias")


class Drawn:
    """A head's last layer on leaves in some order."""

    def __init__(self, seed: int, dtype: torch.dtype = torch.float32, **fixed) -> None:
        pick = random.Random(seed)
        torch.manual_seed(seed)
        self.paired = fixed.get("paired", pick.random() < 0.4)
        self.likelihood = fixed.get("likelihood", pick.choice(list(LIKELIHOODS)))
        configs, samples = pick.choice([1, 2, 5, 9]), pick.choice([1, 2, 7, 10])
        outputs = pick.choice([1, 2, 3, 10, 33])
        size = pick.choice([(1, 1, 5), (1, 1, 16), (2, 3, 4), (1, 1, 70)])
        scale = pick.choice([0.1, 1.0, 3.0])
        rows = 2 * configs if self.paired else configs
        self.x = (torch.randn(rows, samples, *size) * scale).to(dtype)
        features = size[0] * size[1] * size[2]
        self.weight = torch.randn(outputs, features) / features**0.5
        self.bias = torch.randn(outputs) if pick.random() < 0.7 else None
        self.leaves = torch.randperm(configs)
        self.log_prior = torch.randn(configs, dtype=torch.float64).log_softmax(0)
        if configs > 1 and pick.random() < 0.5:
            self.log_prior[pick.randrange(configs)] = -torch.inf
        self.y = torch.randint(outputs, (2 * samples,))[::2]
        if self.likelihood == "gaussian":
            self.y = torch.randn(outputs, samples).T

    def plain(self, dtype: torch.dtype, product: torch.dtype | None = None) -> list[torch.Tensor]:
        """The library's own path at a precision, without configurations that overflow.

        Args:
            dtype: of the scores.
            product: of the linear layer's operands; None: as ``dtype``.
        """
        product = product or dtype
        leaves = [t.detach().to(dtype).requires_grad_() for t in self._tensors()]
        x = leaves[0].permute(0, 1, 4, 2, 3).flatten(2)
        logits = F.linear(*(t.to(product) for t in (x, *leaves[1:]))).to(dtype)
        configs, y = len(self.leaves), self.y
        y = y.to(dtype) if y.is_floating_point() else y
        calm = logits[self.leaves]
        noisy = logits[self.leaves + configs] if self.paired else calm
        likelihood = LIKELIHOODS[self.likelihood]
        e_step, m_step = evidence(calm.detach(), y, likelihood), evidence(noisy, y, likelihood)
        keep = torch.isfinite(e_step.nll).nonzero().squeeze(1)
        posterior = posterior_of(self.log_prior[keep].to(dtype), e_step.log_likelihood[keep])
        loss = expected_nll(posterior, m_step.nll[keep])
        gradients = torch.autograd.grad(loss, leaves)
        scores = e_step.log_likelihood, posterior, e_step.nll
        fills = -torch.inf, 0.0, torch.inf
        spread = [
            values.new_full((configs,), fill).index_copy(0, keep, values[keep] if len(values)
                            == configs else values)
            for values, fill in zip(scores, fills, strict=True)
        ]  # fmt: skip
        return [t.detach() for t in (*spread, loss, *gradients)]

    def run(self, scale: float | None = 1.0, **options) -> list[torch.Tensor]:
        leaves = [t.detach().requires_grad_() for t in self._tensors()]
        options = {"log_prior": self.log_prior, **options}
        *scores, loss = scored_linear(
            *(leaves if self.bias is not None else [*leaves, None]), self.leaves, self.y,
            likelihood=self.likelihood, sigma=SIGMA, paired=self.paired, **options,
        )  # fmt: skip
        one = head_gradient.one(loss) if scale is None else torch.tensor(scale)
        gradients = torch.autograd.grad(loss, leaves, one)
        for gradient, leaf in zip(gradients, leaves, strict=True):
            assert gradient.dtype == leaf.dtype and gradient.shape == leaf.shape
        return [*scores, loss.detach(), *gradients]

    def _tensors(self) -> list[torch.Tensor]:
        return [t for t in (self.x, self.weight, self.bias) if t is not None]


def rounding_of(log_likelihood, dtype=torch.float32) -> float:
    """One of L_c, which is a relative error of the posterior and of all that it weights."""
    finite = log_likelihood[torch.isfinite(log_likelihood)]
    return torch.finfo(dtype).eps * max(1.0, float(finite.abs().max()))


def assert_near(case: Drawn, got, product=None, k=2):
    """Within k times the error of PyTorch in the same precision, or k roundings."""
    truth, peer = case.plain(torch.float64), case.plain(torch.float32, product)
    rounding = rounding_of(truth[0], product or torch.float32)
    for name, value, exact, plainly in zip(NAMES, got, truth, peer, strict=False):
        good = torch.isfinite(exact)
        assert torch.equal(value.double()[~good], exact[~good]), name
        error = (value.double() - exact)[good].norm()
        peer_error = (plainly.double() - exact)[good].norm()
        size = exact[good].norm() if name.startswith("d") else max(1.0, float(exact[good].norm()))
        assert error <= k * max(peer_error, rounding * size), (name, float(error))


def small_blocks(monkeypatch):
    """Blocks so small that every loop of the kernels goes round several times."""
    monkeypatch.setattr(kernels, "_LEAST", 4)
    monkeypatch.setattr(kernels, "_FEATURES", 8)
    monkeypatch.setattr(kernels, "_SAMPLES", 8)
    monkeypatch.setattr(kernels, "_MOST_SAMPLES_AT_ONCE", 4)
    monkeypatch.setattr(kernels, "_MOST_CONFIGS_AT_ONCE", 2)


@pytest.mark.parametrize("seed", range(24))
def test_drawn_layers(seed, monkeypatch):
    if seed % 2:
        small_blocks(monkeypatch)
    case = Drawn(seed)
    got = case.run(None)
    assert_near(case, got)
    if case.paired:
        assert not got[4][: len(case.leaves)].any()


@pytest.mark.parametrize("seed", range(24, 32))
def test_in_bfloat16(seed):
    case = Drawn(seed, torch.bfloat16)
    assert_near(case, case.run(), torch.bfloat16)


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_a_loss_with_a_scale(seed):
    case = Drawn(seed)
    once, scaled = case.run(None), case.run(0.25)
    for value, other in zip(once[4:], scaled[4:], strict=True):
        assert torch.equal(value * 0.25, other)


@pytest.mark.parametrize("likelihood", LIKELIHOODS)
def test_the_prior_and_its_new_count(likelihood):
    case = Drawn(7, likelihood=likelihood)
    wins = torch.arange(len(case.leaves))
    before = wins.clone()
    case.log_prior = (wins.double() + 0.5).log()
    got = case.run(log_prior=None, wins=wins, initial=0.5)
    assert_near(case, got)
    before[got[1].argmax()] += 1
    assert torch.equal(wins, before)


def test_a_configuration_that_overflows():
    case = Drawn(5, likelihood="joint", paired=False)
    assert len(case.leaves) > 1
    case.log_prior = torch.zeros(len(case.leaves), dtype=torch.float64)
    bad = int(case.leaves[0])
    case.x[bad, 0, 0, 0, 0] = torch.inf
    got = case.run()
    assert torch.isneginf(got[0][0]) and got[1][0] == 0 and torch.isinf(got[2][0])
    assert not got[4][bad].any()
    assert all(bool(torch.isfinite(g).all()) for g in got[4:])
    assert torch.isnan(got[3])  # its activations are in the gradients of the weights


def test_a_label_out_of_range_makes_the_loss_nan():
    case = Drawn(5, likelihood="joint", paired=False)
    case.y = torch.full_like(case.y, 1000)
    *_, loss = case.run()[:4]
    assert torch.isnan(loss)


@pytest.mark.parametrize("seed", [0, 1, 3])
def test_a_second_backward_and_gradients_of_gradients(seed):
    case = Drawn(seed, likelihood="joint")
    leaves = [t.detach().requires_grad_() for t in case._tensors()]
    arguments = leaves if case.bias is not None else [*leaves, None]
    *_, loss = scored_linear(
        *arguments, case.leaves, case.y, log_prior=case.log_prior, paired=case.paired
    )
    first = torch.autograd.grad(loss, leaves, retain_graph=True)
    again = torch.autograd.grad(loss, leaves, retain_graph=True)
    exact = case.plain(torch.float64)[4:]
    for a, b, want in zip(first, again, exact, strict=True):
        allowed = 2 * max((a - want).norm(), torch.finfo(torch.float32).eps * want.norm())
        assert (b - want).norm() <= allowed
    carried = torch.autograd.grad(loss, leaves, create_graph=True)
    second = torch.autograd.grad(sum(g.square().sum() for g in carried), leaves)

    def plain(dtype):
        tensors = [t.detach().to(dtype).requires_grad_() for t in case._tensors()]
        rows = case.leaves + len(case.leaves) if case.paired else case.leaves
        x = tensors[0][rows].permute(0, 1, 4, 2, 3).flatten(2)
        labels = case.y.expand(len(rows), -1).flatten()
        logits = F.linear(x, *tensors[1:]).flatten(0, 1)
        each = F.cross_entropy(logits, labels, reduction="none").view(len(rows), -1)
        value = (case.plain(dtype)[1] * each.mean(1)).sum()
        grads = torch.autograd.grad(value, tensors, create_graph=True)
        return torch.autograd.grad(sum(g.square().sum() for g in grads), tensors)

    rounding = rounding_of(case.plain(torch.float64)[0])
    for got, peer, want in zip(second, plain(torch.float32), plain(torch.float64), strict=True):
        allowed = 2 * max((peer - want).norm(), rounding * want.norm())
        assert (got - want).norm() <= allowed


def test_arguments_that_do_not_fit():
    case = Drawn(3, likelihood="joint")
    case.y = case.y.int()
    with pytest.raises(ValueError, match=r"target: expected labels of torch\.int64"):
        case.run()


def _em(monkeypatch, head, **options):
    torch.manual_seed(0)
    stages = [
        nn.Sequential(nn.Conv2d(2, 3, 3, padding=1), nn.ReLU()),
        nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2)),
    ]
    net = lf.TransferNet(stages)
    net.add_task("a", head)
    em = lf.LASEM(net, backend="triton", **options)
    # as on a device, where nothing waits for a value
    monkeypatch.setattr(em, "_reads_values", lambda x: False)
    monkeypatch.setattr(triton_scores, "_looked_at_first", lambda logits: False)
    return em


HEADS = {
    "linear": lambda: nn.Sequential(nn.Flatten(), nn.Linear(36, 3)),
    "two layers": lambda: nn.Sequential(
        nn.Flatten(), nn.Linear(36, 5), nn.ReLU(), nn.Linear(5, 3, bias=False)
    ),
}


@pytest.mark.parametrize("prior", ["count", "uniform", "mean_posterior"])
@pytest.mark.parametrize("head", HEADS)
def test_a_whole_step_against_brute_force(head, prior, monkeypatch):
    em = _em(monkeypatch, HEADS[head](), prior=prior)
    x, y = batch(samples=2, seed=1, dtype=torch.float32)
    exact = copy.deepcopy(em.net).double()
    truth = brute_force(exact, em.space.bits, x.double(), y, "a")
    plain = lf.LASEM(copy.deepcopy(em.net), prior=prior, backend="torch")
    plain(x, y, "a").loss.backward()
    with launches() as counted:
        step = em(x, y, "a")
        step.loss.backward(head_gradient.one(step.loss))
    for name, there in (("score_linear_kernel", 1), ("weigh_linear_kernel", 1),
                        ("score_configurations", 0), ("weigh_configurations", 0)):  # fmt: skip
        assert counted.kernels[name] == there
    assert counted.kernels["level_forward_kernel"] == 2 + (head == "two layers")
    torch.testing.assert_close(step.posterior, truth.posterior.float())
    torch.testing.assert_close(step.log_likelihood, truth.log_likelihood.float())
    want = torch.cat([g.flatten() for g in truth.grads.values()])
    errors = []
    for net in (em.net, plain.net):
        grads = {name: p.grad for name, p in net.named_parameters()}
        errors.append((torch.cat([grads[name].flatten() for name in truth.grads]) - want).norm())
    # k = 2: the same sums in another order
    assert errors[0] <= 2 * max(errors[1], torch.finfo(torch.float32).eps * want.norm())
    if prior == "count":
        assert int(em._prior.states["a"].wins.sum()) == 1


@pytest.mark.parametrize("place", ["before", "between"])
def test_dropout_in_the_head(place, monkeypatch):
    """The same numbers as with scores behind the head, of the same masks."""
    drop = nn.Dropout(0.4)
    layers = [nn.Flatten(), nn.Linear(36, 5), nn.ReLU(), nn.Linear(5, 3)]
    layers.insert(1 if place == "before" else 3, drop)
    em = _em(monkeypatch, nn.Sequential(*layers))
    x, y = batch(samples=3, seed=1, dtype=torch.float32)
    other = copy.deepcopy(em)
    monkeypatch.setattr(other, "_reads_values", lambda x: False)
    monkeypatch.setattr(other._search, "_gives_scores", False)
    found = []
    for lasem in (em, other):
        torch.manual_seed(3)
        with launches() as counted:
            step = lasem(x, y, "a")
        step.loss.backward()
        assert counted.kernels["score_linear_kernel"] == (lasem is em)
        grads = [p.grad for p in lasem.net.parameters()]
        found.append([step.posterior, step.log_likelihood, step.nll, step.loss, *grads])
    for got, want in zip(*found, strict=True):
        torch.testing.assert_close(got, want)


def test_targets_that_do_not_fit_change_nothing(monkeypatch):
    em = _em(monkeypatch, HEADS["linear"]())
    x, y = batch(samples=2, seed=1, dtype=torch.float32)
    em(x, y, "a")
    before = em._prior.states["a"].wins.clone()
    with pytest.raises(TypeError, match=r"y: expected class labels of dtype torch\.int64"):
        em(x, y.int(), "a")
    with pytest.raises(ValueError, match="y: expected class labels of shape"):
        em(x, y[:, None], "a")
    assert torch.equal(before, em._prior.states["a"].wins)
    with torch.no_grad(), launches() as counted:  # nothing needs a gradient
        em(x, y, "a")
    assert counted.kernels["score_configurations"] == 1
