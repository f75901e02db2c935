"""The tree equals brute force in float64 on drawn nets, spaces and mini-batches."""

from __future__ import annotations

import copy
import inspect
from collections import OrderedDict

import pytest
import torch
from hypothesis import assume, event, given, settings
from nets import Residual, batch, cases, small_net
from oracle import assert_equals, assert_step_equals, brute_force, logits_of
from torch import nn

import lasem_fast as lf
from lasem_fast.networks import layers


@settings(max_examples=60)
@given(cases())
@pytest.mark.parametrize("backend", ["torch", "reference"])
def test_loss_posterior_and_gradients_equal_brute_force(backend, case):
    em = lf.LASEM(case.net, case.space, backend=backend)
    truth = brute_force(case.net, case.space.bits, case.x, case.y, "a")
    assert_step_equals(case.net, em(case.x, case.y, "a"), truth)


@settings(max_examples=60)
@given(cases(max_depth=4))
def test_evaluate_gives_the_logits_of_every_configuration(case):
    em = lf.LASEM(case.net, case.space, backend="torch")
    logits = em.evaluate(case.x, "a")
    for row in range(len(case.space)):
        expected = logits_of(case.net, case.space[row], case.x, "a")
        assert_equals(logits[row].detach(), expected.detach(), f"logits of {case.space.label(row)}")
        assert_equals(case.net(case.x, "a", case.space[row]).detach(), expected.detach(), "forward")


@settings(max_examples=50)
@given(cases(max_depth=5))
@pytest.mark.parametrize("backend", ["torch", "reference"])
def test_configurations_that_overflow_take_no_part(backend, case):
    assume(case.net.depth > 1)
    first, second = case.net.depth // 2 - 1, case.net.depth - 1
    with torch.no_grad():  # weights are finite; no order of summation keeps two such factors so
        for stage in (case.net.specific["a"][first], case.net.specific["a"][second]):
            for parameter in stage.parameters():
                parameter *= 1e300
    em = lf.LASEM(case.net, case.space, backend=backend)
    truth = brute_force(case.net, case.space.bits, case.x, case.y, "a")
    if not bool(torch.isfinite(truth.nll).any()):
        with pytest.raises(ValueError, match="some configuration has a finite loss"):
            em(case.x, case.y, "a")
        return
    # a finite loss can hide an infinite activation, and then the truth has gradients of NaN
    assume(all(bool(torch.isfinite(g).all()) for g in truth.grads.values()))
    event(f"{int((~torch.isfinite(truth.nll)).sum())} overflow")
    step = em(case.x, case.y, "a")
    assert torch.equal(step.posterior == 0, truth.posterior == 0)
    assert_step_equals(case.net, step, truth)


CHANNELS_LAST = torch.channels_last


@pytest.mark.parametrize(
    "layout",
    [
        lambda x: x.contiguous(memory_format=CHANNELS_LAST),
        lambda x: x.transpose(2, 3).contiguous().transpose(2, 3),
        lambda x: torch.cat([x, x])[::2].repeat_interleave(2, 0)[: len(x)],
        lambda x: x[:, :1].expand_as(x),
    ],
    ids=["channels_last", "transposed", "gathered", "expanded"],
)
@pytest.mark.parametrize("net_layout", [torch.contiguous_format, CHANNELS_LAST])
def test_layout_of_the_input_does_not_matter(layout, net_layout):
    net = small_net(extra=(lambda: nn.MaxPool2d(3, stride=1, padding=1),)).to(
        memory_format=net_layout
    )
    x, y = batch()
    x = layout(x)
    truth = brute_force(net, lf.ConfigSpace(3).bits, x, y, "a")
    assert_step_equals(net, lf.LASEM(net, backend="torch")(x, y, "a"), truth)


@pytest.mark.parametrize(
    "stage",
    [
        lambda: nn.Conv2d(2, 2, 3, padding=1, padding_mode="circular"),
        lambda: nn.Conv2d(2, 2, 3, padding="same", dilation=2),
        lambda: nn.Conv2d(2, 2, 3, padding=1, groups=2),
        lambda: nn.utils.parametrizations.weight_norm(nn.Conv2d(2, 2, 1)),
        lambda: nn.Sequential(nn.LeakyReLU(0.3, inplace=True), nn.Conv2d(2, 2, 1)),
        lambda: nn.Sequential(nn.AvgPool2d(3, 1, 1), nn.Conv2d(2, 2, 1), nn.PReLU(2)),
        lambda: nn.Sequential(nn.Conv2d(2, 2, 1), nn.InstanceNorm2d(2), nn.Softmax(dim=1)),
        lambda: nn.Sequential(nn.ConvTranspose2d(2, 2, 3, padding=1), nn.ReLU(inplace=True)),
        lambda: nn.Linear(6, 6),
        lambda: nn.Identity(),
        lambda: Residual(2, inplace=True),
    ],
)
def test_any_module_can_be_a_stage(stage):
    net = lf.TransferNet([stage(), nn.Conv2d(2, 2, 1), stage()])
    net.add_task("a", nn.Sequential(nn.Flatten(), nn.Linear(72, 3)))
    net.double()
    x, y = batch()
    kept = x.clone()
    truth = brute_force(net, lf.ConfigSpace(3).bits, x.clone(), y, "a")
    assert_step_equals(net, lf.LASEM(net, backend="torch")(x, y, "a"), truth)
    assert torch.equal(x, kept)


def test_stages_over_sequences_and_volumes():
    for stages, shape, features in (
        (
            [nn.Sequential(nn.Conv1d(2, 3, 3), nn.ReLU(), nn.MaxPool1d(2)), nn.Linear(3, 2)],
            (2, 8),
            6,
        ),
        ([nn.Sequential(nn.Conv3d(2, 3, 2), nn.ReLU()), nn.Conv3d(3, 1, 1)], (2, 3, 3, 3), 8),
        ([nn.Linear(4, 5), nn.TransformerEncoderLayer(5, 1, 7, 0.0, batch_first=True)], (3, 4), 15),
    ):
        net = lf.TransferNet(stages)
        net.add_task("a", nn.Sequential(nn.Flatten(), nn.Linear(features, 2)))
        net.double()
        x, y = torch.randn(3, *shape, dtype=torch.float64), torch.tensor([0, 1, 1])
        truth = brute_force(net, lf.ConfigSpace(2).bits, x, y, "a")
        assert_step_equals(net, lf.LASEM(net, backend="torch")(x, y, "a"), truth)


def test_a_branch_that_was_replaced_by_another_form_is_evaluated_as_it_is():
    net = small_net(2)
    net.specific["a"][1] = nn.Sequential(nn.Conv2d(3, 3, 1), nn.Tanh()).double()
    x, y = batch()
    truth = brute_force(net, lf.ConfigSpace(2).bits, x, y, "a")
    assert_step_equals(net, lf.LASEM(net, backend="torch")(x, y, "a"), truth)


@pytest.mark.parametrize("kind", layers._SETTINGS, ids=lambda kind: kind.__name__)
def test_layers_that_differ_in_any_setting_are_not_of_one_form(kind):
    needed = [p for p in inspect.signature(kind).parameters.values() if p.default is p.empty]
    needed = [p for p in needed if p.kind is p.POSITIONAL_OR_KEYWORD]
    layer = kind(1, (1, 1)) if kind is nn.Unflatten else kind(*[1] * len(needed))
    assert layers.same_settings(layer, copy.deepcopy(layer))
    for name in ["forward", *(n for n in vars(layer) if n[0] != "_" and n != "training")]:
        other = copy.deepcopy(layer)
        setattr(other, name, object())
        assert not layers.same_settings(layer, other), name


def _changed(stage, how):
    """A copy of ``[Flatten, Linear, ReLU, Dropout]`` that differs in one thing."""
    other = copy.deepcopy(stage)
    if how == "settings":
        other[3].p = 0.25
    elif how == "mode":
        other[3].eval()
    elif how == "hook":
        other[2].register_forward_hook(lambda *_: None)
    elif how == "hook of the stage":
        other.register_forward_pre_hook(lambda *_: None)
    elif how == "forward":
        other[1].forward = other[1].forward
    elif how == "random before":
        other[0].stochastic = True
    elif how == "a layer more":
        other.append(nn.Identity())
    elif how == "a layer less":
        del other[3]
    elif how == "another layer":
        other[2] = nn.Tanh()
    elif how == "another order":
        other[2], other[3] = other[3], other[2]
    elif how == "subclass":
        other = type("_Own", (nn.Sequential,), {})(*other)
    elif how == "names":
        other = nn.Sequential(OrderedDict(zip("abcd", other, strict=True)))
    elif how == "weight":
        other[1] = nn.Linear(7, 3)
        other[1].in_features = stage[1].in_features
    return other


@pytest.mark.parametrize(
    "how",
    ["settings", "mode", "hook", "hook of the stage", "forward", "random before", "a layer more",
     "a layer less", "another layer", "another order", "subclass", "names", "weight", ""],
)  # fmt: skip
def test_a_stage_that_differs_from_a_plain_one_in_more_than_weights_is_seen(how):
    stage = nn.Sequential(nn.Flatten(), nn.Linear(4, 3), nn.ReLU(), nn.Dropout(0.5))
    other = _changed(stage, how)
    found = layers.core_like(layers.plain_stage(stage), other)
    if how in ("names", "weight", ""):
        assert found == ("b" if how == "names" else "1", other[1])
    else:
        assert found is None


def test_a_layer_is_like_a_stage_of_it_alone():
    layer = nn.Linear(2, 3)
    alone = layers.plain_stage(nn.Sequential(nn.Linear(2, 3)))
    assert layers.core_like(alone, layer) == ("", layer)
    assert layers.core_like(layers.plain_stage(layer), nn.Sequential(layer)) == ("0", layer)
    layer.register_forward_hook(lambda *_: None)
    assert layers.core_like(alone, layer) is None


def test_hooks_of_a_stage_are_called():
    net = small_net(2)
    seen = []
    net.shared[1][0].register_forward_hook(lambda *_: seen.append("hook"))
    lf.LASEM(net, backend="torch")(*batch(), "a")
    assert seen == ["hook"]


def test_each_prefix_is_evaluated_once():
    rows = []
    net = small_net(4)
    for stages in (net.shared, net.specific["a"]):
        for stage in stages:
            stage.register_forward_hook(lambda _m, args, _out: rows.append(len(args[0])))
    x, y = batch(samples=5)
    lf.LASEM(net, backend="torch")(x, y, "a")
    assert sum(rows) == 5 * (2**5 - 2)


def test_no_loop_over_configurations():
    calls = []
    net = small_net(5)
    for module in net.modules():
        module.register_forward_hook(lambda *_: calls.append(1))
    lf.LASEM(net, backend="torch")(*batch(), "a")
    per_network = sum(1 for s in (*net.shared, net.heads["a"]) for _ in s.modules())
    assert len(calls) <= 2 * per_network


def test_a_layer_used_twice_in_a_stage_runs_twice():
    pool = nn.MaxPool2d(2)
    net = lf.TransferNet([nn.Sequential(nn.Conv2d(2, 3, 3, padding=1), pool, pool)])
    net.add_task("a", nn.Sequential(nn.Flatten(), nn.Linear(3, 3)))
    net.double()
    x, y = batch()
    em = lf.LASEM(net, backend="torch")
    truth = brute_force(net, em.space.bits, x, y, "a")
    assert_step_equals(net, em(x, y, "a"), truth)


class Complex(nn.Module):
    def forward(self, h):
        return torch.complex(h, h.flip(1))


class Real(nn.Module):
    def forward(self, h):
        return h.real + 0.5 * h.imag


@torch.no_grad()
def _draw_complex(stage):
    for parameter in stage.parameters():
        parameter.copy_(torch.randn(parameter.shape, dtype=parameter.dtype))


@pytest.mark.parametrize("options", [{}, {"prune": 1e-9}, {"max_memory": 16000}], ids=str)
@pytest.mark.parametrize(
    ("layer", "sample"),
    [(lambda: nn.Linear(4, 4), (4,)), (lambda: nn.Conv1d(4, 4, 1), (4, 1))],
    ids=["linear", "convolution"],
)
def test_complex_layers(layer, sample, options, backend):
    torch.manual_seed(0)
    stages = [Complex(), *(layer().to(torch.complex128) for _ in range(3)), Real()]
    net = lf.TransferNet(stages, lf.transfer.HardParameterSharing(init=_draw_complex))
    net.add_task("a", nn.Sequential(nn.Flatten(), nn.Linear(4, 3)).double())
    x, y = torch.randn(3, *sample, dtype=torch.float64), torch.tensor([0, 2, 1])
    grads = []
    for name, own in ((backend, options), ("reference", {})):
        net.zero_grad()
        lf.LASEM(net, backend=name, **own)(x, y, "a").loss.backward()
        grads.append([parameter.grad for parameter in net.parameters()])
    for ours, theirs in zip(*grads, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-7)  # prune leaves out 1e-9
