"""The `cpp` backend inside the tree: which layers it takes, and the sizes and layouts it gives."""

from __future__ import annotations

import random

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

import lasem_fast as lf
from lasem_fast.backends import cpu_ops, plain_torch
from lasem_fast.backends.cpu_level import CpuLevel
from lasem_fast.backends.operations import Layer, Liveness, Skip
from lasem_fast.levels.fold import RowsFirst
from lasem_fast.levels.plan import Level
from lasem_fast.levels.relu_and_pool import Pool
from lasem_fast.transfer import Branch
from lasem_fast.tree import fused_stage

needs_kernels = pytest.mark.skipif(
    lf.backends()["cpp"] != "available", reason=f"cpp: {lf.backends()['cpp']}"
)

CPU, TORCH = CpuLevel(), plain_torch.TorchLevel()
FULL = Level((0, 0, 1, 1), (0, 1, 0, 1), 2)


def _layer(*layers: nn.Module, branches: int = 1) -> Layer:
    """The one fused layer of a stage of these layers, every branch with the same weights."""
    stage = nn.Sequential(*layers)
    lowered = fused_stage.lowered((TORCH,), [Branch(stage)] * branches, torch.empty(1, 1))
    (layer,) = lowered.layers
    return layer


def _images(channels: int, side: int = 9) -> torch.Tensor:
    return torch.randn(2, 3, side, side, channels)


def _why_not(*layers: nn.Module, x: torch.Tensor | None = None) -> str:
    """Why a stage of these layers does not reach the kernels, or ""."""
    conv = next(layer for layer in layers if type(layer) is nn.Conv2d)
    found = fused_stage.why_not(
        (CPU,), [Branch(nn.Sequential(*layers))], _images(conv.in_channels) if x is None else x
    )
    return found if isinstance(found, str) else found[0][1]


TAKEN = (
    lambda: (nn.Conv2d(3, 5, 3),),
    lambda: (nn.Conv2d(3, 5, 3), nn.MaxPool2d(2)),
    lambda: (nn.Conv2d(3, 5, 3, padding=1), nn.ReLU()),
    lambda: (nn.Conv2d(3, 5, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2)),
    lambda: (nn.Conv2d(3, 5, 3, padding=1), nn.MaxPool2d(3, ceil_mode=True), nn.ReLU()),
    lambda: (
        nn.Conv2d(3, 5, 3, padding="same", bias=False), nn.ReLU(), nn.MaxPool2d(3, padding=1)
    ),
    lambda: (nn.Conv2d(3, 5, 3), nn.Identity(), nn.ReLU()),
    lambda: (nn.Conv2d(3, 5, 3, padding=2), nn.ReLU()),
    *(
        lambda padding=padding, pool=pool: (
            nn.Conv2d(6, 5, 5, padding=padding), nn.ReLU(), *(nn.MaxPool2d(**p) for p in pool)
        )
        for padding in (0, 1, 2, 4, "same", "valid")
        for pool in (
            (), ({"kernel_size": 2},), ({"kernel_size": 3, "padding": 1, "ceil_mode": True},)
        )
    ),
)  # fmt: skip


@needs_kernels
@pytest.mark.parametrize("made", TAKEN)
def test_the_layers_that_it_takes(made):
    torch.manual_seed(0)
    layers = made()
    assert _why_not(*layers) == ""
    stage, x = nn.Sequential(*layers), torch.randn(2, layers[0].in_channels, 9, 9)
    layer, both = _layer(*layers, branches=2), Level((0, 0), (0, 1), 1)
    got = RowsFirst(CPU(layer, RowsFirst.of(x, 1).data, both, None, None)).folded()
    plain = stage(x).repeat_interleave(2, dim=0)
    exact = stage.double()(x.double()).repeat_interleave(2, dim=0)
    # k: what the outputs of F(4x4, 3x3) and of F(2x2, 5x5) are held to
    k = 8 if layers[0].kernel_size == (3, 3) else 4
    assert got.shape == exact.shape
    assert (got - exact).norm() <= k * (plain - exact).norm()


def _double(layer: Layer) -> Layer:
    return layer._replace(
        weights=[t.double() for t in layer.weights], biases=[t.double() for t in layer.biases]
    )


@pytest.mark.parametrize(
    ("conv", "why"),
    [
        (nn.Conv2d(6, 5, 7), r"kernel_size (7, 7): the C++ kernels have 3x3 and 5x5"),
        (nn.Conv2d(6, 5, (5, 3)), r"kernel_size (5, 3)"),
        (nn.Conv2d(6, 5, 1), r"kernel_size (1, 1)"),
        (nn.Conv2d(6, 5, 5, stride=2), r"stride (2, 2) and dilation (1, 1)"),
        (nn.Conv2d(3, 5, 3, stride=2), r"stride (2, 2) and dilation (1, 1)"),
        (nn.Conv2d(6, 5, 5, dilation=2), r"stride (1, 1) and dilation (2, 2)"),
        (nn.Conv2d(3, 5, 3, dilation=2), r"stride (1, 1) and dilation (2, 2)"),
        (nn.Conv2d(6, 5, 5, padding=5), r"padding (5, 5) of zeros"),
        (nn.Conv2d(3, 5, 3, padding=3), r"padding (3, 3) of zeros"),
        (nn.Conv2d(6, 5, 5, padding=(1, 2)), r"padding (1, 2) of zeros"),
        (nn.Conv2d(3, 5, 3, padding=(0, 1)), r"padding (0, 1) of zeros"),
        (nn.Conv2d(6, 5, 5, padding=2, padding_mode="reflect"), r"padding (2, 2) of reflect"),
        (nn.Conv2d(3, 5, 3, padding=1, padding_mode="circular"), r"padding (1, 1) of circular"),
        (nn.Conv2d(6, 4, 3, groups=2), "groups 2: the C++ kernels have 1"),
        (nn.Conv2d(3, 5, 3).double(), "torch.float64: the C++ kernels compute in float32"),
        (nn.Conv2d(3, 5, 3).half(), "torch.float16: the C++ kernels compute in float32"),
    ],
)
def test_other_convolutions_are_left_to_pytorch(conv, why):
    assert why in _why_not(conv, nn.ReLU())


@pytest.mark.parametrize(
    ("layers", "why"),
    [
        ((nn.Conv2d(3, 5, 3), nn.Softmax2d()), "Softmax2d"),
        ((nn.Conv2d(3, 5, 3), nn.ReLU(), nn.AvgPool2d(2)), "AvgPool2d"),
        ((nn.Conv2d(3, 5, 3), nn.ReLU(), nn.MaxPool2d(3, stride=2)), "max-pool"),
        ((nn.Conv2d(3, 5, 3), nn.ReLU(), nn.MaxPool2d(4)), "max-pool"),
        ((nn.Conv2d(3, 5, 3), nn.ReLU(), nn.MaxPool2d((2, 1))), "max-pool"),
        ((nn.AvgPool2d(2), nn.Conv2d(3, 5, 3), nn.ReLU()), "AvgPool2d"),
    ],
)
def test_other_stages_are_left_to_pytorch(layers, why):
    assert why in _why_not(*layers)


def test_a_linear_layer_is_left_to_pytorch():
    layer, x = _layer(nn.Flatten(), nn.Linear(12, 4), nn.ReLU()), torch.randn(2, 3, 12)
    assert CPU.why_not(layer, x) == "Linear is left to PyTorch"


def test_other_dtypes_and_devices_are_left_to_pytorch():
    layers = nn.Conv2d(3, 5, 3), nn.ReLU()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert _why_not(*layers) == "under autocast"
    x = _images(3)
    assert _why_not(*layers, x=x.double()) == "torch.float64: the C++ kernels compute in float32"
    assert _why_not(*layers, x=x.bfloat16()) == "torch.bfloat16: the C++ kernels compute in float32"
    assert _why_not(*layers, x=x.to("meta")) == "on meta"


@needs_kernels
def test_images_that_do_not_fit_are_left_to_pytorch_which_says_why():
    stage = nn.Sequential(nn.Conv2d(3, 5, 3), nn.ReLU())
    for x, words in (
        (torch.randn(2, 3, 2, 2), "Kernel size can't be greater"),
        (torch.randn(2, 4, 9, 9), "4 channels"),
    ):
        with pytest.raises(RuntimeError, match=words):
            fused_stage.run(
                fused_stage.lowered((CPU,), [Branch(stage)], x), x, Level((0,), (0,), 1)
            )


@given(st.integers(3, 14), st.sampled_from([2, 3]), st.integers(0, 1), st.booleans())
def test_pooled_sizes_are_pytorchs(size, window, padding, ceil):
    pool = Pool(window, padding, ceil)
    layer = nn.MaxPool2d(window, padding=padding, ceil_mode=ceil)
    assert pool.output(size) == layer(torch.zeros(1, 1, size, size)).shape[-1]


@given(st.integers(1, 3), st.integers(1, 3), st.integers(1, 4))
def test_rows_first_and_folded_are_the_same_rows(samples, rows, channels):
    h = torch.randn(samples * rows, channels, 2, 3)
    assert torch.equal(RowsFirst.of(h, rows).folded(), h)


INPUTS = {
    "rows first": lambda x: x,
    "folded": lambda x: RowsFirst.of(RowsFirst(x).folded(), 2).data,
    "folded, channels last": lambda x: RowsFirst.of(
        RowsFirst(x).folded().contiguous(memory_format=torch.channels_last), 2
    ).data,
    "some channels of more": lambda x: torch.cat([x, x + torch.nan], dim=-1)[..., : x.shape[-1]],
    "one row for both": lambda x: x[:1].expand_as(x),
}
WEIGHTS = {
    "channels last": lambda t: t.contiguous(memory_format=torch.channels_last),
    "transposed": lambda t: t.transpose(2, 3).contiguous().transpose(2, 3),
    "every second": lambda t: torch.stack([t, t + torch.nan], dim=1)[:, 0],
}


@needs_kernels
@pytest.mark.parametrize("of_weights", WEIGHTS)
@pytest.mark.parametrize("of_inputs", INPUTS)
def test_layouts_do_not_matter(of_inputs, of_weights):
    """Outputs and gradients bit for bit, however inputs, weights and biases lie in memory."""
    core = nn.Conv2d(3, 5, 3, padding=1)
    cores = [core, nn.Conv2d(3, 5, 3, padding=1)]
    layer = _layer(core, nn.ReLU(), nn.MaxPool2d(2))
    x = _images(3)
    if of_inputs == "one row for both":
        x = x[:1].repeat(2, 1, 1, 1, 1)

    def run(x, weights, biases):
        leaves = [t.detach().requires_grad_() for t in (x, *weights, *biases)]
        x, *tensors = leaves
        y = CPU(layer._replace(weights=tensors[:2], biases=tensors[2:]), x, FULL, None, None)
        dy = torch.linspace(-1, 1, y.numel()).view_as(y)
        return y, *torch.autograd.grad(y, leaves, dy)

    weights, biases = [c.weight for c in cores], [c.bias for c in cores]
    expected = run(x, weights, biases)
    strided = [torch.stack([b, b + torch.nan], dim=1)[:, 0] for b in biases]
    got = run(INPUTS[of_inputs](x), [WEIGHTS[of_weights](w) for w in weights], strided)
    for a, b in zip(got, expected, strict=True):
        assert torch.equal(a, b)


def _list_of_rows(draw: random.Random) -> Level:
    """Some parents used often and some never; branches that need not be 0 and 1."""
    width = draw.randint(1, 4)
    names = draw.sample(range(3), draw.randint(1, 3))
    pairs = [(parent, branch) for parent in range(width) for branch in names]
    kept = sorted(draw.sample(pairs, draw.randint(1, len(pairs))))
    return Level(tuple(p for p, _ in kept), tuple(b for _, b in kept), width)


@needs_kernels
@pytest.mark.parametrize("seed", range(20))
def test_any_list_of_rows_forward_and_backward(seed):
    """Against float64, away from ties (k = 12), with some rows left out of the backward."""
    draw = random.Random(seed)
    torch.manual_seed(seed)
    level = _list_of_rows(draw)
    filter_size = draw.choice((3, 5))
    conv = nn.Conv2d(4, 6, filter_size, padding="same", bias=draw.random() < 0.7)
    pool = draw.choice(((), (nn.MaxPool2d(2),), (nn.MaxPool2d(3),)))
    used = len(level.used_branches)
    layer = _layer(conv, *pool, branches=used)
    skips = draw.choice((None, "own", "shared"))
    relu, relu_after = draw.random() < 0.7, skips is not None and draw.random() < 0.5
    layer = layer._replace(relu=relu, relu_after=relu_after)
    x, skip = _away_from_ties(layer, level, skips)
    live = torch.tensor([draw.random() < 0.7 for _ in range(len(level))])
    dy = torch.randn(plain_torch.run_level(layer, x, level, skip).shape)
    results = []
    for operation, dtype, dead in ((CPU, torch.float32, torch.nan), (TORCH, torch.float32, 0.0),
                                   (TORCH, torch.float64, 0.0)):  # fmt: skip
        values = [x, *layer.weights, *layer.biases, *([skip.data] if skip else [])]
        leaves = [t.detach().to(dtype).requires_grad_() for t in values]
        biases = leaves[1 + used : 1 + used + len(layer.biases)]
        own = layer._replace(weights=leaves[1 : 1 + used], biases=biases)
        own_skip = skip._replace(data=leaves[-1]) if skip else None
        liveness = Liveness()
        y = operation(own, leaves[0], level, own_skip, liveness)
        liveness.live = live  # of the rows that are not, the gradient may be anything
        sent = torch.where(live.view(-1, 1, 1, 1, 1), dy, dead).to(dtype)
        results.append([y.detach(), *torch.autograd.grad(y, leaves, sent)])
    for got, plain, exact in zip(*results, strict=True):
        rounding = torch.finfo(torch.float32).eps / 2 * exact.norm()
        assert (got - exact).norm() <= 12 * max((plain - exact).norm(), rounding)


def _away_from_ties(
    layer: Layer, level: Level, skips: str | None
) -> tuple[torch.Tensor, Skip | None]:
    """Inputs, and skips if any, on which no ReLU and no pool is within rounding of a tie."""
    while True:
        x, skip = torch.randn(level.width, 2, 7, 7, 4), None
        if skips is not None:
            rows = level.parents if skips == "shared" else None
            held = level.width if skips == "shared" else len(level)
            skip = Skip(torch.randn(held, 2, 7, 7, 6), rows)
        wide_skip = skip and skip._replace(data=skip.data.double())

        def before(wide_skip=wide_skip, x=x, **off):
            bare = _double(layer._replace(pool=Pool(), **off))
            return plain_torch.run_level(bare, x.double(), level, wide_skip)

        nearest = min(
            before(None, relu=False, relu_after=False).abs().min(),
            before(relu_after=False).abs().min() if layer.relu_after else torch.inf,
        )
        size, y = layer.pool.size, before().flatten(0, 1).permute(0, 3, 1, 2)
        if size > 1:
            windows = y.unfold(2, size, size).unfold(3, size, size).flatten(4)
            first, second = windows.topk(2, dim=-1).values.unbind(-1)
            # of equal values behind a ReLU that is shut, none has a gradient
            nearest = min(nearest, (first - second)[first != 0].min())
        if nearest > 1e-5:
            return x, skip


@needs_kernels
@pytest.mark.parametrize(
    ("filter_size", "side", "pool", "tile"),
    [
        (3, 9, 3, 3),  # 9 tiles of 25 products; of F(4x4), 9 of 36
        (3, 8, 3, 4),  # 9 of 25 against 4 of 36
        (3, 9, 2, 3),
        (3, 7, 1, 4),
        (3, 3, 1, 3),  # 25 products against 36
        (3, 2, 1, 2),  # 16
        (5, 2, 1, 2),
    ],
)
def test_the_rule_takes_the_way_of_fewest_products(filter_size, side, pool, tile):
    conv = nn.Conv2d(16, 3, filter_size, padding="same")
    pools = [nn.MaxPool2d(pool, ceil_mode=True)] if pool > 1 else []
    layer, x = _layer(conv, nn.ReLU(), *pools, branches=2), _images(16, side)
    out = -(-side // pool)

    def by(tile):
        return cpu_ops.winograd_level(
            x, layer.weights, layer.biases,
            parents=torch.tensor(FULL.parents), branches=torch.tensor(FULL.branches),
            padding=filter_size // 2, pool=pool, out_size=(out, out), tile=tile,
        )  # fmt: skip

    got = CPU(layer, x, FULL, None, None)
    tiles = (1, 2, 3, 4) if filter_size == 3 else (2,)
    assert [m for m in tiles if torch.equal(got, by(m))] == [tile]
