"""The `triton` backend: what it takes, its gradients, its launches, and whole steps."""

from __future__ import annotations

import copy
from collections import Counter
from contextlib import contextmanager
from unittest import mock

import pytest
import torch
from levels import draw, reference, truth, usual
from nets import batch
from oracle import brute_force
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from triton.runtime.interpreter import GridExecutor

import lasem_fast as lf
from lasem_fast._triton_level import Tiles, level
from lasem_fast.backends import triton_scores
from lasem_fast.backends.triton_level import triton_head, triton_level
from lasem_fast.fold import RowsFirst
from lasem_fast.kernels import level_forward
from lasem_fast.transfer import Branch


def leaves_of(case, dtype=torch.float32):
    return [t.detach().to(dtype).requires_grad_() for t in (case.x, *case.weights, *case.biases)]


@pytest.mark.parametrize("seed", [4, 9, 16])
def test_gradients_through_autograd(seed):
    case = draw(seed)
    x, *parameters = leaves_of(case)
    branches = len(case.weights)
    y = level(x, parameters[:branches], parameters[branches:], case.geometry, dtype=torch.float32)
    # a permuted gradient, as one that comes from a layer in another layout
    dy = torch.randint(-2, 3, y.shape[::-1]).float().permute(5, 4, 3, 2, 1, 0)
    want = truth(case, dy.double())
    grads = torch.autograd.grad(y, [x, *parameters], dy)
    assert torch.equal(y.double(), want.y)
    for got, exact in zip(grads, (want.dx, *want.dweights, *want.dbiases), strict=True):
        assert torch.equal(got.double(), exact)


def test_opcheck():
    case = usual()
    x, *parameters = (t.detach() for t in leaves_of(case))
    weights, biases = parameters[:2], parameters[2:]
    ops, geometry = torch.ops.lasem_fast, list(case.geometry)
    permuted = x.transpose(2, 3).contiguous().transpose(2, 3)
    forward = (permuted, weights, biases, geometry, torch.bfloat16, [])
    torch.library.opcheck(ops.level_triton.default, forward)
    y, code = ops.level_triton(x, weights, biases, geometry, torch.float32, [])
    dgrad = (y, code, weights, list(x.shape), geometry, torch.float32, [])
    torch.library.opcheck(ops.level_dgrad_triton.default, dgrad)
    torch.library.opcheck(
        ops.level_wgrad_triton.default, (y, code, x, weights, biases, geometry, [])
    )


def test_compiles_without_a_graph_break():
    case = usual()
    x, *parameters = leaves_of(case)

    def loss(x, *parameters):
        y = level(x, parameters[:2], parameters[2:], case.geometry, dtype=torch.float32)
        return y.square().sum()

    compiled = torch.compile(loss, backend="aot_eager", fullgraph=True)
    eager = torch.autograd.grad(loss(x, *parameters), [x, *parameters])
    traced = torch.autograd.grad(compiled(x, *parameters), [x, *parameters])
    assert all(torch.equal(a, b) for a, b in zip(eager, traced, strict=True))


def test_a_given_tile_is_used():
    case = usual()
    x, *parameters = leaves_of(case)
    tile = level_forward.FMA_TILES[1]
    with launches() as counted:
        level(x, parameters[:2], parameters[2:], case.geometry, dtype=torch.float32,
              tiles=Tiles(forward=tile))  # fmt: skip
    assert counted.grids == [(-(-12 // tile.rows), -(-18 // tile.columns))]


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("x", torch.zeros(2, 3, 4, 5), "x: expected shape"),
        ("x", torch.zeros(2, 1, 3, 4, 5), "weights: expected shape"),
        ("x", torch.zeros(2, 1, 3, 4, 17).double(), "x: expected float32, float16 or bfloat16"),
        ("weights", [torch.zeros(9, 17, 3, 3)] * 3, "weights: expected one or two branches, got 3"),
        ("biases", [torch.zeros(9)], "biases: expected one per branch or none, got 1"),
        ("biases", [torch.zeros(8)] * 2, "biases: expected shape"),
        ("dtype", torch.float64, "dtype: expected float32, float16 or bfloat16"),
    ],
)
def test_errors_name_the_argument(name, value, message):
    case = usual()
    good = {"x": case.x.float(), "weights": [w.float() for w in case.weights],
            "biases": [b.float() for b in case.biases], "geometry": case.geometry,
            "dtype": torch.float32}  # fmt: skip
    with pytest.raises(ValueError, match=message):
        level(**{**good, name: value})


RELU = nn.ReLU()
TAKEN = [
    (nn.Conv2d(3, 5, 3, padding=1), RELU),
    (nn.Conv2d(3, 5, 3, padding=1), nn.MaxPool2d(3, ceil_mode=True), RELU),
    (nn.Conv2d(3, 5, (2, 4), padding="same", bias=False), RELU, nn.MaxPool2d(2, padding=1)),
    (nn.Conv2d(3, 5, (2, 3), (2, 1), (0, 2)), nn.Identity(), nn.MaxPool2d(2)),
    (nn.Conv2d(3, 5, 5, padding="valid"),),
    (nn.Flatten(), nn.Linear(3 * 6 * 7, 5), RELU),
    (nn.Flatten(), nn.Linear(3 * 6 * 7, 5, bias=False)),
]
LEFT = [
    (nn.Conv2d(3, 5, 3, dilation=2),),
    (nn.Conv2d(3, 5, 3, padding=1, padding_mode="circular"),),
    (nn.Conv2d(3, 5, 12, padding=6),),
    (nn.Conv2d(3, 5, 3), nn.Tanh()),
    (nn.Conv2d(3, 5, 3), RELU, nn.MaxPool2d(3, stride=2)),
    (nn.Conv2d(3, 5, 3), RELU, RELU),
    (nn.Conv2d(3, 5, 3).double(), RELU),
    (nn.AvgPool2d(2), nn.Conv2d(3, 5, 3)),
    (nn.Linear(7, 5),),
]


@pytest.mark.parametrize("layers", TAKEN)
@pytest.mark.parametrize("branches", [1, 2])
def test_the_stages_that_it_takes(layers, branches):
    modules = [copy.deepcopy(nn.Sequential(*layers)) for _ in range(branches)]
    for parameter in modules[-1].parameters():
        nn.init.normal_(parameter)
    h = torch.randn(4, 3, 6, 7)  # 2 samples of 2 rows
    out = triton_level([Branch(m) for m in modules], h, 2)
    want = torch.stack([m(h).unflatten(0, (2, 2)) for m in modules], dim=2).flatten(0, 2)
    torch.testing.assert_close(out.folded(), want)


@pytest.mark.parametrize("layers", LEFT)
def test_other_stages_are_left_to_pytorch(layers):
    assert triton_level([Branch(nn.Sequential(*layers))], torch.randn(4, 3, 6, 7), 2) is None


def test_three_branches_and_float64_are_left_to_pytorch():
    branch, h = Branch(nn.Conv2d(3, 5, 3)), torch.randn(4, 3, 6, 7)
    assert triton_level([branch] * 3, h, 2) is None
    assert triton_level([branch] * 2, h.double(), 2) is None
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert triton_level([branch], h, 2).data.dtype == torch.bfloat16


@pytest.mark.parametrize(
    "head",
    [
        nn.Sequential(nn.Flatten(), nn.Linear(24, 4)),
        nn.Sequential(nn.Flatten(), nn.Linear(24, 6), RELU, nn.Linear(6, 4, bias=False)),
    ],
)
@pytest.mark.parametrize("rows_first", [False, True])
def test_heads(head, rows_first):
    data = torch.randn(3, 2, 4, 2, 3)  # [P, N, H, W, C]
    h = RowsFirst(data) if rows_first else RowsFirst(data).folded()
    want = head(data.flatten(0, 1).permute(0, 3, 1, 2))
    torch.testing.assert_close(triton_head(head, h, 3), want)


@pytest.mark.parametrize(
    "head",
    [
        nn.Sequential(nn.Flatten(), nn.Linear(24, 4), nn.Tanh()),
        nn.Sequential(nn.Flatten(), nn.Dropout(), nn.Linear(24, 4)),
        nn.Sequential(nn.Flatten(), nn.Linear(24, 4).double()),
        nn.Sequential(nn.Linear(3, 4)),
        nn.Flatten(),
        nn.Sequential(),
    ],
)
def test_other_heads_are_left_to_pytorch(head):
    assert triton_head(head, RowsFirst(torch.randn(3, 2, 4, 2, 3)), 3) is None


class _Counted(TorchDispatchMode):
    """Counts operators that start a kernel on a device: neither views nor allocations."""

    def __init__(self) -> None:
        super().__init__()
        self.kernels: Counter[str] = Counter()
        self.grids: list[tuple[int, ...]] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        free = func.is_view or func.namespace != "aten" or "empty" in func.__name__
        if not free and func.overloadpacket is not torch.ops.aten.detach:
            self.kernels[str(func)] += 1
        return func(*args, **(kwargs or {}))


@contextmanager
def launches():
    """Counts what a device would be asked to run."""
    counted, call = _Counted(), GridExecutor.__call__

    def launch(self, *args, **kwargs):
        counted.kernels[self.fn.__name__] += 1
        counted.grids.append(self.grid)
        return call(self, *args, **kwargs)

    # deterministic algorithms would fill fresh memory, which is an operator of its own
    torch.use_deterministic_algorithms(False)
    with mock.patch.object(GridExecutor, "__call__", launch), counted:
        yield counted


def _cifar_4():
    """CIFAR-4, narrowed: 4 levels of 2 branches, a head of 2 layers."""
    architecture = lf.nets.cifar100(layers=4, width=1 / 16)
    net = architecture.net()
    features = architecture.channels[-1] * 4
    net.add_task(
        "a", nn.Sequential(nn.Flatten(), nn.Linear(features, 4), nn.ReLU(), nn.Linear(4, 3))
    )
    return net.to(memory_format=torch.channels_last)


def _on_a_long_batch(kernels):
    """Kernels where every weight gradient takes its second launch, as on a longer mini-batch."""
    return kernels.total() - kernels["level_wgrad_sum_kernel"] + kernels["level_wgrad_kernel"]


def test_launches_of_levels_and_head():
    em = lf.LASEM(_cifar_4(), backend="triton")
    x = torch.randn(1, 3, 8, 8)
    with launches() as counted:
        logits = em.evaluate(x, "a")
        logits.backward(torch.ones_like(logits).detach())
    kernels = counted.kernels
    assert kernels.pop("aten.ones_like.default") == 1  # the test's own
    assert kernels["level_forward_kernel"] == 4 + 2
    assert kernels["level_dgrad_kernel"] == 3 + 2
    assert kernels["level_wgrad_kernel"] == 4 + 2
    assert set(kernels) <= {
        "level_forward_kernel", "level_dgrad_kernel", "level_wgrad_kernel", "level_wgrad_sum_kernel"
    }  # fmt: skip
    assert _on_a_long_batch(kernels) <= 23


def test_launches_of_a_whole_step(monkeypatch):
    """E-step, M-step, prior and optimiser, as on a device, where nothing waits for a value."""
    em = lf.LASEM(_cifar_4(), backend="triton")
    monkeypatch.setattr(em, "_reads_values", lambda x: False)
    monkeypatch.setattr(triton_scores, "_looked_at_first", lambda logits: False)
    optimizer = torch.optim.SGD(em.net.task_parameters("a"), lr=0.1, fused=True)
    x, y = torch.randn(2, 3, 8, 8), torch.tensor([0, 2])
    for _ in range(2):  # the first step makes the prior's counts
        optimizer.zero_grad()
        with launches() as counted:
            em(x, y, "a").loss.backward()
            optimizer.step()
    assert int(em._prior.states["a"].wins.sum()) == 2
    assert _on_a_long_batch(counted.kernels) <= 28, counted.kernels.most_common()


def _drawn_net(seed):
    torch.manual_seed(seed)
    stages = [
        nn.Sequential(nn.Conv2d(2, 3, 3, padding=1), nn.ReLU()),
        nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2)),
        nn.Sequential(nn.Flatten(), nn.Linear(36, 5), nn.ReLU()),
    ]
    net = lf.TransferNet(stages)
    net.add_task("a", nn.Sequential(nn.Linear(5, 4), nn.ReLU(), nn.Linear(4, 3)))
    return net


@pytest.mark.parametrize("seed", [0, 1])
def test_a_whole_step_against_brute_force(seed):
    net = _drawn_net(seed)
    x, y = batch(samples=2, seed=seed, dtype=torch.float32)
    exact = copy.deepcopy(net).double()
    truth = brute_force(exact, lf.ConfigSpace(3).bits, x.double(), y, "a")
    errors = {}
    for backend in ("torch", "triton"):
        net.zero_grad()
        step = lf.LASEM(net, backend=backend)(x, y, "a")
        step.loss.backward()
        pairs = [(step.posterior, truth.posterior), (step.log_likelihood, truth.log_likelihood)]
        pairs += [(p.grad, truth.grads[name]) for name, p in net.named_parameters()]
        got, want = (
            torch.cat([t.detach().double().flatten() for t in ts])
            for ts in zip(*pairs, strict=True)
        )
        errors[backend] = float((got - want).norm() / want.norm())
    # k = 2: the same sums in another order
    assert errors["triton"] <= 2 * max(errors["torch"], torch.finfo(torch.float32).eps), errors


@pytest.mark.parametrize("seed", [4, 9, 16])
def test_gradients_of_gradients(seed):
    case = draw(seed)
    branches = len(case.weights)

    def both(level, leaves):
        y = level(leaves[0], leaves[1 : branches + 1], leaves[branches + 1 :])
        first = torch.autograd.grad(y.square().sum(), leaves, create_graph=True)
        second = torch.autograd.grad(sum(g.square().sum() for g in first), leaves)
        return [*first, *second]

    got = both(lambda *a: level(*a, case.geometry, dtype=torch.float32), leaves_of(case))
    plain = both(lambda *a: reference(case, *a), leaves_of(case))
    exact = both(lambda *a: reference(case, *a), leaves_of(case, torch.float64))
    for a, b, want in zip(got, plain, exact, strict=True):
        # k = 2, or the rounding of the result itself
        allowed = max(2 * (b - want).norm(), torch.finfo(torch.float32).eps * want.norm())
        assert (a - want).norm() <= allowed
