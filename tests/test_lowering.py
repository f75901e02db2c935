"""Stages lowered to fused layers: what is found, what is refused, and that it computes the same."""

from __future__ import annotations

import copy
import gc
import weakref

import pytest
import torch
import torch.nn.functional as F
from oracle import assert_step_equals, brute_force
from row_lists import PLAIN, evaluator_of
from torch import nn

import lasem_fast as lf
from lasem_fast.tools.builtin import NETS
from lasem_fast.tree import lowering
from lasem_fast.tree.lowering import Program, program_of


class Block(nn.Module):
    """A residual block as a user writes it."""

    def __init__(self, channels=4, down=None, how="functions"):
        super().__init__()
        self.first = nn.Conv2d(channels, channels, 3, padding=1)
        self.second = nn.Conv2d(channels, channels, 3, padding=1)
        self.down = down
        self.how = how

    def forward(self, h):
        skip = h if self.down is None else self.down(h)
        if self.how == "functions":
            return F.max_pool2d(torch.relu(self.second(F.relu(self.first(h))) + skip), 2)
        if self.how == "methods":
            return self.second(self.first(h).relu()).add(skip).relu()
        out = F.relu(self.first(h), inplace=True)
        out = self.second(out)
        out += skip
        return out.relu_()


def _summary(module):
    program = program_of(module)
    assert isinstance(program, Program), program
    return [
        (layer.name, layer.source, layer.relu, layer.skip, layer.relu_after, layer.pool.size)
        for layer in program.layers
    ]


@pytest.mark.parametrize(("how", "pool"), [("functions", 2), ("methods", 1), ("in place", 1)])
def test_a_residual_block_is_two_fused_layers(how, pool):
    assert _summary(Block(how=how)) == [
        ("first", 0, True, None, False, 1),
        ("second", 1, False, 0, True, pool),
    ]


def test_a_projection_is_a_layer_of_its_own_and_the_later_one_adds():
    layers = _summary(Block(down=nn.Conv2d(4, 4, 1)))
    assert layers[-1] == ("second", 1, False, 2, True, 2)
    assert [layer[0] for layer in layers] == ["first", "down", "second"]


def test_the_builtin_residual_net_is_all_fused_layers():
    layers = [_summary(stage) for stage in NETS["residual-17"].stages()]
    assert [len(of_stage) for of_stage in layers] == [3, 2, 2, 2, 2, 2, 2, 2]
    assert layers[1][-1] == ("layers.2", 1, True, 0, False, 1)


class NormedBlock(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.second = (nn.Conv2d(4, 4, 3, padding=1, bias=False) for _ in range(2))
        self.bn1, self.bn2 = nn.BatchNorm2d(4), nn.BatchNorm2d(4)

    def forward(self, h):
        return (self.bn2(self.second(self.bn1(self.first(h)).relu())) + h).relu()


def test_batch_norm_belongs_to_the_layer_before_it():
    layers = program_of(NormedBlock()).layers
    assert [(layer.name, layer.norm) for layer in layers] == [("first", "bn1"), ("second", "bn2")]
    plain = nn.Sequential(nn.Conv2d(2, 3, 3), nn.BatchNorm2d(3), nn.ReLU(), nn.MaxPool2d(2))
    (layer,) = program_of(plain).layers
    assert (layer.norm, layer.relu, layer.pool.size) == ("1", True, 2)
    patched = nn.Sequential(nn.Conv2d(2, 3, 3), nn.BatchNorm2d(3))
    patched[1].forward = lambda h: h
    assert "BatchNorm2d" in program_of(patched)
    twice = nn.Sequential(nn.Conv2d(2, 3, 3), nn.BatchNorm2d(3), nn.BatchNorm2d(3))
    assert "another one" in program_of(twice)
    assert "2-D convolution" in program_of(nn.Sequential(nn.Linear(2, 3), nn.BatchNorm1d(3)))


FORWARDS = {
    "stage": lambda h: h.repeat(1, 2, 1, 1)[:, :3, :2, :2],
    "0": lambda h: h.repeat(1, 2, 1, 1)[:, :3, :4, :4],
    "1": torch.abs,
    "2": lambda h: F.avg_pool2d(h, 2),
}


@pytest.mark.parametrize("place", FORWARDS)
def test_a_forward_put_in_the_place_of_a_layers_own_is_called(backend, place):
    """One that both branches share, so that they do not differ by it."""
    torch.manual_seed(0)
    net = lf.TransferNet([nn.Sequential(nn.Conv2d(2, 3, 3), nn.ReLU(), nn.MaxPool2d(2))])
    net.add_task("a", nn.Sequential(nn.Flatten(), nn.Linear(12, 3)))
    for stage in (net.shared[0], net.specific["a"][0]):
        (stage if place == "stage" else stage[int(place)]).forward = FORWARDS[place]
        assert "another forward" in program_of(stage)
    x, y = torch.randn(2, 2, 6, 6), torch.tensor([0, 2])
    found, wanted = (lf.LASEM(net, backend=b)(x, y, "a") for b in (backend, "reference"))
    torch.testing.assert_close(found.log_likelihood, wanted.log_likelihood)


class Counting(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.calls = nn.Conv2d(2, 2, 3), 0

    def forward(self, h):
        self.calls += 1
        return self.conv(h)


class Branching(Counting):
    def forward(self, h):
        return self.conv(h) if h.sum() > 0 else h


@pytest.mark.parametrize(
    ("module", "reason"),
    [
        (nn.Sequential(nn.Conv2d(2, 2, 3), nn.Softmax2d()), "a layer Softmax2d"),
        (nn.Sequential(nn.Conv2d(2, 2, 3), nn.GELU(), nn.ReLU()), "ReLU behind another activation"),
        (nn.Sequential(nn.Conv2d(2, 2, 3), nn.ReLU(), nn.GELU()), "GELU behind another activation"),
        (nn.Sequential(nn.Conv2d(2, 2, 3), nn.Tanh(), nn.SiLU()), "SiLU behind another activation"),
        (
            nn.Sequential(nn.Conv2d(2, 2, 3), nn.MaxPool2d(2), nn.ELU()),
            "ELU behind another activation, a sum or a max-pool",
        ),
        (nn.Sequential(nn.Conv2d(2, 2, 3), nn.GELU(), nn.GroupNorm(1, 2)), "a norm behind an"),
        (nn.Sequential(nn.Linear(2, 2), nn.GroupNorm(1, 2)), "norm that does not follow a 2-D"),
        (nn.Sequential(nn.ReLU(), nn.Conv2d(2, 2, 3)), "ReLU does not follow"),
        (nn.Sequential(nn.Conv2d(2, 2, 3), nn.Dropout(), nn.Conv2d(2, 2, 3)), "random numbers"),
        (nn.Sequential(nn.Conv2d(2, 2, 3), nn.RReLU()), "random numbers"),
        (nn.Sequential(nn.Conv2d(2, 2, 3), nn.RReLU().eval()), "a layer RReLU"),
        (nn.Sequential(nn.Conv2d(2, 2, 3), nn.MaxPool2d(3, stride=1)), "max-pool"),
        (
            nn.Sequential(nn.Conv2d(2, 2, 3), nn.ReLU(), nn.BatchNorm2d(2)),
            "a norm behind an activation",
        ),
        (nn.Sequential(nn.Conv2d(2, 2, 3), nn.Linear(2, 2)), "linear layer on images"),
        (Counting(), "changes attributes"),
        (Branching(), "cannot be traced"),
        (lf.nets.SkipLayer(nn.Conv2d(2, 2, 3, padding=1), nn.MaxPool2d(2)), "passes its pool"),
    ],
    ids=lambda value: "" if isinstance(value, str) else type(value).__name__,
)
def test_what_is_refused_says_why(module, reason):
    before = {name: value for name, value in vars(module).items() if name != "_modules"}
    assert reason in program_of(module)
    assert before == {name: value for name, value in vars(module).items() if name != "_modules"}


def test_a_trace_follows_the_module():
    block = Block()
    assert program_of(block) is program_of(block)
    block.how = "methods"
    assert _summary(block)[-1][-1] == 1
    block.second = nn.Conv2d(4, 4, 1)
    assert program_of(block).layers[1].core is block.second
    block.second.register_forward_hook(lambda *_: None)
    assert "hooks" in program_of(block)
    dropout = nn.Sequential(nn.Conv2d(2, 2, 3), nn.Dropout(0.5), nn.ReLU())
    assert "random numbers" in program_of(dropout)
    assert _summary(dropout.eval()) == [("0", 0, True, None, False, 1)]


def test_the_traces_of_both_steps_are_kept(monkeypatch):
    stage = nn.Sequential(nn.Conv2d(2, 2, 3), nn.Dropout(0.5), nn.ReLU())
    m_step = program_of(stage)
    stage[1].eval()
    e_step = program_of(stage)
    monkeypatch.delattr(lowering, "_trace")
    for _ in range(2):
        stage[1].train()
        assert program_of(stage) is m_step
        stage[1].eval()
        assert program_of(stage) is e_step


def test_a_trace_does_not_keep_its_module():
    block = Block()
    program_of(block)
    gone = weakref.ref(block)
    del block
    gc.collect()
    assert gone() is None


class Passing(nn.Module):
    """Uses what its first convolution gives three times, so that nothing may be fused into it."""

    def __init__(self):
        super().__init__()
        self.first, self.second = (nn.Conv2d(4, 4, 3, padding=1) for _ in range(2))

    def forward(self, h):
        a = self.first(h)
        return (self.second(a) + a).relu()


def test_a_linear_layer_on_the_pixels_of_images_runs_as_it_is():
    torch.manual_seed(0)
    net = lf.TransferNet([nn.Conv2d(4, 4, 3, padding=1), nn.Sequential(nn.Linear(8, 8), nn.ReLU())])
    net.add_task("a", nn.Sequential(nn.Flatten(), nn.Linear(4 * 9 * 8, 3)))
    net.double()
    x, y = torch.randn(3, 4, 9, 8, dtype=torch.float64), torch.tensor([0, 2, 1])
    em = lf.LASEM(net, backend="torch")
    em._search.everything = evaluator_of(em.space, PLAIN)
    assert_step_equals(net, em(x, y, "a"), brute_force(net, em.space.bits, x, y, "a"))


class Normed(nn.Module):
    """A residual block with group norms and another activation, some of them by name."""

    def __init__(self):
        super().__init__()
        self.first, self.second = (nn.Conv2d(4, 4, 3, padding=1) for _ in range(2))
        self.norms = nn.ModuleList([nn.GroupNorm(2, 4), nn.GroupNorm(1, 4, affine=False)])

    def forward(self, h):
        out = F.gelu(self.norms[0](self.first(h)))
        return F.relu(self.norms[1](self.second(out)) + h)


class ActivatedSum(nn.Module):
    """An activation before a sum, a ReLU and a pool behind it."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(4, 4, 3, padding=1)

    def forward(self, h):
        return F.max_pool2d(F.relu(self.conv(h).tanh() + h), 2)


def _behind(*layers):
    return lambda: nn.Sequential(nn.Conv2d(4, 4, 3, padding=1), *copy.deepcopy(layers))


STAGES = {
    "gelu": _behind(nn.GELU()),
    "gelu, pool": _behind(nn.GELU("tanh"), nn.MaxPool2d(2)),
    "silu in place": _behind(nn.SiLU(inplace=True)),
    "leaky relu": _behind(nn.LeakyReLU(0.3), nn.Identity()),
    "group norm": _behind(nn.GroupNorm(2, 4)),
    "group norm, relu, pool": _behind(nn.GroupNorm(4, 4, affine=False), nn.ReLU(), nn.MaxPool2d(2)),
    "group norm, elu, pool": _behind(nn.GroupNorm(1, 4), nn.ELU(), nn.MaxPool2d(2)),
    "norms and skips": Normed,
    "activated sum": ActivatedSum,
    "functions": lambda: Block(),
    "methods": lambda: Block(how="methods"),
    "in place": lambda: Block(how="in place"),
    "projection": lambda: Block(down=nn.Conv2d(4, 4, 1)),
    "passing": Passing,
    "wide first": lambda: nn.Sequential(nn.Conv2d(4, 4, 7, padding=3), nn.ReLU(), Block()),
    "grouped, then not": lambda: nn.Sequential(
        nn.Conv2d(4, 4, 3, padding=1, groups=4), nn.ReLU(), nn.Conv2d(4, 4, 3, padding=1)
    ),
    "grouped, last": lambda: nn.Sequential(
        nn.Conv2d(4, 4, 3, padding=1), nn.ReLU(), nn.Conv2d(4, 4, 3, padding=1, groups=2)
    ),
    "dropout that is off": lambda: nn.Sequential(
        nn.Conv2d(4, 4, 3, padding=1), nn.Dropout2d(0.0), nn.ReLU()
    ),
    "no epilogue": lambda: nn.Conv2d(4, 4, 3, padding=1),
    "pool before relu": lambda: nn.Sequential(
        nn.Conv2d(4, 4, 3, padding=1), nn.MaxPool2d(3, padding=1, ceil_mode=True), nn.ReLU()
    ),
}


@pytest.mark.parametrize("groups", [None, (2, 1), (1, 2)])
@pytest.mark.parametrize("name", STAGES)
def test_fused_layers_equal_brute_force(name, groups):
    torch.manual_seed(0)
    net = lf.TransferNet([copy.deepcopy(STAGES[name]()) for _ in range(3)])
    with torch.no_grad():
        side = net.shared[2](net.shared[1](net.shared[0](torch.zeros(1, 4, 9, 8)))).shape[2:]
    net.add_task("a", nn.Sequential(nn.Flatten(), nn.Linear(4 * side.numel(), 3)))
    net.double()
    x, y = torch.randn(3, 4, 9, 8, dtype=torch.float64), torch.tensor([0, 2, 1])
    em = lf.LASEM(net, lf.ConfigSpace(3, groups), backend="torch")
    em._search.everything, calls = evaluator_of(em.space, PLAIN), PLAIN.levels[0].calls
    truth = brute_force(net, em.space.bits, x, y, "a")
    assert_step_equals(net, em(x, y, "a"), truth)
    assert PLAIN.levels[0].calls > calls


def _step(em, x, y):
    em.net.zero_grad()
    step = em(x, y, "a")
    step.loss.backward()
    return step.posterior, [p.grad for p in em.net.parameters()]


@pytest.mark.parametrize("name", ["gelu, pool", "group norm, elu, pool", "norms and skips"])
def test_activations_and_group_norms_in_a_pruned_step(name):
    """In float64, against the naive loop; tests/parity.py has the kernels."""
    torch.manual_seed(0)
    net = lf.TransferNet([STAGES[name](), nn.Conv2d(4, 4, 3, padding=1), Normed()])
    with torch.no_grad():
        side = net.shared[2](net.shared[1](net.shared[0](torch.zeros(1, 4, 9, 8)))).shape[2:]
    net.add_task("a", nn.Sequential(nn.Flatten(), nn.Linear(4 * side.numel(), 3)))
    net.double()
    with torch.no_grad():  # affine parameters of a new norm are ones and zeros
        for p in net.parameters():
            p += 0.1 * torch.randn_like(p)
    x, y = torch.randn(3, 4, 9, 8, dtype=torch.float64), torch.tensor([0, 2, 1])
    found = []
    for backend in ("torch", "reference"):
        em = lf.LASEM(copy.deepcopy(net), likelihood="mean", backend=backend, prune=0.3)
        if backend == "torch":
            em._search.everything = evaluator_of(em.space, PLAIN)
        found.append(_step(em, x, y))
    torch.testing.assert_close(*found)


def test_branches_whose_activations_differ_run_as_they_are():
    net = lf.TransferNet([STAGES["leaky relu"](), nn.Conv2d(4, 4, 3, padding=1)])
    net.add_task("a", nn.Sequential(nn.Flatten(), nn.Linear(4 * 72, 3)))
    net.double()
    x, y = torch.randn(3, 4, 9, 8, dtype=torch.float64), torch.tensor([0, 2, 1])
    em = lf.LASEM(net, backend="torch")
    em._search.everything = evaluator_of(em.space, PLAIN)
    em(x, y, "a")
    net.specific["a"][0][1].negative_slope = 0.9  # between two steps
    em = lf.LASEM(net, backend="torch")
    em._search.everything = evaluator_of(em.space, PLAIN)
    assert_step_equals(net, em(x, y, "a"), brute_force(net, em.space.bits, x, y, "a"))
