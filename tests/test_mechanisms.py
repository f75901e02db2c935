"""Mechanisms beyond hps: life of a task, stages of any form, errors; LoRA as in the docs."""

from __future__ import annotations

import copy
import io
import re
from pathlib import Path

import pytest
import torch
from nets import Residual, batch
from oracle import assert_equals, assert_step_equals, brute_force
from paper_oracle import orthogonality
from torch import nn

import lasem_fast as lf
from lasem_fast.transfer.generated import GeneratedStage

DOCS = Path(__file__).parent.parent / "docs" / "mechanisms.md"


def _conv(inputs, outputs, *layers, **options):
    return nn.Sequential(nn.Conv2d(inputs, outputs, 3, padding=1, **options), nn.ReLU(), *layers)


def _net(transfer, tasks=("a",), stages=None, classes=3, features=27):
    stages = stages or [_conv(2, 3), nn.MaxPool2d(2), _conv(3, 3)]
    net = lf.TransferNet(stages, transfer=transfer)
    for task in tasks:
        net.add_task(task, nn.Sequential(nn.Flatten(), nn.Linear(features, classes)))
    return net.double()


def _logits(net, config, x, task):
    """One configuration from `net.path`'s parts, each weight generated for it alone."""
    h = x
    for stage, shared in enumerate(config):
        if shared and isinstance(net.shared[stage], GeneratedStage):
            branch = net.mechanism.shared_branch(net.shared[stage], net.adapters[task][stage])
            h = torch.func.functional_call(branch.module, dict(branch.tensors), (h,))
        else:
            h = (net.shared[stage] if shared else net.specific[task][stage])(h)
    return net.heads[task](h)


def _train(em, task, steps, seed=0):
    optimizer = torch.optim.SGD(em.net.task_parameters(task), lr=0.05)
    for i in range(steps):
        optimizer.zero_grad()
        em(*batch(seed=seed + i), task).loss.backward()
        optimizer.step()


GENERATING = ["tf", "dfcnn"]


@pytest.mark.parametrize("transfer", GENERATING)
def test_what_is_registered(transfer):
    stages = [_conv(2, 3), nn.MaxPool2d(2), _conv(3, 3, bias=False)]
    given = [p.clone() for s in stages for p in s.parameters()]
    net = _net(transfer, stages=stages)
    kept = [p for stage in stages for p in stage.parameters()]
    assert all(torch.equal(p, q) for p, q in zip(kept, given, strict=True))
    assert net.adapters["a"][1] is None and type(net.shared[1]) is nn.MaxPool2d
    names = [n for n, _ in net.shared.named_parameters()]
    assert names == ["0.knowledge.0.tensor", "2.knowledge.0.tensor"]
    own = net.specific["a"]
    assert own[0][0].weight.shape == (3, 2, 3, 3) and own[2][0].bias is None
    assert net.adapters["a"][2][0].bias is None and net.adapters["a"][0][0].bias.shape == (3,)
    assert not torch.equal(own[0][0].weight, torch.zeros_like(own[0][0].weight))
    em = lf.LASEM(net)
    em(*batch(), "a").loss.backward()
    without = [n for n, p in net.named_parameters() if p.grad is None]
    assert without == [], "parameters that nothing trains"


@pytest.mark.parametrize("transfer", GENERATING)
def test_a_weight_is_generated_once_per_mini_batch(transfer, monkeypatch):
    net = _net(transfer)
    calls = []
    generate = type(net.mechanism).weight
    monkeypatch.setattr(
        type(net.mechanism), "weight", lambda *args: calls.append(1) or generate(*args)
    )
    lf.LASEM(net, backend="torch")(*batch(), "a")
    assert len(calls) == 2


@pytest.mark.parametrize("backend", ["torch", "reference"])
@pytest.mark.parametrize("transfer", GENERATING)
@pytest.mark.parametrize("frozen", [False, True])
def test_gradients_equal_brute_force(transfer, backend, frozen):
    net = _net(transfer)
    posterior = torch.rand(8, dtype=torch.float64).softmax(0) if frozen else None
    x, y = batch()
    space = lf.ConfigSpace(3)
    truth = brute_force(
        net, space.bits, x, y, "a", posterior=posterior, logits=_logits,
        penalty=orthogonality(net, "a"),
    )  # fmt: skip
    step = lf.LASEM(net, space, backend=backend)(x, y, "a", posterior)
    assert_step_equals(net, step, truth)


@pytest.mark.parametrize("place", [0, 1, 2, 3])
@pytest.mark.parametrize("transfer", GENERATING)
def test_dropout_inside_a_generated_stage(transfer, place):
    class Doubling(nn.Dropout):
        def forward(self, h):
            return 2 * h if self.training else h

    middle = [nn.Conv2d(3, 3, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2)]
    middle.insert(place, Doubling())
    net = _net(transfer, stages=[_conv(2, 3), nn.Sequential(*middle), _conv(3, 3)])
    x, y = batch()
    bits = lf.ConfigSpace(3).bits
    penalty = orthogonality(net, "a")
    e_step = brute_force(net.eval(), bits, x, y, "a", logits=_logits)
    truth = brute_force(
        net.train(), bits, x, y, "a", posterior=e_step.posterior, logits=_logits, penalty=penalty
    )
    step = lf.LASEM(net, backend="torch")(x, y, "a")
    assert_step_equals(net, step, truth._replace(log_likelihood=e_step.log_likelihood))


class Block(nn.Module):
    """A residual block without a norm."""

    def __init__(self, channels):
        super().__init__()
        self.first = nn.Conv2d(channels, channels, 3, padding=1)
        self.second = nn.Conv2d(channels, channels, 1, bias=False)

    def forward(self, h):
        return h + self.second(self.first(h).relu())


@pytest.mark.parametrize("transfer", GENERATING)
def test_a_stage_may_hold_several_weighted_layers(transfer):
    net = _net(transfer, stages=[_conv(2, 3), Block(3), nn.Conv2d(3, 3, 1)], features=108)
    assert len(net.adapters["a"][1]) == 2
    x, y = batch()
    bits = lf.ConfigSpace(3).bits
    truth = brute_force(net, bits, x, y, "a", logits=_logits, penalty=orthogonality(net, "a"))
    assert_step_equals(net, lf.LASEM(net, backend="torch")(x, y, "a"), truth)


def test_tensor_factorisation_of_matrices_and_other_kernels():
    for stage, x in (
        (nn.Linear(4, 3), torch.randn(5, 4, dtype=torch.float64)),
        (nn.Conv1d(2, 3, 2), torch.randn(5, 2, 4, dtype=torch.float64)),
        (nn.Conv3d(1, 2, (1, 2, 1)), torch.randn(5, 1, 2, 2, 2, dtype=torch.float64)),
    ):
        net = lf.TransferNet([stage], transfer="tf")
        net.add_task("a", nn.Flatten())
        net.double()
        (factors,), (knowledge,) = net.adapters["a"][0], net.shared[0].knowledge
        n = knowledge.tensor.dim()
        letters = [chr(97 + i) for i in range(2 * n)]
        terms = ["".join(letters[:n]), *(letters[i] + letters[n + i] for i in range(n))]
        weight = torch.einsum(
            ",".join(terms) + "->" + "".join(letters[n:]), knowledge.tensor, *factors.modes
        )
        own = copy.deepcopy(stage).double()
        own.weight, own.bias = nn.Parameter(weight), nn.Parameter(factors.bias)
        expected = own(x).flatten(1).detach()
        assert_equals(net(x, "a", {1}).detach(), expected, type(stage).__name__)


@pytest.mark.parametrize("weight", [0, 0.5])
def test_weight_of_the_auxiliary_term(weight):
    net = _net(lf.transfer.TensorFactorization(aux_weight=weight))
    x, y = batch()
    bits = lf.ConfigSpace(3).bits
    truth = brute_force(
        net, bits, x, y, "a", logits=_logits, penalty=orthogonality(net, "a", weight)
    )
    assert_step_equals(net, lf.LASEM(net)(x, y, "a"), truth)
    if weight:
        plain = lf.LASEM(_net("dfcnn"))(x, y, "a")
        assert float(plain.loss.detach()) == pytest.approx(
            float((plain.posterior * plain.nll).sum())
        )


@pytest.mark.parametrize("backend", ["auto", "torch", "reference"])
def test_the_auxiliary_term_is_not_rounded_under_autocast(backend):
    net = _net("tf").float()
    with torch.no_grad():
        for factor in net.adapters["a"].parameters():  # nearly orthogonal, as it wants them
            if factor.dim() == 2:
                factor.copy_(torch.eye(len(factor)) + 1e-3 * torch.randn_like(factor))
    x, y = batch(dtype=torch.float32)
    em = lf.LASEM(net, backend=backend)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        step = em(x, y, "a")
    penalty = orthogonality(net, "a")
    terms = torch.stack([torch.as_tensor(penalty(i)).detach() for i in range(net.depth)])
    costs = step.nll + em.space.bits.float() @ terms
    assert_equals(step.loss.detach(), (step.posterior * costs).sum(), "loss", 1e-6)


@pytest.mark.parametrize("backend", ["auto", "torch", "reference"])
def test_the_weight_of_an_auxiliary_term_is_not_rounded_under_autocast(backend):
    class Decay(lf.transfer.HardParameterSharing):
        def auxiliary_loss(self, shared, adapters):
            return 1000 * sum((p.square().sum() for p in shared.parameters()), torch.zeros(()))

    net = _net(Decay()).float()
    em = lf.LASEM(net, backend=backend)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        step = em(*batch(dtype=torch.float32), "a")
    costs = step.nll + em.space.bits.float() @ torch.stack(net.auxiliary_losses("a")).detach()
    expected = (step.posterior * costs).sum()
    assert_equals(step.loss.detach() / expected, torch.ones(()), "loss", 1e-6)


@pytest.mark.parametrize("config", [set(), {1}, {1, 3}, {1, 2, 3}, {2}])
@pytest.mark.parametrize("transfer", GENERATING)
def test_end_of_a_task(transfer, config):
    net = _net(transfer, tasks=("a", "b"))
    em = lf.LASEM(net)
    before = [p.detach().clone() for p in net.shared.parameters()]
    _train(em, "a", 2)
    after = [p.detach().clone() for p in net.shared.parameters()]
    x, _ = batch()
    logits = net(x, "a", config)
    bits = em.end_task("a", config)
    for i, stage in enumerate((0, 2)):
        (now,) = net.shared[stage].parameters()
        assert torch.equal(now.detach(), (after if bits[stage] else before)[i])
        assert (net.adapters["a"][stage] is None) == (not bits[stage])
        assert (net.specific["a"][stage] is None) == bits[stage]
    assert torch.equal(net(x, "a"), logits)
    frozen = net.freeze("a")
    assert torch.equal(frozen(x), logits.detach())
    assert not [n for n in frozen.state_dict() if "knowledge" in n]
    for other in (set(), {1, 2, 3}):
        if {i + 1 for i, b in enumerate(bits) if b and i != 1} != other - {2}:
            with pytest.raises(ValueError, match="its other branches were dropped"):
                net(x, "a", other)
    used = {id(p) for p in net.task_parameters("a")}
    generated = sum(1 for i in (0, 2) if bits[i])
    assert len(used & {id(p) for p in net.shared.parameters()}) == generated
    # coming back: a plain step of the kept configuration, with the auxiliary terms it has
    net.zero_grad()
    y = batch()[1]
    step = em(x, y, "a")
    step.loss.backward()
    penalty = orthogonality(net, "a")
    expected = nn.functional.cross_entropy(logits, y) + sum(
        penalty(i) for i, b in enumerate(bits) if b and penalty
    )
    assert_equals(step.loss.detach(), expected.detach(), "loss of a revisit")
    assert all(p.grad is not None for p in net.task_parameters("a"))
    _train(em, "b", 1)


@pytest.mark.parametrize("transfer", GENERATING)
@pytest.mark.parametrize("redraw", [False, True])
def test_a_resumed_run_equals_an_uninterrupted_one(transfer, redraw):
    def begin():
        net = _net(transfer, tasks=("a", "b"))
        return lf.LASEM(net, redraw_unclaimed=redraw)

    whole = begin()
    _train(whole, "a", 2)
    torch.manual_seed(7)
    whole.end_task("a", {1})
    _train(whole, "b", 1, seed=5)
    file = io.BytesIO()
    torch.save(whole.state_dict(), file)
    _train(whole, "b", 2, seed=6)
    torch.manual_seed(8)
    whole.end_task("b", {3})

    file.seek(0)
    resumed = begin()
    resumed.load_state_dict(torch.load(file, weights_only=False))
    _train(resumed, "b", 2, seed=6)
    torch.manual_seed(8)
    resumed.end_task("b", {3})
    for (name, p), (_, q) in zip(
        whole.net.state_dict().items(), resumed.net.state_dict().items(), strict=True
    ):
        assert torch.equal(p, q) if isinstance(p, torch.Tensor) else p == q, name


@pytest.mark.parametrize("transfer", ["hps", *GENERATING])
def test_redrawing_of_unclaimed_stages(transfer):
    net = _net(transfer, tasks=("a", "b", "c"))
    em = lf.LASEM.reference(net)

    def weights():
        return [next(net.shared[i].parameters()).detach().clone() for i in (0, 2)]

    start = weights()
    _train(em, "a", 1)
    learnt = weights()
    em.end_task("a", {1})
    first = weights()
    assert torch.equal(first[0], learnt[0])
    assert not torch.equal(first[1], start[1]) and not torch.equal(first[1], learnt[1])
    _train(em, "b", 1)
    em.end_task("b", set())
    assert torch.equal(weights()[0], first[0]), "rolled back to what task a left"
    second = weights()
    assert not torch.equal(second[1], first[1])
    _train(em, "c", 1)
    learnt = weights()
    em.end_task("c", {3})
    assert torch.equal(weights()[1], learnt[1]) and torch.equal(weights()[0], first[0])


def test_nothing_is_redrawn_under_a_task_that_is_under_way():
    net = _net("hps", tasks=("a", "b"))
    em = lf.LASEM(net, redraw_unclaimed=True)
    x, y = batch()
    for task in ("a", "b"):
        em(x, y, task)
    before = copy.deepcopy(net.shared.state_dict())
    em.end_task("a", set())
    assert all(torch.equal(v, before[n]) for n, v in net.shared.state_dict().items())
    em.end_task("b", set())
    assert not torch.equal(net.shared[0][0].weight, before["0.0.weight"])


def test_derived_sizes_and_given_ones():
    net = _net("dfcnn", stages=[nn.Conv2d(2, 5, 7, padding=3), nn.Conv2d(5, 3, 1)], features=108)
    assert [s.knowledge[0].sizes for s in net.shared] == [(4, 3, 3, 6), (1, 2, 3, 4)]
    given = [(4, 1, 5, 2), (1, 1, 1, 1)]
    mechanism = lf.transfer.DeconvolutionalFactorization(sizes=given)
    net = _net(mechanism, stages=[nn.Conv2d(2, 5, 7, padding=3), nn.Conv2d(5, 3, 1)], features=108)
    assert [s.knowledge[0].sizes for s in net.shared] == given


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (
            lambda: _net("tf", stages=[_conv(2, 3), Residual(3)]),
            r"GroupNorm with 'weight' at stages\[1\]\.norm",
        ),
        (
            lambda: _net("dfcnn", stages=[nn.Linear(2, 2)]),
            r"type Conv2d, got Linear with 'weight' at stages\[0\]",
        ),
        (
            lambda: _net("tf", stages=[nn.utils.spectral_norm(nn.Linear(2, 2))]),
            r"got Linear with 'weight_orig' at stages\[0\]",
        ),
        (lambda: _net("dfcnn", stages=[nn.Conv2d(2, 2, 2)]), r"odd side, got 2 x 2 at stages\[0\]"),
        (lambda: _net("dfcnn", stages=[nn.Conv2d(2, 2, (1, 3))]), "square kernels .* got 1 x 3"),
        (
            lambda: _net(lf.transfer.DeconvolutionalFactorization([(2, 1, 3, 1)])),
            "sizes: expected one entry for each of the net's 2 convolutions, got 1",
        ),
        (
            lambda: _net(lf.transfer.DeconvolutionalFactorization([(3, 1, 3, 1)] * 2)),
            r"sizes: expected knowledge=2 for the 3 x 3 kernel at stages\[0\]\.0, got 3",
        ),
        (lambda: lf.transfer.DeconvolutionalFactorization([(2, 1, 3)]), "expected entries of 4"),
        (lambda: lf.transfer.DeconvolutionalFactorization([(2, 1, 2, 1)]), "an odd filter"),
        (lambda: lf.transfer.DeconvolutionalFactorization([(2, 0, 3, 1)]), "of at least 1"),
        (lambda: lf.transfer.TensorFactorization(aux_weight=-1), "aux_weight: expected"),
    ],
)  # fmt: skip
def test_what_a_mechanism_cannot_do_is_refused_in_words(call, words):
    with pytest.raises(ValueError, match=words):
        call()


class _Adapting(lf.transfer.TransferMechanism):
    """Gives what it is made with."""

    def __init__(self, shared=None, specific=None, adapters=None, tensors=None):
        super().__init__()
        self.given = shared, specific, adapters
        self.tensors = tensors or (lambda layer: {"weight": 2 * layer.weight})

    def shared_modules(self, stages):
        return stages if self.given[0] is None else self.given[0](stages)

    def new_specific(self, shared):
        return super().new_specific(shared) if self.given[1] is None else self.given[1]

    def new_adapters(self, shared):
        return self.given[2]

    def shared_branch(self, shared, adapters):
        return lf.transfer.Branch(shared, self.tensors(shared))


@pytest.mark.parametrize(
    ("options", "error", "words"),
    [
        ({"shared": lambda stages: stages[:1]}, TypeError, "shared_modules .* got .'Linear'.$"),
        ({"shared": lambda stages: None}, TypeError, "shared_modules .* got NoneType"),
        ({"specific": 5}, TypeError, "new_specific of _Adapting to give a module, got int"),
        ({"adapters": 5}, TypeError, "new_adapters of _Adapting .* or None, got int"),
        ({"tensors": lambda m: {"weigth": m.weight}}, ValueError, "Linear, got .* 'weigth'"),
        ({"tensors": lambda m: {"a.weight": m.weight}}, ValueError, "got .* 'a.weight'"),
        ({"tensors": lambda m: {"weight": 3}}, TypeError, "for 'weight', got int"),
        ({"tensors": lambda m: {"weight": m.weight[:1]}}, ValueError, r"\[3, 3\], got \[1, 3\]"),
    ],
)
@pytest.mark.parametrize("backend", ["torch", "auto", "reference"])
def test_what_a_users_mechanism_gives_is_checked(options, error, words, backend):
    def step(**options):
        net = lf.TransferNet([nn.Linear(3, 3) for _ in range(2)], transfer=_Adapting(**options))
        net.add_task("a", nn.Linear(3, 2))
        return lf.LASEM(net, backend=backend)(torch.randn(4, 3), torch.tensor([0, 1, 1, 0]), "a")

    assert step().loss.isfinite()
    with pytest.raises(error, match=f"transfer: expected .*{words}"):
        step(**options)


def test_a_shared_stage_cannot_be_called_without_a_task():
    with pytest.raises(RuntimeError, match="use net"):
        _net("tf").shared[0](batch()[0])


def test_compiled_step_with_generated_weights():
    net = _net("tf")
    em = lf.LASEM(net, backend="torch")
    x, y = batch()
    expected = em(x, y, "a")
    em._prior.forget("a")
    actual = torch.compile(em, backend="aot_eager")(x, y, "a")
    assert_equals(actual.loss.detach(), expected.loss.detach(), "loss")


def test_lora_as_in_the_docs():
    (code,) = re.findall(r"```python\n(import torch.*?)```", DOCS.read_text(), re.DOTALL)
    scope = {}
    exec(compile(code, str(DOCS), "exec"), scope)
    net, em = scope["net"].double(), scope["em"]
    for factors in (f for f in net.adapters["digits"] if f is not None):
        nn.init.normal_(factors.b)
    x, y = torch.randn(6, 1, 8, 8, dtype=torch.float64), torch.randint(10, (6,))

    def logits(net, config, x, task):
        h = x
        for i, shared in enumerate(config):
            stage, factors = net.shared[i], net.adapters[task][i]
            if not shared:
                h = net.specific[task][i](h)
            elif factors is None:
                h = stage(h)
            else:
                linear = next(m for m in stage if isinstance(m, nn.Linear))
                low_rank = h.flatten(1) @ factors.a.T @ factors.b.T
                h = (linear(h.flatten(1)) + low_rank).relu()
        return net.heads[task](h)

    truth = brute_force(net, em.space.bits, x, y, "digits", logits=logits)
    assert_step_equals(net, em(x, y, "digits"), truth)
    em.end_task("digits", {1, 3})
    assert [f is None for f in net.adapters["digits"]] == [True, True, False]
    expected = logits(net, (True, False, True), x, "digits").detach()
    assert_equals(net(x, "digits").detach(), expected, "logits")
    assert_equals(net.freeze("digits")(x), expected, "logits of the frozen net")


def test_the_settings_in_the_docs_are_real():
    (code,) = re.findall(r"```python\n(lf\.transfer.*?)```", DOCS.read_text(), re.DOTALL)
    exec(code, {"lf": lf})


@pytest.mark.parametrize("transfer", ["tf", "dfcnn"])
def test_weights_are_generated_under_autocast(transfer):
    stages = [nn.Sequential(nn.Conv2d(2, 3, 3, padding=1), nn.ReLU())]
    net = lf.TransferNet(stages, transfer=transfer)
    net.add_task("a", nn.Sequential(nn.Flatten(), nn.Linear(3 * 36, 3)))
    x, y = torch.randn(4, 2, 6, 6), torch.tensor([0, 1, 2, 0])
    em = lf.LASEM(net)
    exact = em(x, y, "a", posterior=torch.full((2,), 0.5))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        step = em(x, y, "a", posterior=torch.full((2,), 0.5))
    step.loss.backward()
    # each of the step's few products rounds to 8 bits
    assert float((step.loss - exact.loss).abs() / exact.loss.abs()) < 16 * 2**-8
    assert all(torch.isfinite(p.grad).all() for p in net.task_parameters("a"))


class _Halving(lf.transfer.TransferMechanism):
    """A shared branch with half of the stage's first weight."""

    def shared_branch(self, shared, adapters):
        name = next(name for name, _ in shared.named_parameters() if name.endswith("weight"))
        return lf.transfer.Branch(shared, {name: shared.get_parameter(name) / 2})


def _used_twice(*between):
    conv = nn.Conv2d(2, 2, 3, padding=1)
    return nn.Sequential(conv, nn.ReLU(), *between, conv, nn.ReLU())


def _tied(*between):
    first, second = nn.Conv2d(2, 2, 3, padding=1), nn.Conv2d(2, 2, 3, padding=1)
    second.weight = first.weight
    return nn.Sequential(first, nn.ReLU(), *between, second, nn.ReLU())


@pytest.mark.parametrize("between", [(), (nn.Dropout(0.0), nn.Tanh()), (nn.Dropout(1e-9),)])
@pytest.mark.parametrize("stage", [_used_twice, _tied])
def test_weights_of_one_stage_that_are_one(stage, between, backend):
    torch.manual_seed(0)
    net = lf.TransferNet([stage(*between), stage(*between)], transfer=_Halving())
    net.add_task("a", nn.Sequential(nn.Flatten(), nn.Linear(72, 3)))
    names = [name for name, _ in net.named_parameters()]
    x, y = batch(dtype=torch.float32)
    lf.LASEM(net, backend=backend)(x, y, "a").loss.backward()
    assert [name for name, _ in net.named_parameters()] == names

    def logits(net, config, x, task):
        h = x
        for stage, shared in enumerate(config):
            module = net.shared[stage] if shared else net.specific[task][stage]
            weight = module[0].weight / 2 if shared else module[0].weight
            for layer in module:
                is_conv = isinstance(layer, nn.Conv2d)
                h = layer._conv_forward(h, weight, layer.bias) if is_conv else layer(h)
        return net.heads[task](h)

    truth = brute_force(net, lf.ConfigSpace(2).bits, x, y, "a", logits=logits)
    for name, parameter in net.named_parameters():
        assert_equals(parameter.grad, truth.grads[name], name, 1e-5)


def test_tied_layers_whose_weights_would_be_generated_apart_are_refused():
    with pytest.raises(ValueError, match=r"stages\[0\].0 and stages\[0\].2, which share one"):
        _net("tf", stages=[_tied()])


def test_a_generated_layer_used_twice_across_a_dropout(backend):
    torch.manual_seed(0)
    net = _net("tf", stages=[_used_twice(nn.Dropout(1e-9))], features=72)
    found = []
    for name in (backend, "reference"):
        net.zero_grad()
        lf.LASEM(net, backend=name)(*batch(), "a").loss.backward()
        found.append([parameter.grad for parameter in net.parameters()])
    torch.testing.assert_close(*found)


def test_an_auxiliary_loss_that_an_object_is_given_counts_from_then_on():
    net = _net("hps")
    em = lf.LASEM(net, prior="uniform")
    x, y = batch()
    assert net.auxiliary_losses("a") == [None] * 3
    plain = em(x, y, "a")
    net.mechanism.auxiliary_loss = lambda shared, adapters: torch.tensor(2.0).double()
    more = em(x, y, "a").loss - plain.loss
    shared = plain.posterior @ em.space.bits.to(plain.posterior)
    torch.testing.assert_close(more, 2 * shared.sum())
