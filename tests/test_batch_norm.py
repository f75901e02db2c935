"""Batch norm in training mode: every configuration by itself, statistics moved by the posterior."""

from __future__ import annotations

import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from nets import Case, Residual, cases, small_net
from nets import batch as small_batch
from oracle import assert_equals, assert_step_equals, brute_force, logits_of
from row_lists import PLAIN, evaluator_of
from torch import nn
from torch.utils.checkpoint import checkpoint

import lasem_fast as lf
from lasem_fast.backends import cpu_norm, cpu_ops, plain_torch
from lasem_fast.networks.batch_norm import BatchNorms
from lasem_fast.tree.bounded import BoundedTree
from lasem_fast.tree.budget import cuts_of, step_bytes

NORMS = (nn.BatchNorm1d, nn.BatchNorm2d)


def norm_layers(net):
    return {name: m for name, m in net.named_modules() if isinstance(m, NORMS)}


def statistics_after(net, bits, x, task, weights):
    """Running mean and variance of every layer after a step with these weights ``[C]``."""
    seen = {name: [] for name in norm_layers(net)}
    for config, weight in zip(bits.tolist(), weights.tolist(), strict=True):
        own = copy.deepcopy(net)
        layers = norm_layers(own)
        for layer in layers.values():
            layer.momentum = 1.0  # running statistics become the batch's own
            layer.num_batches_tracked.zero_()
        with torch.no_grad():
            logits_of(own, config, x, task)
        for name, layer in layers.items():
            if layer.num_batches_tracked > 0 and weight > 0:
                seen[name].append((weight, layer.running_mean, layer.running_var))
    expected = {}
    for name, layer in norm_layers(net).items():
        mean, var, count = layer.running_mean, layer.running_var, layer.num_batches_tracked
        if seen[name]:
            total = sum(weight for weight, _, _ in seen[name])
            count = count + 1
            momentum = 1 / int(count) if layer.momentum is None else layer.momentum
            mean = (1 - momentum) * mean + momentum * sum(w * m for w, m, _ in seen[name]) / total
            var = (1 - momentum) * var + momentum * sum(w * v for w, _, v in seen[name]) / total
        expected[name] = (mean.clone(), var.clone(), count.clone())
    return expected


def assert_statistics_equal(net, expected):
    for name, layer in norm_layers(net).items():
        mean, var, count = expected[name]
        assert_equals(layer.running_mean, mean, f"running mean of {name}")
        assert_equals(layer.running_var, var, f"running variance of {name}")
        assert torch.equal(layer.num_batches_tracked, count), name


class NormResidual(nn.Module):
    """A block of its own with two batch norms."""

    def __init__(self, channels):
        super().__init__()
        self.first = nn.Conv2d(channels, channels, 3, padding=1)
        self.before = nn.BatchNorm2d(channels)
        self.after = nn.BatchNorm2d(channels, momentum=None)

    def forward(self, h):
        return self.after(h + self.first(self.before(h).relu()))


class BasicBlock(nn.Module):
    """As in a residual network."""

    def __init__(self, channels):
        super().__init__()
        self.conv1 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(channels)
        self.relu = nn.ReLU()

    def forward(self, h):
        out = self.relu(self.bn1(self.conv1(h)))
        return self.relu(self.bn2(self.conv2(out)) + h)


@st.composite
def normed_cases(draw, max_depth=4):
    """Drawn nets with batch norm in some stages, here and there in the head, of several samples."""
    case = draw(cases(max_depth=max_depth))
    net, stages = case.net, []
    for shared in net.shared:
        stage = copy.deepcopy(shared)
        if type(stage) is nn.Sequential and draw(st.booleans()):
            core = next(i for i, m in enumerate(stage) if isinstance(m, (nn.Conv2d, nn.Linear)))
            of_vectors = isinstance(stage[core], nn.Linear)
            outputs = stage[core].out_features if of_vectors else stage[core].out_channels
            kind = nn.BatchNorm1d if of_vectors else nn.BatchNorm2d
            momentum = draw(st.sampled_from([0.1, 0.7, None]))
            norm = kind(outputs, momentum=momentum, affine=draw(st.booleans()))
            layers = list(stage)
            layers.insert(core + 1, norm)
            if not of_vectors and draw(st.booleans()):
                layers.append(NormResidual(outputs))
            stage = nn.Sequential(*layers)
        elif type(stage) is Residual:
            stage = BasicBlock(stage.first.in_channels)
        stages.append(stage)
    normed = lf.TransferNet(stages)
    head = copy.deepcopy(net.heads["a"])
    if draw(st.booleans()):
        head.append(nn.BatchNorm1d(head[1].out_features))
    normed.add_task("a", head)
    samples = draw(st.integers(2, 5))
    x = torch.randn(samples, *case.x.shape[1:], dtype=torch.float64)
    classes = head[1].out_features
    return Case(normed.double(), case.space, x, torch.randint(classes, (samples,)))


def searches(case, **options):
    """LASEMs on copies of the net, that evaluate in each of the ways that there are."""
    for way in ("torch", "reference", "few", "lists", "lists in C++"):
        backend = way if way in ("torch", "reference") else "torch"
        em = lf.LASEM(copy.deepcopy(case.net), case.space, backend=backend, **options)
        if way == "lists":
            operations = PLAIN._replace(norms=(plain_torch.run_norm,))
            em._search.everything = evaluator_of(case.space, operations)
        if way == "lists in C++":
            if not cpu_ops.supported():
                continue
            operations = PLAIN._replace(norms=(cpu_norm.CpuNorm(torch.float64),))
            em._search.everything = evaluator_of(case.space, operations)
        if way == "few":
            em._search.few.add("a")
        yield em


@settings(max_examples=40)
@given(normed_cases())
def test_a_step_is_that_of_every_configuration_alone(case):
    truth = brute_force(copy.deepcopy(case.net), case.space.bits, case.x, case.y, "a")
    weights = truth.posterior
    expected = statistics_after(case.net, case.space.bits, case.x, "a", weights)
    for em in searches(case):
        assert_step_equals(em.net, em(case.x, case.y, "a"), truth)
        assert_statistics_equal(em.net, expected)


@settings(max_examples=20)
@given(normed_cases(), st.sampled_from([{"prune": 0.3}, {"m_step_draws": 2}]))
def test_statistics_move_by_the_configurations_that_the_m_step_follows(case, options):
    for em in searches(case, **options):
        step = None
        with torch.random.fork_rng():
            step = em(case.x, case.y, "a")
        weights = em._search.m_step.weights(step.posterior).weights  # draws the same ones again
        expected = statistics_after(case.net, case.space.bits, case.x, "a", weights)
        assert_statistics_equal(em.net, expected)
        truth = brute_force(
            copy.deepcopy(case.net), case.space.bits, case.x, case.y, "a", posterior=weights
        )
        assert_step_equals(em.net, step, truth._replace(posterior=step.posterior))


@settings(max_examples=20)
@given(normed_cases(), st.booleans())
def test_frozen_it_is_part_of_the_weights(case, bounded):
    for layer in norm_layers(case.net).values():
        layer.running_mean.uniform_()
        layer.running_var.uniform_(1, 2)
        layer.eval()
    before = copy.deepcopy(case.net.state_dict())
    truth = brute_force(case.net, case.space.bits, case.x, case.y, "a")
    for em in searches(case):
        tree = em._search.everything
        if bounded and tree.__class__.__name__ == "Tree":
            costs = step_bytes(em._network("a", case.x), tree.operations, case.x)
            cuts = cuts_of(tree.plan, costs)
            if cuts:
                em._search.everything = BoundedTree(tree.plan, tree.operations, 1)
                em._search.everything._cut = lambda network, x, cuts=cuts: cuts[0]
        assert_step_equals(em.net, em(case.x, case.y, "a"), truth)
        after = em.net.state_dict()
        assert all(torch.equal(before[name], after[name]) for name in before)


def test_branches_whose_norms_differ_are_evaluated_apart():
    changes = {
        "eps": lambda norm: setattr(norm, "eps", 0.1),
        "mode": lambda norm: norm.eval(),
        "affine": lambda norm: norm.register_parameter("weight", None),
    }
    for change in changes.values():
        net = _normed_net()
        change(net.specific["a"][1][2])
        x, y = small_batch()
        truth = brute_force(copy.deepcopy(net), lf.ConfigSpace(3).bits, x, y, "a")
        for em in searches(Case(net, lf.ConfigSpace(3), x, y)):
            assert_step_equals(em.net, em(x, y, "a"), truth)


def _normed_net(*more, depth=3, **options):
    net = small_net(depth, extra=(lambda: nn.BatchNorm2d(3, **options), *more))
    return net


def test_a_bounded_step_moves_them_once_whatever_the_budget():
    net = _normed_net()
    x, y = small_batch()
    space = lf.ConfigSpace(3)
    truth = brute_force(copy.deepcopy(net), space.bits, x, y, "a")
    expected = statistics_after(net, space.bits, x, "a", truth.posterior)
    whole = lf.LASEM(copy.deepcopy(net), backend="torch")
    plan, operations = whole._search.everything.plan, whole._search.everything.operations
    costs = step_bytes(whole._network("a", x), operations, x)
    for cut in cuts_of(plan, costs):
        em = lf.LASEM(copy.deepcopy(net), backend="torch")
        bounded = BoundedTree(plan, operations, 1)
        bounded._cut = lambda network, x, cut=cut: cut
        em._search.everything = bounded
        assert_step_equals(em.net, em(x, y, "a"), truth)
        assert_statistics_equal(em.net, expected)
    em = lf.LASEM(copy.deepcopy(net), backend="torch", max_memory=10**9)
    em(x, y, "a")
    assert_statistics_equal(em.net, expected)  # measuring what a step holds moves nothing


class Doubling(nn.Module):
    """A random layer that a test can foresee."""

    stochastic = True

    def forward(self, h):
        return 2 * h if self.training else h


@pytest.mark.parametrize(
    ("backend", "max_memory"), [("torch", None), ("torch", "least"), ("reference", None)]
)
def test_with_dropout_the_statistics_are_those_of_the_m_step(backend, max_memory):
    net = _normed_net()
    for stages in (net.shared, net.specific["a"]):
        stages[1].insert(0, Doubling())
    x, y = small_batch()
    bits = lf.ConfigSpace(3).bits
    calm = copy.deepcopy(net)
    for layer in calm.modules():
        if isinstance(layer, Doubling):
            layer.training = False
    posterior = brute_force(calm, bits, x, y, "a").posterior
    truth = brute_force(copy.deepcopy(net), bits, x, y, "a", posterior=posterior)
    expected = statistics_after(net, bits, x, "a", posterior)
    em = lf.LASEM(net, backend=backend)
    if max_memory:
        tree = em._search.everything
        bounded = BoundedTree(tree.plan, tree.operations, 1)
        costs = step_bytes(em._network("a", x), tree.operations, x)
        smallest = min(cuts_of(tree.plan, costs), key=lambda cut: cut.peak)
        bounded._cut = lambda network, x: smallest
        em._search.everything = bounded
    step = em(x, y, "a")
    assert_equals(step.posterior, posterior, "posterior")
    em.net.zero_grad()
    step.loss.backward()
    for name, parameter in em.net.named_parameters():
        assert_equals(parameter.grad, truth.grads[name], name)
    assert_statistics_equal(em.net, expected)


def test_only_steps_of_training_move_them():
    em = lf.LASEM(_normed_net(), backend="torch")
    x, y = small_batch()
    before = copy.deepcopy(em.net.state_dict())
    with torch.no_grad():
        em(x, y, "a")
    em.evaluate(x, "a")
    em.eval()
    em.net.train()
    em(x, y, "a")
    em.train()
    torch.func.grad(lambda x: em(x, y, "a").loss)(x)
    for bad in (x[:, :1], x[:, :, :0], x * torch.nan):
        with pytest.raises(ValueError, match="x: "):
            em(bad, y, "a")
    after = em.net.state_dict()
    assert all(torch.equal(before[name], after[name]) for name in before)
    em(x, y, "a")
    assert int(em.net.shared[0][2].num_batches_tracked) == 1


def test_in_evaluation_mode_it_is_an_ordinary_layer():
    em = lf.LASEM(_normed_net(), backend="torch")
    x, y = small_batch()
    em(x, y, "a")
    em.eval()
    truth = brute_force(em.net, em.space.bits, x, y, "a", log_prior=em.prior("a").log())
    assert_step_equals(em.net, em(x, y, "a"), truth)


@pytest.mark.parametrize("backend", ["torch", "reference"])
def test_without_running_statistics_the_batch_s_own_are_used_in_both_modes(backend):
    net = _normed_net(track_running_stats=False)
    x, y = small_batch()
    for mode in (True, False):
        em = lf.LASEM(net.train(mode), backend=backend)
        truth = brute_force(net, em.space.bits, x, y, "a")
        assert_step_equals(net, em(x, y, "a"), truth)


def test_a_layer_that_is_used_twice_moves_twice():
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.norm = nn.BatchNorm2d(2, momentum=0.3)

        def forward(self, h):
            return self.norm(self.norm(h).relu() + h)

    net = lf.TransferNet([Twice()])
    net.add_task("a", nn.Sequential(nn.Flatten(), nn.Linear(72, 3)))
    net.double()
    alone = copy.deepcopy(net)
    x, y = small_batch()
    lf.LASEM(net, backend="torch")(x, y, "a")
    alone.shared[0](x), alone.specific["a"][0](x)  # one row a branch: an ordinary call
    for name, tensor in alone.named_buffers():
        torch.testing.assert_close(dict(net.named_buffers())[name], tensor, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("momentum", [0.1, None])
def test_they_move_at_every_step(momentum):
    net = _normed_net(momentum=momentum)
    em = lf.LASEM(net, backend="torch")
    for seed in range(4):
        x, y = small_batch(seed=seed)
        before = copy.deepcopy(net)
        step = em(x, y, "a")
        expected = statistics_after(before, em.space.bits, x, "a", step.posterior)
        assert_statistics_equal(net, expected)


def test_a_task_that_has_ended_is_trained_like_any_net():
    net = _normed_net()
    em = lf.LASEM(net, backend="torch")
    x, y = small_batch()
    em(x, y, "a")
    config = em.end_task("a", {1, 3})
    alone = copy.deepcopy(net)
    em(x, y, "a").loss.backward()
    loss = nn.functional.cross_entropy(alone(x, "a", config), y)
    loss.backward()
    for (name, ours), theirs in zip(net.named_parameters(), alone.parameters(), strict=True):
        if theirs.grad is not None:
            torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-12, atol=1e-12, msg=name)
    for (name, ours), theirs in zip(net.named_buffers(), alone.buffers(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12, msg=name)


def test_a_step_of_an_ended_task_that_fails_moves_nothing(monkeypatch):
    net = _normed_net()
    em = lf.LASEM(net, backend="torch")
    x, y = small_batch()
    em(x, y, "a")
    em.end_task("a", {1, 3})
    before = copy.deepcopy(net.state_dict())
    monkeypatch.setattr(type(net.mechanism), "auxiliary_loss", lambda *_: "no tensor")
    with pytest.raises(TypeError, match="auxiliary_loss"):
        em(x, y, "a")
    assert all(torch.equal(before[name], t) for name, t in net.state_dict().items())


def test_the_end_of_a_task_rolls_them_back():
    net = _normed_net()
    em = lf.LASEM(net, backend="torch")
    before = copy.deepcopy(net.shared.state_dict())
    em(*small_batch(), "a")
    assert not torch.equal(net.shared[1][2].running_mean, before["1.2.running_mean"])
    em.end_task("a", {1})
    for name, tensor in net.shared.state_dict().items():
        stays = name.startswith("0.2.") and "bias" not in name and "weight" not in name
        assert torch.equal(tensor, before[name]) != stays, name


def test_a_configuration_that_overflows_moves_nothing():
    net = _normed_net(depth=2)
    with torch.no_grad():
        net.specific["a"][0][2].weight[0] = 1.7e308
    x, y = small_batch()
    bits = lf.ConfigSpace(2).bits
    truth = brute_force(copy.deepcopy(net), bits, x, y, "a")
    assert 0 < int((truth.posterior == 0).sum()) < 4
    expected = statistics_after(net, bits, x, "a", truth.posterior)
    for backend in ("torch", "reference"):
        em = lf.LASEM(copy.deepcopy(net), backend=backend)
        assert_step_equals(em.net, em(x, y, "a"), truth)
        assert_statistics_equal(em.net, expected)


@pytest.mark.skipif(lf.backends()["cpp"] != "available", reason=lf.backends()["cpp"])
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_the_c_plus_plus_backend_takes_the_layers_around_it(memory_format):
    """In float32, within twice what PyTorch's own step of every configuration is off by."""
    net = _normed_net(lambda: nn.Conv2d(3, 3, 3, padding=1))
    x, y = small_batch()
    truth = brute_force(copy.deepcopy(net), lf.ConfigSpace(3).bits, x, y, "a")
    single = copy.deepcopy(net).float().to(memory_format=memory_format)
    plain = brute_force(copy.deepcopy(single), lf.ConfigSpace(3).bits, x.float(), y, "a")
    em = lf.LASEM(single, backend="cpp")
    em(x.float().to(memory_format=memory_format), y, "a").loss.backward()
    error = theirs = 0.0
    for name, parameter in em.net.named_parameters():
        error += float((parameter.grad - truth.grads[name]).norm() ** 2)
        theirs += float((plain.grads[name] - truth.grads[name]).norm() ** 2)
    assert error**0.5 <= 2 * theirs**0.5


@pytest.mark.parametrize("backend", ["torch", "auto"])
def test_what_may_break_into_graphs_is_not_compiled(backend, request):
    request.addfinalizer(torch._dynamo.reset)  # it remembers what it could not compile
    x, y = torch.randn(6, 8), torch.arange(6) % 3
    linear = lambda: nn.Sequential(nn.Linear(8, 8), nn.BatchNorm1d(8), nn.ReLU())  # noqa: E731
    net = lf.TransferNet([linear(), linear()])
    net.add_task("a", nn.Linear(8, 3))
    net.double()
    truth = lf.LASEM(copy.deepcopy(net), backend="reference")
    em = lf.LASEM(net, backend=backend)
    compiled = torch.compile(em, backend="eager")
    for _ in range(2):
        ours, theirs = compiled(x.double(), y, "a"), truth(x.double(), y, "a")
        torch.testing.assert_close(ours.posterior, theirs.posterior, rtol=0, atol=1e-10)
        torch.testing.assert_close(ours.loss, theirs.loss, rtol=0, atol=1e-10)
    for name, buffer in em.net.named_buffers():
        torch.testing.assert_close(buffer, truth.net.get_buffer(name), rtol=0, atol=1e-10)


def test_what_is_refused_in_words():
    x, y = small_batch()
    for norm in (nn.SyncBatchNorm(3), type("Own", (nn.BatchNorm2d,), {})(3)):
        net = small_net(1)
        net.shared[0].append(norm.double())
        with pytest.raises(ValueError, match=r"independently, got shared.0.2 .*statistics"):
            lf.LASEM(net, backend="torch")(x, y, "a")
    em = lf.LASEM(_normed_net(), backend="torch")
    with pytest.raises(Exception, match=r"BatchNorm in training mode inside torch\.compile"):
        torch.compile(em, backend="eager", fullgraph=True)(x, y, "a")

    class Pixels(nn.Module):
        def __init__(self):
            super().__init__()
            self.norm = nn.BatchNorm1d(3)

        def forward(self, h):
            rows = h.permute(0, 2, 3, 1).flatten(0, 2)
            return self.norm(rows).view(len(h), *h.shape[2:], 3).permute(0, 3, 1, 2)

    for backend in ("torch", "reference"):
        em = lf.LASEM(small_net(1, extra=(Pixels,)), backend=backend)
        with pytest.raises(ValueError, match=r"BatchNorm1d.* one entry for each .* got 144"):
            em(x, y, "a")


@pytest.mark.parametrize("momentum", [0.1, None])
def test_statistics_move_without_a_look_at_a_value(momentum):
    """So that a CUDA graph can hold it: a tensor on ``meta`` has no values."""
    norms, on = BatchNorms(), {"device": "meta"}
    layers = [nn.BatchNorm2d(n, momentum=momentum, **on) for n in (3, 5, 3)]
    for layer, rows in zip(layers, (2, 2, 4), strict=True):
        seen = torch.empty(rows, 2 * layer.num_features, **on)
        for number in (0, 1):
            norms.note(layer, number, seen, lambda weights, _, rows=rows: weights[:rows])
    norms.move(torch.empty(4, **on))


def test_layers_move_together_as_they_would_alone():
    torch.manual_seed(0)
    weights = torch.tensor([0.5, 0.0, 0.2, 0.3]).double()

    def moved(together):
        torch.manual_seed(1)
        layers = [
            nn.BatchNorm1d(n, momentum=m, track_running_stats=True).double()
            for n in (1, 3, 2)
            for m in (0.1, 0.7, None)
        ]
        norms = BatchNorms()
        for layer in layers:
            for number in (0, 1):
                seen = torch.rand(4, 2 * layer.num_features).double()
                seen[1] = torch.nan  # weighs nothing
                own = weights if layer.num_features > 1 else torch.zeros(4).double()
                norms.note(layer, number, seen, lambda w, _, own=own: own)
            if not together:
                norms.move(weights)
                norms = BatchNorms()
        if together:
            norms.move(weights)
        return [t for layer in layers for t in layer.buffers()]

    for a, b in zip(moved(True), moved(False), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-15)
    assert bool(torch.isfinite(torch.stack([t.sum() for t in moved(True)])).all())


def test_a_single_value_per_channel_is_refused():
    net = lf.TransferNet([nn.Sequential(nn.Linear(2, 3), nn.BatchNorm1d(3))])
    net.add_task("a", nn.Linear(3, 2))
    for backend in ("torch", "reference"):
        em = lf.LASEM(net, backend=backend)
        with pytest.raises(ValueError, match="x: expected more than one value per channel"):
            em(torch.randn(1, 2), torch.tensor([0]), "a")
    net = lf.TransferNet([nn.Sequential(nn.Conv2d(2, 3, 1), nn.BatchNorm2d(3))])
    net.add_task("a", nn.Sequential(nn.Flatten(), nn.Linear(3, 2)))
    case = Case(
        net.double(), lf.ConfigSpace(1), torch.randn(1, 2, 1, 1).double(), torch.tensor([0])
    )
    for em in searches(case):
        with pytest.raises(ValueError, match="x: expected more than one value per channel"):
            em(case.x, case.y, "a")


@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize("samples", [1, 2])
@pytest.mark.parametrize("rows", [(0, 3), (0, 1, 3), (1,), None])
def test_channels_last_batches_of_one(rows, samples, frozen):
    """PyTorch 2.13's backward is wrong where the stride of a single image is an odd one."""
    torch.manual_seed(0)
    stages = [
        nn.BatchNorm2d(2),
        nn.Sequential(nn.Conv2d(2, 2, 3, padding=1), nn.BatchNorm2d(2)),
        nn.Sequential(nn.GELU(), nn.BatchNorm2d(2)),
    ]
    net = lf.TransferNet(stages)
    net.add_task("a", nn.Sequential(nn.Flatten(), nn.Linear(24, 3)))
    net.double().train(not frozen)
    space = lf.ConfigSpace(3)
    if rows is not None:
        space = lf.ConfigSpace.from_configs([2 * row for row in rows], depth=3)
    x = torch.randn(samples, 2, 4, 3, dtype=torch.float64)
    y = torch.randint(3, (samples,))
    truth = brute_force(copy.deepcopy(net), space.bits, x, y, "a")
    for last in (x, x.contiguous(memory_format=torch.channels_last)):
        case = Case(net, space, last, y)
        for em in searches(case):
            leaf = last.detach().requires_grad_()
            assert_step_equals(em.net, em(leaf, y, "a"), truth)
            ours = leaf.grad
            leaf = x.detach().requires_grad_()
            other = lf.LASEM(copy.deepcopy(net), space, backend="reference")
            other(leaf, y, "a").loss.backward()
            assert_equals(ours, leaf.grad, "gradient of x")


class Checkpointed(nn.Module):
    def __init__(self, reentrant):
        super().__init__()
        self.reentrant = reentrant
        self.layers = nn.Sequential(nn.Conv2d(3, 3, 3, padding=1), nn.BatchNorm2d(3), nn.ReLU())

    def forward(self, h):
        return checkpoint(self.layers, h, use_reentrant=self.reentrant)


@pytest.mark.parametrize(("reentrant", "max_memory"), [(False, None), (False, 2**20), (True, None)])
def test_a_layer_inside_a_checkpoint_is_refused(reentrant, max_memory):
    net = lf.TransferNet([nn.Conv2d(2, 3, 3, padding=1), Checkpointed(reentrant)])
    net.add_task("a", nn.Sequential(nn.Flatten(), nn.Linear(108, 3)))
    em = lf.LASEM(net.double(), backend="torch", max_memory=max_memory)
    with pytest.raises(ValueError, match=r"BatchNorm2d.* outside of torch.utils.checkpoint"):
        em(*small_batch(), "a")
    net.eval()
    em(*small_batch(), "a").loss.backward()


class Held(nn.Module):
    """A frozen part, and a layer that decides about its mode itself."""

    def __init__(self):
        super().__init__()
        self.front = nn.Sequential(nn.Conv2d(3, 3, 3, padding=1), nn.BatchNorm2d(3))
        self.norm = nn.BatchNorm2d(3)

    def forward(self, h):
        with torch.no_grad():
            h = self.front(h)
        self.norm.eval()
        return self.norm(h).relu()


def test_a_frozen_part_and_a_mode_that_is_set_inside(backend):
    torch.manual_seed(0)
    net = lf.TransferNet([nn.Conv2d(2, 3, 3, padding=1), Held()])
    net.add_task("a", nn.Sequential(nn.Flatten(), nn.Linear(108, 3)))
    net.double()
    x, y = small_batch()
    truth = brute_force(copy.deepcopy(net), lf.ConfigSpace(2).bits, x, y, "a")
    assert_step_equals(net, lf.LASEM(net, backend=backend)(x, y, "a"), truth)


class _Skip(nn.Module):
    """No known layer, so that its first mini-batch is looked at."""

    def __init__(self):
        super().__init__()
        self.conv, self.norm = nn.Conv2d(2, 2, 3, padding=1), nn.BatchNorm2d(2)

    def forward(self, h):
        return h + self.norm(self.conv(h))


def test_a_block_is_looked_at_under_autocast(backend):
    torch.manual_seed(0)
    net = lf.TransferNet([_Skip(), _Skip()])
    net.add_task("a", nn.Sequential(nn.Flatten(), nn.Linear(72, 3)))
    x, y = torch.randn(4, 2, 6, 6), torch.tensor([0, 2, 1, 1])
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found, wanted = (
            lf.LASEM(copy.deepcopy(net), backend=b)(x, y, "a").nll for b in (backend, "reference")
        )
    # the rounding of the products themselves
    assert (found - wanted).norm() <= torch.finfo(torch.bfloat16).eps * wanted.norm()
