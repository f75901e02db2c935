"""What a step finds out about its modules holds for that step: changes in between are seen."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from torch import nn
from torch.nn.modules import module as torchs

import lasem_fast as lf
from lasem_fast.networks import walk
from lasem_fast.networks.layers import has_tensors, modules_in, parameters_in


def _net():
    torch.manual_seed(0)
    stages = [
        nn.Sequential(nn.Conv2d(2, 3, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2)),
        nn.Sequential(nn.Conv2d(3, 3, 3, padding=1), nn.ReLU(), nn.Dropout(0.0)),
        nn.Sequential(nn.Flatten(), nn.Linear(12, 5), nn.Tanh()),
    ]
    net = lf.TransferNet(stages)
    net.add_task("a", nn.Linear(5, 4))
    return net.double()


def _batch():
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(3, 2, 4, 4, generator=generator, dtype=torch.float64)
    return x, torch.tensor([0, 3, 1])


def _gradients(em):
    em.net.zero_grad()
    step = em(*_batch(), "a")
    step.loss.backward()
    found = {n: p.grad for n, p in em.net.named_parameters() if p.grad is not None}
    return {"loss": step.loss.detach(), "posterior": step.posterior, **found}


def _both(net, name):
    return net.shared, net.specific[name]


class _Doubled(nn.Module):
    def forward(self, h):
        return 2 * h


class _AddsInPlace(nn.Module):
    inplace = False

    def forward(self, h):
        return h.add_(1) if self.inplace else h + 1


def _replace_a_layer(net):
    for branch in _both(net, "a"):
        branch[0][1] = nn.Tanh()


def _replace_a_stage(net):
    net.shared[1] = nn.Sequential(nn.Conv2d(3, 3, 1).double(), nn.Sigmoid())


def _add_a_layer(net):
    net.shared[1].append(_Doubled())


def _remove_a_layer(net):
    for branch in _both(net, "a"):
        del branch[0][1]


def _other_parameters(net):
    net.shared[0][0].weight = nn.Parameter(-net.shared[0][0].weight.detach())


def _weight_norm(net):
    nn.utils.parametrizations.weight_norm(net.shared[1][0])
    with torch.no_grad():
        net.shared[1][0].parametrizations.weight.original0.mul_(2)


def _old_weight_norm(net):
    nn.utils.weight_norm(net.specific["a"][1][0])
    with torch.no_grad():
        net.specific["a"][1][0].weight_g.mul_(2)


def _weight_as_plain_tensor(net):
    for branch in _both(net, "a"):
        weight = branch[0][0].weight.detach() * 2
        del branch[0][0].weight
        branch[0][0].weight = weight


def _patched_forward(net):
    core = net.shared[0][0]
    core.forward = lambda h: 3 * type(core).forward(core, h)


def _patched_forward_of_both(net):
    def forward(h, core=net.shared[0][0]):
        return 3 * core._conv_forward(h, core.weight, core.bias)

    for branch in _both(net, "a"):
        branch[0][0].forward = forward


def _patched_relu_of_both(net):
    for branch in _both(net, "a"):
        branch[0][1].forward = torch.abs


def _patched_pool_of_both(net):
    for branch in _both(net, "a"):
        branch[0][2].forward = _averages


def _averages(h):
    return nn.functional.avg_pool2d(h, 2)


def _patched_stage(net):
    net.shared[1].forward = torch.sigmoid


def _hook(net):
    net.shared[0][0].register_forward_hook(lambda m, inputs, out: 2 * out)


def _frozen(net):
    net.shared[0].requires_grad_(False)
    net.specific["a"][2][1].bias.requires_grad_(False)


def _eval_of_a_layer(net):
    for branch in _both(net, "a"):
        branch[1][2].eval()


def _writes_to_its_input(net):
    for branch in _both(net, "a"):
        branch[1].insert(0, _AddsInPlace())
        branch[1][0].inplace = True


CHANGES = [
    _replace_a_layer, _replace_a_stage, _add_a_layer, _remove_a_layer, _other_parameters,
    _weight_norm, _old_weight_norm, _weight_as_plain_tensor, _patched_forward,
    _patched_forward_of_both, _patched_relu_of_both, _patched_pool_of_both, _patched_stage, _hook,
    _frozen, _eval_of_a_layer, _writes_to_its_input,
]  # fmt: skip


@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__)
@pytest.mark.parametrize("reads_values", [True, False])
def test_a_change_between_two_steps_is_seen(change, reads_values, monkeypatch):
    """As the naive loop on a net that nobody has looked at before the change."""
    if not reads_values:
        monkeypatch.setattr(lf.LASEM, "_reads_values", lambda em, x: False)
    em = lf.LASEM(_net(), backend="torch")
    _gradients(em)
    change(em.net)
    fresh = lf.LASEM(_net(), backend="reference")
    _gradients(fresh)
    change(fresh.net)
    found, wanted = _gradients(em), _gradients(fresh)
    assert found.keys() == wanted.keys()
    for name, tensor in wanted.items():
        torch.testing.assert_close(found[name], tensor, rtol=1e-10, atol=1e-12, msg=name)


@pytest.mark.parametrize(
    "layer", [nn.SyncBatchNorm(3), nn.InstanceNorm2d(3, track_running_stats=True)]
)
def test_a_layer_that_mixes_samples_is_refused_when_it_comes_or_wakes(layer):
    em = lf.LASEM(_net(), backend="torch")
    _gradients(em)
    em.net.shared[1].append(copy.deepcopy(layer).double())
    with pytest.raises(ValueError, match=r"treat samples independently, got shared\.1\.3"):
        em(*_batch(), "a")
    em.net.shared[1][3].eval()
    em(*_batch(), "a")
    em.net.shared[1][3].train()
    with pytest.raises(ValueError, match=r"got shared\.1\.3"):
        em(*_batch(), "a")


def test_spectral_norm_is_refused_when_it_comes():
    em = lf.LASEM(_net(), backend="torch")
    _gradients(em)
    nn.utils.spectral_norm(em.net.specific["a"][1][0])
    with pytest.raises(ValueError, match="spectral norm"):
        em(*_batch(), "a")


@pytest.mark.parametrize("how", ["p", "stochastic of a layer", "stochastic of a class", "train"])
def test_a_random_layer_is_seen_when_it_wakes(how):
    """The E-step runs without it: two steps differ in their losses, not in their log-likelihoods"""
    em = lf.LASEM(_net(), backend="torch", prior="uniform")
    kind = type("_Noise", (nn.Dropout,), {})
    if how == "stochastic of a class":

        class Noise(nn.Module):
            def forward(self, h):
                return h * torch.rand_like(h) if self.training else h

        kind = Noise
    for branch in _both(em.net, "a"):
        branch[1][2] = (
            kind() if kind.__base__ is nn.Module else kind(0.5 if how == "train" else 0.0)
        )
        branch[1][2].train(how != "train")
    _gradients(em)
    for branch in _both(em.net, "a"):
        layer = branch[1][2]
        if how == "p":
            layer.p = 0.5
        elif how == "stochastic of a class":
            kind.stochastic = True
        elif how == "stochastic of a layer":
            layer.p, layer.stochastic = 0.5, True
        else:
            layer.train()
    first, second = (em(*_batch(), "a") for _ in range(2))
    assert torch.equal(first.log_likelihood, second.log_likelihood)
    assert not torch.equal(first.loss, second.loss)


class _Elsewhere(lf.transfer.HardParameterSharing):
    """Its shared branches are stages of its own, which the net does not list."""

    def __init__(self, stages):
        super().__init__()
        self.stages = stages

    def shared_branch(self, shared, adapters):
        return lf.transfer.Branch(self.stages.get(id(shared), shared))


@pytest.mark.parametrize("change", ["random", "writes", "watched"])
def test_branches_that_a_mechanism_has_elsewhere_are_looked_at_too(change, monkeypatch):
    stages = {}
    net = lf.TransferNet([nn.Linear(3, 3), nn.Linear(3, 3)], _Elsewhere(stages))
    net.add_task("a", nn.Linear(3, 2))
    em = lf.LASEM(net, backend="torch", prior="uniform")
    x, y = torch.randn(4, 3), torch.tensor([0, 1, 1, 0])
    em(x, y, "a")
    own = {
        "random": nn.Sequential(nn.Linear(3, 3), nn.Dropout(0.5)),
        "writes": nn.Sequential(nn.ReLU(inplace=True), nn.Linear(3, 3)),
        "watched": nn.Sequential(nn.Flatten(), nn.Linear(3, 3)),
    }[change]
    stages[id(net.shared[1])] = own
    seen = []
    if change == "watched":
        forward = nn.Flatten.forward
        monkeypatch.setattr(
            nn.Flatten, "forward", lambda layer, h: seen.append(layer) or forward(layer, h)
        )
    first, second = (em(x, y, "a") for _ in range(2))
    assert torch.equal(first.log_likelihood, second.log_likelihood)
    assert torch.equal(first.loss, second.loss) == (change != "random")
    assert seen == ([own[0]] * 2 if change == "watched" else [])
    truth = lf.LASEM(net, backend="reference", prior="uniform")(x, y, "a")
    torch.testing.assert_close(first.log_likelihood, truth.log_likelihood)


@pytest.mark.parametrize("again", [copy.deepcopy, lambda em: pickle.loads(pickle.dumps(em))])
def test_copies_look_for_themselves(again):
    em = lf.LASEM(_net(), backend="torch", prior="uniform")
    _gradients(em)
    other = again(em)
    _replace_a_layer(other.net)
    changed, same = (lf.LASEM(_net(), backend="reference", prior="uniform") for _ in range(2))
    _replace_a_layer(changed.net)
    for run, like in ((other, changed), (em, same)):
        found, wanted = _gradients(run), _gradients(like)
        torch.testing.assert_close(found["shared.0.0.weight"], wanted["shared.0.0.weight"])


def test_dtype_mode_and_tasks_may_change():
    em = lf.LASEM(_net(), backend="torch")
    _gradients(em)
    x, y = _batch()
    with torch.no_grad():
        assert not em(x, y, "a").loss.requires_grad
    assert em.float()(x.float(), y, "a").loss.dtype == torch.float32
    with torch.autocast("cpu", dtype=torch.bfloat16):
        em(x.float(), y, "a").loss.backward()
    em.net.add_task("b", nn.Linear(5, 2))
    em(x.float(), y.clamp(max=1), "b").loss.backward()
    em.end_task("a", {1})
    assert em(x.float(), y, "a").posterior.max() == 1


def test_weights_are_back_whatever_a_layer_does():
    """The wide layer leaves a branch's layer alone, also where it fails."""
    em = lf.LASEM(_net(), backend="torch")
    before = dict(em.net.named_parameters())
    seen = []
    handle = torchs.register_module_forward_pre_hook(
        lambda layer, inputs: seen.append(layer.weight.shape) if type(layer) is nn.Conv2d else None
    )
    try:
        _gradients(em)
    finally:
        handle.remove()
    assert (3, 2, 3, 3) in seen  # of one branch alone: hooks expect a layer as it is
    x, y = _batch()
    with pytest.raises(ValueError, match="expected samples that the network can take"):
        em(x[:, :1], y, "a")
    after = dict(em.net.named_parameters())
    assert before.keys() == after.keys()
    assert all(after[name] is tensor for name, tensor in before.items())


def test_a_step_walks_through_the_modules_once(monkeypatch):
    em = lf.LASEM(_net(), backend="torch")
    walks = []
    monkeypatch.setattr(walk, "modules_in", lambda *m: walks.append(m) or modules_in(*m))
    for steps in (1, 2, 3):
        _gradients(em)
        assert len(walks) == steps
    em.evaluate(_batch()[0], "a")
    assert len(walks) == 4


class _Hides(nn.Module):
    """Lists none of its layers."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(2, 2)

    def named_modules(self, memo=None, prefix="", remove_duplicate=True):
        yield prefix, self


def test_walks_meet_what_torchs_meet():
    twice = nn.Linear(2, 2)
    inner = nn.Sequential(twice, nn.ReLU(), twice)
    nets = [
        nn.Sequential(inner, nn.ModuleList([None, nn.BatchNorm1d(2)]), twice),
        nn.Sequential(_Hides(), nn.Linear(2, 1)),
        nn.Sequential(nn.ReLU(), _Hides()),
        nn.Sequential(nn.ReLU(), nn.Sequential(nn.Tanh(), nn.PReLU())),
        torch.jit.script(nn.Sequential(nn.Linear(2, 2), nn.ReLU())),
        nn.ReLU(),
    ]
    for net in nets:
        assert set(map(id, modules_in(net))) == set(map(id, net.modules()))
        assert len(modules_in(net, net)) == len(list(net.modules()))
        assert has_tensors(net) == any(True for _ in net.parameters())
    for net in nets[:4]:
        assert {id(p) for p in parameters_in(net)} == {id(p) for p in net.parameters()}
    assert has_tensors(nn.BatchNorm1d(1, affine=False))
