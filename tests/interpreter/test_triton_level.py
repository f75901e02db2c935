"""The `triton` backend: what it takes, its gradients, its launches, and whole steps."""

from __future__ import annotations

import copy
import random
from collections import Counter
from dataclasses import replace

import pytest
import torch
from launches import launches
from levels import draw, draw_rows, integers, listed, reference, truth, usual, with_skip
from nets import batch
from oracle import brute_force
from torch import nn

import lasem_fast as lf
from lasem_fast.backends import triton_level as triton_backend
from lasem_fast.backends import triton_scores
from lasem_fast.backends.triton_level import GatherLevel
from lasem_fast.backends.triton_level_op import Liveness, Tiles, level
from lasem_fast.backends.triton_linear_head import triton_head
from lasem_fast.kernels import level_forward
from lasem_fast.kernels.level_geometry import Geometry
from lasem_fast.kernels.level_rows import Rows
from lasem_fast.levels.fold import RowsFirst
from lasem_fast.levels.plan import Level
from lasem_fast.transfer import Branch
from lasem_fast.tree import fused_stage


def leaves_of(case, dtype=torch.float32):
    return [t.detach().to(dtype).requires_grad_() for t in case.leaves]


def run(case, leaves, **options):
    """The level through autograd; ``leaves`` as :attr:`Case.leaves`."""
    case = case.with_leaves(leaves)
    return level(
        case.x, case.weights, case.biases, case.geometry, case.rows,
        dtype=torch.float32, skip=case.skip, **options,
    )  # fmt: skip


@pytest.mark.parametrize("case", [*map(draw, (4, 9, 16)), listed()], ids=[4, 9, 16, "listed"])
def test_gradients_through_autograd(case):
    leaves, liveness = leaves_of(case), Liveness()
    y = run(case, leaves, liveness=liveness)
    # a permuted gradient, as one that comes from a layer in another layout
    dy = torch.randint(-2, 3, y.shape[::-1]).float().permute(4, 3, 2, 1, 0)
    liveness.live = case.live
    want = truth(case, dy.double())
    grads = torch.autograd.grad(y, leaves, dy)
    assert torch.equal(y.double(), want.y)
    exact = (want.dx, *want.dweights, *want.dbiases, *want.dskip)
    for got, right in zip(grads, exact, strict=True):
        assert torch.equal(got.double(), right)


def _two_levels(relu_after):
    """A level, and one behind it to which the first one's input is added, by two rows each."""
    torch.manual_seed(0)
    geometry = Geometry(1, 1, 1, 1, 3, 3, 1, 0, 3, 3, 1)
    weights = [integers(5, 5, 3, 3).float().requires_grad_() for _ in range(4)]
    first, second = Rows.full(2, 2), Rows((0, 1, 2, 3), (0, 1, 0, 1), 4, (0, 0, 1, 1), 2)
    x = integers(2, 1, 3, 3, 5).float().requires_grad_()

    def output(skip_of):
        h = level(x, weights[:2], [], geometry, first, dtype=torch.float32, carry=True)
        return level(
            h[0], weights[2:], [], geometry._replace(relu_after=relu_after), second,
            dtype=torch.float32, skip=skip_of(h[1]),
        )  # fmt: skip

    return x, weights, output


@pytest.mark.parametrize("relu_after", [0, 1])
def test_the_gradient_of_a_carried_input(relu_after):
    x, weights, output = _two_levels(relu_after)
    dy = integers(4, 1, 3, 3, 5).float()
    with launches() as counted:
        carried = torch.autograd.grad(output(lambda carried: carried), [x, *weights], dy)
    assert counted.kernels == {
        "level_forward_kernel": 2, "level_dgrad_kernel": 2, "level_wgrad_kernel": 2
    }  # fmt: skip
    added = torch.autograd.grad(output(lambda carried: x), [x, *weights], dy)
    assert all(torch.equal(a, b) for a, b in zip(carried, added, strict=True))
    torch.use_deterministic_algorithms(True)
    alone = torch.autograd.grad(output(lambda carried: x.detach()), [x, *weights], dy)
    assert not torch.equal(carried[0], alone[0])


def test_the_gradient_of_a_skip_in_order_is_that_of_the_output():
    case = usual()
    geometry = case.geometry._replace(pool=1, pool_pad=0, out_h=3, out_w=4)
    rows = replace(case.rows, skips=(0, 1, 2, 3), skip_width=4)
    case = case._replace(geometry=geometry, rows=rows, skip=integers(4, 1, 3, 4, 9))
    leaves = [leaf.detach() for leaf in leaves_of(case)]
    leaves[-1].requires_grad_()
    y, dy = run(case, leaves), case.gradient().float()
    with launches() as counted:
        (dskip,) = torch.autograd.grad(y, leaves[-1:], dy)
    assert not counted.kernels
    assert torch.equal(dskip, dy)


@pytest.mark.parametrize("seed", range(3))
def test_launches_do_not_depend_on_the_list(seed):
    """One forward; dgrad, wgrad and its sum, with a skip that rows share and rows not live."""
    case = with_skip(listed(), random.Random(seed))
    rows = draw_rows(random.Random(seed), 2)
    case = case._replace(rows=replace(rows, skips=(0,) * len(rows), skip_width=1))
    shape = case.skip.shape[1:]
    case = case._replace(x=case.x[:1].repeat(rows.width, 1, 1, 1, 1), skip=integers(1, *shape))
    leaves, liveness = leaves_of(case), Liveness(torch.ones(len(rows), dtype=torch.bool))
    with launches() as counted:
        y = run(case, leaves, liveness=liveness)
        torch.autograd.grad(y, leaves, y.detach())
    kernels = Counter({k: n for k, n in counted.kernels.items() if k.startswith("level")})
    assert kernels.pop("level_forward_kernel") == 1
    assert kernels["level_dgrad_kernel"] == kernels["level_wgrad_kernel"] == 1
    assert kernels.total() == 2


def test_opcheck():
    case = listed()
    case = case.with_leaves([t.detach() for t in leaves_of(case)])
    ops, geometry = torch.ops.lasem_fast, list(case.geometry)
    *tables, counts = case.tables
    rows, parameters = (tables, list(counts)), (case.weights, case.biases)
    permuted = case.x.transpose(2, 3).contiguous().transpose(2, 3)
    forward = (permuted, *parameters, case.skip, *rows, geometry, torch.bfloat16, [])
    torch.library.opcheck(ops.level_triton.default, forward)
    forward = (case.x, *parameters, case.skip, *rows, geometry, torch.float32, [])
    y, code, arrivals = ops.level_triton(*forward)
    dgrad = (y, code, case.weights, *rows, case.live, None, list(case.x.shape), geometry,
             torch.float32, torch.float16, [])  # fmt: skip
    torch.library.opcheck(ops.level_dgrad_triton.default, dgrad)
    torch.library.opcheck(
        ops.level_wgrad_triton.default,
        (y, code, case.x, *parameters, *rows, arrivals, case.live, geometry, []),
    )


def test_compiles_without_a_graph_break():
    case = usual()
    leaves = leaves_of(case)

    def loss(*leaves):
        return run(case, list(leaves)).square().sum()

    compiled = torch.compile(loss, backend="aot_eager", fullgraph=True)
    eager = torch.autograd.grad(loss(*leaves), leaves)
    traced = torch.autograd.grad(compiled(*leaves), leaves)
    assert all(torch.equal(a, b) for a, b in zip(eager, traced, strict=True))


def test_a_given_tile_is_used():
    case = usual()
    tile = level_forward.FMA_TILES[1]
    with launches() as counted:
        run(case, leaves_of(case), tiles=Tiles(forward=tile))
    # 12 pixels of every branch, 9 channels
    assert counted.grids == [(2 * -(-12 // tile.rows), -(-9 // tile.columns))]


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("x", torch.zeros(2, 3, 4, 5), "x: expected shape"),
        ("x", torch.zeros(2, 1, 3, 4, 5), "weights: expected shape"),
        ("x", torch.zeros(3, 1, 3, 4, 17), "x: expected 2 parents, as rows.width, got 3"),
        ("x", torch.zeros(2, 1, 3, 4, 17).double(), "x: expected float32, float16 or bfloat16"),
        ("weights", [torch.zeros(9, 17, 3, 3)] * 3, "weights: expected one or two branches, got 3"),
        ("biases", [torch.zeros(9)], "biases: expected one per branch or none, got 1"),
        ("biases", [torch.zeros(8)] * 2, "biases: expected shape"),
        ("dtype", torch.float64, "dtype: expected float32, float16 or bfloat16"),
        ("skip", torch.zeros(2, 1, 3, 4, 9), "skip: expected a skip just where rows.skips"),
        ("rows", Rows((0, 1), (0, 0), 2, (0, 0), 1), "skip: expected a skip just where rows.skips"),
        ("geometry", usual().geometry._replace(relu_after=1), "geometry: expected relu_after = 0"),
    ],
)
def test_errors_name_the_argument(name, value, message):
    case = usual()
    good = {"x": case.x.float(), "weights": [w.float() for w in case.weights],
            "biases": [b.float() for b in case.biases], "geometry": case.geometry,
            "rows": case.rows, "dtype": torch.float32}  # fmt: skip
    with pytest.raises(ValueError, match=message):
        level(**{**good, name: value})


def test_errors_of_skip_and_liveness():
    case = listed()
    leaves = leaves_of(case)
    with pytest.raises(ValueError, match=r"skip: expected shape \[4, 1, 3, 4, 9\], got"):
        run(case, [*leaves[:-1], leaves[-1][1:]])
    for live in (torch.ones(3, dtype=torch.bool), torch.ones(4)):
        y = run(case, leaves, liveness=Liveness(live))
        with pytest.raises(ValueError, match="live: expected"):
            y.sum().backward()


def triton_level(branches, h, rows):
    """Every one of the rows in ``h`` through every branch."""
    pairs = [(p, b) for p in range(rows) for b in range(len(branches))]
    every = Level(tuple(p for p, _ in pairs), tuple(b for _, b in pairs), rows)
    lowered = fused_stage.lowered([GatherLevel()], branches, h)
    return None if lowered is None else fused_stage.run(lowered, h, every)


RELU = nn.ReLU()
TAKEN = [
    (nn.Conv2d(3, 5, 3), RELU, RELU),
    (nn.Conv2d(3, 5, 3, padding=1), RELU),
    (nn.Conv2d(3, 5, 3, padding=1), nn.MaxPool2d(3, ceil_mode=True), RELU),
    (nn.Conv2d(3, 5, (2, 4), padding="same", bias=False), RELU, nn.MaxPool2d(2, padding=1)),
    (nn.Conv2d(3, 5, (2, 3), (2, 1), (0, 2)), nn.Identity(), nn.MaxPool2d(2)),
    (nn.Conv2d(3, 5, 5, padding="valid"),),
    (nn.Conv2d(3, 5, 3, padding=1), nn.GELU(), nn.MaxPool2d(2)),
    (nn.Conv2d(3, 6, 3), nn.GroupNorm(2, 6), RELU),
    (nn.Flatten(), nn.Linear(3 * 6 * 7, 5), RELU),
    (nn.Flatten(), nn.Linear(3 * 6 * 7, 5, bias=False)),
]
LEFT = [
    (nn.Conv2d(3, 5, 3, dilation=2),),
    (nn.Conv2d(3, 5, 3, padding=1, padding_mode="circular"),),
    (nn.Conv2d(3, 5, 12, padding=6),),
    (nn.Conv2d(3, 5, 3), nn.Softmax2d()),
    (nn.Conv2d(3, 5, 3), RELU, nn.MaxPool2d(3, stride=2)),
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
        nn.Sequential(nn.Flatten(), nn.Dropout2d(), nn.Linear(24, 4)),
        nn.Sequential(nn.Flatten(), nn.Linear(24, 4), nn.Dropout()),
        nn.Sequential(nn.Flatten(), nn.Dropout(1.0), nn.Linear(24, 4)),
        nn.Sequential(nn.Flatten(), nn.Linear(24, 4).double()),
        nn.Sequential(nn.Linear(3, 4)),
        nn.Flatten(),
        nn.Sequential(),
    ],
)
def test_other_heads_are_left_to_pytorch(head):
    assert triton_head(head, RowsFirst(torch.randn(3, 2, 4, 2, 3)), 3) is None


def _cifar_4():
    """CIFAR-4, narrowed: 4 levels of 2 branches, a head of 2 layers."""
    architecture = lf.nets.cifar100(layers=4, width=1 / 16)
    net = architecture.net()
    features = architecture.channels[-1] * 4
    net.add_task(
        "a", nn.Sequential(nn.Flatten(), nn.Linear(features, 4), nn.ReLU(), nn.Linear(4, 3))
    )
    return net.to(memory_format=torch.channels_last)


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
    assert kernels.total() == 6 + 5 + 6


def test_the_plain_interpreter_gets_no_bfloat16(monkeypatch):
    """Without the sanitiser it takes 16 bits for a number, and a loss was 1e9 of 1."""
    monkeypatch.setattr(triton_backend, "_INTERPRETS_BFLOAT16", False)
    net, x, y = _cifar_4(), torch.randn(1, 3, 8, 8), torch.tensor([1])
    with launches() as counted, torch.autocast("cpu", torch.bfloat16):
        step = lf.LASEM(net, backend="triton")(x, y, "a")
        exact = lf.LASEM(net, backend="reference")(x, y, "a")
    assert not any("level" in name for name in counted.kernels)
    assert abs(step.loss - exact.loss) <= torch.finfo(torch.bfloat16).eps * exact.loss


def test_launches_of_a_whole_step(monkeypatch):
    """E-step, M-step, prior and optimiser, as on a device, where nothing waits for a value."""
    em = lf.LASEM(_cifar_4(), backend="triton")
    monkeypatch.setattr(em, "_reads_values", lambda x: False)
    monkeypatch.setattr(triton_scores, "_looked_at_first", lambda logits: False)
    optimizer = torch.optim.SGD(em.net.task_parameters("a"), lr=0.1, fused=True)
    x, y = torch.randn(2, 3, 8, 8), torch.tensor([0, 2])
    with pytest.warns(RuntimeWarning, match="runs eagerly"):
        step = lf.capture(em, optimizer, x, y, "a")
    for _ in range(2):  # the first step makes the prior's counts
        with launches() as counted:
            step(x, y)
    assert int(em._prior.states["a"].wins.sum()) == 2
    assert counted.kernels.total() <= 26, counted.kernels.most_common()


def test_launches_of_a_deep_step_with_skips(monkeypatch):
    """The residual net in 8 groups; launches do not depend on how many configurations there are."""
    architecture = lf.nets.residual17(8, width=1 / 64)
    net = architecture.net()
    net.add_task("a", nn.Sequential(nn.Flatten(), nn.Linear(architecture.channels[-1], 3)))
    ends = architecture.space().configs
    space = lf.ConfigSpace.from_configs([ends[0], ends[-1], ends[5]])
    em = lf.LASEM(net.to(memory_format=torch.channels_last), space, backend="triton")
    monkeypatch.setattr(em, "_reads_values", lambda x: False)
    monkeypatch.setattr(triton_scores, "_looked_at_first", lambda logits: False)
    optimizer = torch.optim.SGD(net.task_parameters("a"), lr=0.1, fused=True)
    x, y = torch.randn(1, 3, 16, 16), torch.tensor([2])
    for _ in range(2):
        optimizer.zero_grad()
        with launches() as counted:
            em(x, y, "a").loss.backward()
            optimizer.step()
    assert counted.kernels["level_forward_kernel"] == 17
    assert counted.kernels["score_linear_kernel"] == 1
    assert counted.kernels.total() <= 80, counted.kernels.most_common()


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


@pytest.mark.parametrize("case", [*map(draw, (4, 9, 16)), listed()], ids=[4, 9, 16, "listed"])
def test_gradients_of_gradients(case):
    case = case._replace(live=None)

    def both(output, leaves):
        first = torch.autograd.grad(
            output(leaves).square().sum(), leaves, create_graph=True, materialize_grads=True
        )
        loss = sum(g.square().sum() for g in first)
        second = torch.autograd.grad(loss, leaves, materialize_grads=True)
        return [*first, *second]

    def plain(leaves):
        return reference(case.with_leaves(leaves))

    got = both(lambda leaves: run(case, leaves), leaves_of(case))
    peer = both(plain, leaves_of(case))
    exact = both(plain, leaves_of(case, torch.float64))
    for a, b, want in zip(got, peer, exact, strict=True):
        # k = 2, or the rounding of the result itself
        allowed = max(2 * (b - want).norm(), torch.finfo(torch.float32).eps * want.norm())
        assert (a - want).norm() <= allowed
