"""TransferNet: modules, parameters, ends of tasks, frozen nets."""

from __future__ import annotations

import copy
import io

import pytest
import torch
from nets import Residual, batch, small_net
from oracle import assert_step_equals, brute_force
from torch import nn
from torch.nn.utils import prune

import lasem_fast as lf


def test_branches_are_registered_modules_with_weights_of_their_own():
    net = small_net(2, tasks=("a", "b"))
    assert net.tasks == ("a", "b") and net.depth == 2
    weights = [
        net.shared[0][0].weight,
        net.specific["a"][0][0].weight,
        net.specific["b"][0][0].weight,
    ]
    assert not torch.equal(weights[0], weights[1]) and not torch.equal(weights[1], weights[2])
    registered = {id(p) for p in net.parameters()}
    assert all(id(w) in registered for w in weights)
    assert net.adapters["a"][0] is None
    assert len({id(p) for p in copy.deepcopy(net).parameters()} & registered) == 0
    assert all(p.dtype == torch.float32 for p in net.float().parameters())


@pytest.mark.parametrize("task", ["a.b", "keys", "training", "été 1", "%2E", "a_b"])
def test_any_name_is_a_task_name(task):
    net = small_net(1, tasks=(task, "other"))
    assert net.tasks == (task, "other") and list(net.heads) == [task, "other"]
    again = small_net(1, tasks=(task, "other"))
    again.load_state_dict(net.state_dict())
    assert torch.equal(again.heads[task][1].weight, net.heads[task][1].weight)


def test_add_task_returns_the_new_parameters_for_an_optimiser():
    net = small_net(2)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    optimizer.add_param_group({"params": net.add_task("b", nn.Linear(108, 2))})
    in_groups = [id(p) for group in optimizer.param_groups for p in group["params"]]
    assert sorted(in_groups) == sorted(id(p) for p in net.parameters())


def test_task_parameters_before_and_after_the_end():
    net = small_net(2, tasks=("a", "b"))

    def of(*modules):
        return [id(p) for m in modules for p in m.parameters()]

    own = net.specific["a"]
    everything = of(net.shared[0], own[0], net.shared[1], own[1], net.heads["a"])
    assert [id(p) for p in net.task_parameters("a")] == everything
    net.keep("a", {2})
    assert [id(p) for p in net.task_parameters("a")] == of(own[0], net.shared[1], net.heads["a"])
    assert own[1] is None and own[0] is not None


def test_forward_takes_a_configuration_until_the_task_has_ended():
    net = small_net(2)
    x, _ = batch()
    with pytest.raises(
        ValueError, match="config: expected a configuration, because task 'a' has not ended"
    ):
        net(x, "a")
    expected = net.heads["a"](net.specific["a"][1](net.shared[0](x)))
    for form in ({1}, 1, [True, False], torch.tensor([True, False])):
        assert torch.equal(net(x, "a", form), expected)
    net.keep("a", {1})
    assert torch.equal(net(x, task="a"), expected)
    with pytest.raises(ValueError, match="ended with"):
        net(x, "a", {2})
    with pytest.raises(ValueError, match="expected one that has not ended"):
        net.keep("a", {1})


def test_freeze_gives_a_plain_net_of_its_own():
    net = small_net(3, dtype=torch.float32)
    net.keep("a", {1, 3})
    x, _ = batch(dtype=torch.float32)
    frozen = net.freeze("a")
    assert type(frozen) is nn.Sequential and not frozen.training
    assert not any(p.requires_grad for p in frozen.parameters())
    expected = net.eval()(x, "a")
    assert torch.equal(frozen(x), expected)
    nn.init.zeros_(net.shared[0][0].weight)
    assert torch.equal(frozen(x), expected)
    exported = torch.export.export(frozen, (x,)).module()
    assert torch.equal(exported(x), expected)
    buffer = io.BytesIO()
    torch.save(frozen.state_dict(), buffer)


def test_freeze_needs_an_ended_task():
    with pytest.raises(ValueError, match="has not ended"):
        small_net(1).freeze("a")


def test_new_branches_are_drawn_anew_and_follow_device_dtype_and_mode():
    stage = Residual(2).double().eval()
    net = lf.TransferNet([stage])
    net.add_task("a", nn.Identity())
    own = net.specific["a"][0]
    assert own.first.weight.dtype == torch.float64 and not own.training
    assert not torch.equal(own.first.weight, stage.first.weight)


def test_a_mechanism_with_an_initialiser_of_its_own():
    def init(module):
        for p in module.parameters():
            nn.init.constant_(p, 0.25)

    net = lf.TransferNet([nn.Linear(2, 2)], transfer=lf.transfer.HardParameterSharing(init=init))
    net.add_task("a", nn.Identity())
    assert all(bool((p == 0.25).all()) for p in net.specific["a"].parameters())


def _uncopied():
    stage = nn.Linear(2, 2)
    stage.cache = (value for value in stage.weight)
    return stage


class Scaled(nn.Module):
    """A bare parameter beside a layer."""

    def __init__(self, requires_grad=True):
        super().__init__()
        self.scale = nn.Parameter(torch.full((1,), 3.0), requires_grad=requires_grad)
        self.linear = nn.Linear(2, 2)

    def forward(self, h):
        return self.linear(h) * self.scale


def test_new_branches_of_attention_and_parametrised_layers_have_new_weights():
    stages = [
        nn.TransformerEncoderLayer(4, 2, 8, batch_first=True),
        nn.utils.parametrizations.weight_norm(nn.Linear(4, 4)),
    ]
    net = lf.TransferNet(stages)
    with torch.no_grad():
        for p in net.parameters():  # trained
            p.add_(0.125)
    net.add_task("a", nn.Flatten())
    for shared, own in zip(net.shared.parameters(), net.specific["a"].parameters(), strict=True):
        assert bool((shared != own).all())


def test_a_trainable_parameter_that_nothing_draws_is_refused():
    net = lf.TransferNet([nn.Linear(2, 2), Scaled()])
    before = list(net.state_dict())
    state = torch.get_rng_state()
    with pytest.raises(
        ValueError, match=r"stages\[1\]: .* got none for 'scale' of Scaled .*reset_par.*init="
    ):
        net.add_task("a", nn.Identity())
    assert list(net.state_dict()) == before and net.tasks == ()
    assert torch.equal(torch.get_rng_state(), state)

    def init(module):
        assert lf.initialisers.redraw_(module) in ([], ["scale"])
        if isinstance(module, Scaled):
            nn.init.constant_(module.scale, 5.0)

    net = lf.TransferNet(
        [nn.Linear(2, 2), Scaled()], transfer=lf.transfer.HardParameterSharing(init)
    )
    net.add_task("a", nn.Identity())
    assert bool(net.specific["a"][1].scale == 5.0)
    assert not torch.equal(net.specific["a"][1].linear.weight, net.shared[1].linear.weight)


@pytest.mark.filterwarnings("ignore:.*weight_norm. is deprecated")
@pytest.mark.parametrize("backend", ["auto", "torch", "reference"])
@pytest.mark.parametrize("how", ["pruned", "old weight norm"])
def test_stages_whose_weights_a_hook_computes(how, backend):
    first = nn.Linear(6, 6)
    if how == "pruned":
        prune.l1_unstructured(first, "weight", 0.5)
    else:
        nn.utils.weight_norm(first)
    stages = [nn.Sequential(first, nn.ReLU()), nn.Linear(6, 6)]

    def draw(stage):
        for parameter in stage.parameters():
            nn.init.uniform_(parameter)

    net = lf.TransferNet(stages, transfer=lf.transfer.HardParameterSharing(init=draw))
    net.add_task("a", nn.Linear(6, 3))
    net.double()
    em, x = lf.LASEM(net, backend=backend), torch.randn(4, 6, dtype=torch.float64)
    y = torch.randint(3, (4,))
    optimizer = torch.optim.SGD(net.task_parameters("a"), lr=0.1)
    for _ in range(2):
        log_prior = em.prior("a").log()
        truth = brute_force(net, em.space.bits, x, y, "a", log_prior=log_prior)
        assert_step_equals(net, em(x, y, "a"), truth)
        optimizer.step()
    own, shared = net.specific["a"][0][0], net.shared[0][0]
    assert not torch.equal(own.weight, shared.weight)
    em.end_task("a", {2})
    assert torch.equal(net.freeze("a")(x), net(x, "a"))
    with pytest.raises(ValueError, match=r"stages\[0\]: .* none for 'weight_.*' of Linear"):
        lf.TransferNet(list(net.shared)).add_task("a", nn.Linear(6, 3))


@pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated")
@pytest.mark.filterwarnings("ignore:`torch.jit.script_method` is deprecated")
@pytest.mark.parametrize("backend", ["auto", "torch", "reference"])
def test_scripted_stages_have_branches_of_their_own(backend):
    def draw(stage):
        for parameter in stage.parameters():
            nn.init.normal_(parameter, std=0.1)

    def scripted(inputs):
        layers = nn.Sequential(nn.Conv2d(inputs, 3, 3, padding=1), nn.ReLU())
        return torch.jit.script(layers.double())

    with pytest.raises(ValueError, match=r"rule for new .* 'weight' of RecursiveScriptModule"):
        lf.TransferNet([scripted(2)]).add_task("a", nn.Flatten())
    transfer = lf.transfer.HardParameterSharing(init=draw)
    net = lf.TransferNet([scripted(2), scripted(3)], transfer=transfer)
    net.add_task("a", nn.Sequential(nn.Flatten(), nn.Linear(108, 3)).double())
    optimizer = torch.optim.SGD(net.task_parameters("a"), lr=0.1)
    em, (x, y) = lf.LASEM(net, backend=backend), batch()
    truth = brute_force(net, em.space.bits, x, y, "a")
    assert_step_equals(net, em(x, y, "a"), truth)
    optimizer.step()
    em.end_task("a")
    assert torch.equal(net.freeze("a")(x), net(x, "a"))


def test_a_frozen_parameter_without_a_rule_is_a_constant():
    net = lf.TransferNet([Scaled(requires_grad=False)])
    net.add_task("a", nn.Identity())
    own = net.specific["a"][0]
    assert bool(own.scale == 3.0) and not own.scale.requires_grad
    assert own.linear.weight.requires_grad
    net = lf.TransferNet([Scaled().requires_grad_(False)])
    with pytest.raises(ValueError, match="'scale' of Scaled"):  # the constant of what is trained?
        net.add_task("a", nn.Identity())


@pytest.mark.parametrize("backend", ["reference", "auto"])
@pytest.mark.parametrize("layers", [1, 2], ids=["some layers frozen", "whole stage frozen"])
def test_the_specific_branch_of_a_frozen_stage_is_trainable(backend, layers):
    stages = [nn.Sequential(nn.Conv2d(3, 3, 3, padding=1), nn.ReLU(), nn.GroupNorm(1, 3))]
    stages[0][:layers].requires_grad_(False)
    net = lf.TransferNet([*stages, nn.Conv2d(3, 3, 3, padding=1)])
    net.add_task("a", nn.Sequential(nn.Flatten(), nn.Linear(108, 3)))
    x, y = torch.randn(2, 3, 6, 6), torch.tensor([0, 2])
    lf.LASEM(net, backend=backend)(x, y, "a").loss.backward()
    assert all(p.grad is not None for p in net.specific["a"].parameters())
    assert net.shared[0][0].weight.grad is None and net.shared[1].weight.grad is not None


def test_redrawing_leaves_frozen_weights_alone():
    stages = [
        nn.Sequential(nn.Linear(2, 2), nn.LayerNorm(2)).requires_grad_(False),
        nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2)),
    ]
    stages[1][0].requires_grad_(False)
    net = lf.TransferNet(stages)
    before = {name: p.detach().clone() for name, p in net.named_parameters()}
    net.redraw_unclaimed()
    redrawn = [name for name, p in net.named_parameters() if not torch.equal(p, before[name])]
    assert redrawn == ["shared.1.1.weight", "shared.1.1.bias"]
    assert not any(p.requires_grad for m in (stages[0], stages[1][0]) for p in m.parameters())


@pytest.mark.parametrize("transfer", ["hps", "tf"])
def test_modes_are_copied_layer_by_layer(transfer):
    stage = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2, affine=False), nn.Dropout())
    stage[1].eval()
    net = lf.TransferNet([stage], transfer=transfer)
    net.add_task("a", nn.Linear(2, 2))
    assert [m.training for m in net.specific["a"][0]] == [True, False, True]
    lf.LASEM(net)(torch.randn(3, 2), torch.tensor([0, 1, 1]), "a")


@pytest.mark.parametrize(
    ("call", "error", "words"),
    [
        (lambda: lf.TransferNet([]), ValueError, "stages: expected at least one"),
        (lambda: lf.TransferNet(3), TypeError, "stages: expected a sequence"),
        (
            lambda: lf.TransferNet([nn.ReLU(), 3]),
            TypeError,
            "stages: expected a sequence of nn.Module",
        ),
        (lambda: lf.TransferNet([nn.LazyLinear(3)]), ValueError, r"stages\[0\].*lazy"),
        (lambda: lf.TransferNet([nn.Linear(2, 2, device="meta")]), ValueError, "the meta device"),
        (
            lambda: lf.TransferNet([torch.inference_mode()(lambda: nn.Linear(2, 2))()]),
            ValueError,
            "made under torch.inference_mode",
        ),
        (
            lambda: lf.TransferNet([_uncopied()]).add_task("a", nn.ReLU()),
            ValueError,
            r"stages\[0\]: expected a module that copy.deepcopy can copy, got Linear",
        ),
        (lambda: lf.transfer.HardParameterSharing(init=3), TypeError, "init: expected a function"),
        (
            lambda: lf.TransferNet([nn.ReLU()], transfer="x"),
            ValueError,
            "transfer: expected one of",
        ),
        (lambda: lf.TransferNet([nn.ReLU()], transfer=1), TypeError, "transfer: expected a name"),
        (lambda: lf.TransferNet([m := nn.Linear(1, 1), m]), ValueError, "parameters of its own"),
        (
            lambda: lf.TransferNet(
                [nn.Sequential(nn.ReLU(), n := nn.BatchNorm1d(1, affine=False)), n]
            ),
            ValueError,
            r"statistics of its own, got '' \(BatchNorm1d\) in both stages\[0\] and stages\[1\]",
        ),
        (
            lambda: small_net(1).add_task("a", nn.ReLU()),
            ValueError,
            "task: expected a new name, got 'a'",
        ),
        (lambda: small_net(1).add_task(1, nn.ReLU()), TypeError, "task: expected a name"),
        (lambda: small_net(1).add_task("", nn.ReLU()), ValueError, "empty"),
        (lambda: small_net(1).add_task("b", 3), TypeError, "head: expected an nn.Module"),
        (lambda: lf.TransferNet(torch.tensor(1)), TypeError, "stages: expected a sequence"),
        (lambda: small_net(1).branches("b"), ValueError, r"task: expected one of \['a'\], got 'b'"),
        (lambda: small_net(1).heads[3], TypeError, "task: expected a name"),
        (lambda: small_net(1).auxiliary_losses("b"), ValueError, "task: expected one of"),
        (lambda: small_net(1)(3, "a", 0), TypeError, "x: expected a tensor, got int"),
        (lambda: small_net(1)(torch.tensor(3), "a", 0), ValueError, "x: expected a batch"),
        (
            lambda: small_net(1)(torch.zeros(2, 5, 6, 6).double(), "a", 0),
            ValueError,
            r"x: expected samples that the network can take.* stage 1 ",
        ),
        (
            lambda: (n := small_net(1)).add_task("b", n.heads["a"]),
            ValueError,
            "head: expected a module of",
        ),
        (lambda: small_net(1).task_parameters("b"), ValueError, r"task: expected one of \['a'\]"),
        (
            lambda: small_net(1)(batch()[0], "a", {2}),
            ValueError,
            "config: expected a set of stages",
        ),
        (lambda: small_net(2)(batch()[0], "a", [1]), ValueError, "config: expected 2 booleans"),
    ],
)
def test_bad_arguments_are_refused_in_words(call, error, words):
    with pytest.raises(error, match=words):
        call()


def test_a_task_that_could_not_be_added_leaves_nothing_behind():
    net = small_net(1)
    before = list(net.state_dict())
    with pytest.raises(TypeError):
        net.add_task("b", "head")
    assert list(net.state_dict()) == before and net.tasks == ("a",)
