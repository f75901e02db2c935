"""New weights: every layer of PyTorch by its own rule, parametrised ones too; what has none."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations, parametrize

import lasem_fast as lf
from lasem_fast.initialisers import glorot_uniform_, redraw_, release_


class Scaled(nn.Module):
    """A bare parameter beside a layer."""

    def __init__(self, requires_grad: bool = True) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.full((1,), 3.0), requires_grad=requires_grad)
        self.linear = nn.Linear(2, 2)

    def forward(self, h):
        return self.linear(h) * self.scale


class Symmetric(nn.Module):
    """A parametrisation without an inverse."""

    def forward(self, weight):
        return weight.triu() + weight.triu(1).mT


LAYERS = {
    "Linear": lambda: nn.Linear(3, 2),
    "Conv2d": lambda: nn.Conv2d(2, 3, 3),
    "BatchNorm1d": lambda: nn.BatchNorm1d(3),
    "LayerNorm": lambda: nn.LayerNorm(3),
    "GroupNorm": lambda: nn.GroupNorm(1, 3),
    "PReLU": nn.PReLU,
    "Embedding": lambda: nn.Embedding(4, 3, padding_idx=0),
    "LSTM": lambda: nn.LSTM(3, 3, proj_size=2),
    "MultiheadAttention": lambda: nn.MultiheadAttention(4, 2, add_bias_kv=True),
    "TransformerEncoderLayer": lambda: nn.TransformerEncoderLayer(4, 2, 8),
    "weight_norm": lambda: parametrizations.weight_norm(nn.Linear(3, 2)),
    "spectral_norm": lambda: parametrizations.spectral_norm(nn.Linear(3, 2)),
    "orthogonal": lambda: parametrizations.orthogonal(nn.Linear(3, 2)),
    "cayley": lambda: parametrizations.orthogonal(nn.Linear(3, 3), orthogonal_map="cayley"),
    "symmetric": lambda: parametrize.register_parametrization(
        nn.Linear(3, 3), "weight", Symmetric()
    ),
}


@pytest.mark.parametrize("name", LAYERS)
def test_every_layer_is_drawn_as_when_it_was_made(name):
    old = LAYERS[name]()
    with torch.no_grad():
        for p in old.parameters():
            p.mul_(1.25).add_(0.125)
    new = copy.deepcopy(old)
    assert redraw_(new) == []
    made = dict(LAYERS[name]().named_parameters())
    for (n, p), q in zip(new.named_parameters(), old.parameters(), strict=True):
        assert bool(torch.isfinite(p).all()) and not torch.equal(p, q), n
        constant = made[n].unique().numel() == 1 and p.numel() > 1
        assert torch.equal(p, made[n]) or not constant, n


def test_parametrised_weights_keep_what_they_promise():
    layer = parametrizations.orthogonal(nn.Linear(3, 3))
    before = layer.weight.detach().clone()
    redraw_(layer)
    torch.testing.assert_close(layer.weight @ layer.weight.mT, torch.eye(3))
    assert not torch.equal(layer.weight, before)
    layer = parametrizations.weight_norm(nn.Linear(3, 2))
    release_(layer)
    assert 0 < float(layer.weight.detach().abs().max()) <= 0.1 and bool((layer.bias == 0.2).all())


def test_complex_layers_are_drawn_by_their_rule():
    stage = nn.Linear(3, 2, dtype=torch.complex64)
    net = lf.TransferNet([stage])
    net.add_task("a", nn.Identity())
    own = net.specific["a"][0]
    assert bool((own.weight != stage.weight).all()) and bool((own.bias != stage.bias).all())
    with pytest.raises(TypeError, match=r"module: expected real parameters, got .*complex64"):
        release_(stage)


@pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated")
def test_what_has_no_rule_is_named_and_keeps_its_values():
    module = nn.Sequential(Scaled(), torch.jit.script(nn.Linear(2, 2)))
    before = copy.deepcopy(module.state_dict())
    assert redraw_(module) == ["0.scale", "1.weight", "1.bias"]
    same = [n for n, v in module.state_dict().items() if torch.equal(v, before[n])]
    assert same == ["0.scale", "1.weight", "1.bias"]


@pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated")
def test_a_scripted_stage_is_refused_by_name():
    net = lf.TransferNet([torch.jit.script(nn.Linear(2, 2))])
    with pytest.raises(ValueError, match=r"stages\[0\]: expected a rule .* got none for 'weight'"):
        net.add_task("a", nn.Linear(2, 2))


@pytest.mark.parametrize("kind", ["claims", "arguments"])
def test_a_rule_that_draws_less_than_it_claims_does_not_count(kind):
    class Claims(Scaled):
        def reset_parameters(self):
            self.linear.reset_parameters()

    class Arguments(Scaled):
        def reset_parameters(self, scale):
            self.scale.fill_(scale)

    assert redraw_({"claims": Claims, "arguments": Arguments}[kind]()) == ["scale"]


def test_a_rule_that_fails_leaves_everything_as_it_was():
    class Fails(Scaled):
        def reset_parameters(self):
            raise RuntimeError("no")

    module = Fails()
    before = copy.deepcopy(module.state_dict())
    with pytest.raises(RuntimeError, match="no"):
        redraw_(module)
    assert all(torch.equal(v, before[n]) for n, v in module.state_dict().items())


def test_a_tensor_that_cannot_be_changed_draws_nothing():
    with torch.inference_mode():
        tensor = torch.zeros(2, 2)
        glorot_uniform_(tensor, 2, 2)
    before = torch.get_rng_state()
    with pytest.raises(ValueError, match="tensor: expected one that can be changed, got"):
        glorot_uniform_(tensor, 2, 2)
    assert torch.equal(torch.get_rng_state(), before)
