"""The linear layer on channels-last images against PyTorch in float64 and float32."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from test_cpu_kernels import relative
from torch import nn

from lasem_fast.backends import cpu_head, plain_torch
from lasem_fast.backends import cpu_ops as ops
from lasem_fast.backends.head_front import head_front
from lasem_fast.levels.fold import RowsFirst

pytestmark = pytest.mark.skipif(not ops.supported(), reason=ops.why_unsupported())

linear = torch.ops.lasem_fast.channels_last_linear.default
linear_backward = torch.ops.lasem_fast.channels_last_linear_backward.default

NAMES = ("y", "dx", "dweight", "dbias")

# Error against float64 as a multiple of PyTorch's in float32.
ERROR_FACTOR = 2


def draw(rows, pixels, channels, outputs, dtype=torch.float32):
    """x, weight, bias and dy."""
    features = pixels * channels
    x = torch.randn(rows, pixels, channels, dtype=dtype)
    weight = torch.randn(outputs, features, dtype=dtype) / features**0.5
    bias, dy = torch.randn(outputs, dtype=dtype), torch.randn(rows, outputs, dtype=dtype)
    return x, weight, bias, dy


def plain(x, weight, bias):
    return F.linear(x.transpose(1, 2).flatten(1), weight, bias)


def with_gradients(f, x, weight, bias, dy):
    """The output of f, and the gradients of its arguments."""
    leaves = [t.detach().requires_grad_() for t in (x, weight, bias)]
    y = f(*leaves)
    return (y.detach(), *torch.autograd.grad(y, leaves, dy))


def poisoned(x, weight, bias, dy):
    """The operators' results, where whatever they do not write is NaN."""
    torch.use_deterministic_algorithms(True)  # fills what empty() returns with NaN
    ops._cpu.poison_outputs(True)
    try:
        return linear(x, weight, bias), *linear_backward(dy, x, weight, True)
    finally:
        ops._cpu.poison_outputs(False)
        torch.use_deterministic_algorithms(False)


def check_every_element(rows, pixels, channels, outputs, dtype):
    """Within n * eps / 2 of the sum of absolute terms: the bound of a sum of n in any order."""
    drawn = draw(rows, pixels, channels, outputs, dtype)
    got = poisoned(*drawn)
    wide = [t.double() for t in drawn]
    exact = with_gradients(plain, *wide)
    absolute = with_gradients(plain, *(t.abs() for t in wide))
    terms = (pixels * channels + 1, outputs, rows, rows)
    for name, a, want, size, n in zip(NAMES, got, exact, absolute, terms, strict=True):
        assert a.shape == want.shape and a.dtype == dtype, name
        # the float64 reference rounds, too
        bound = n * (torch.finfo(dtype).eps + torch.finfo(torch.float64).eps) / 2 * size
        assert bool(((a - want).abs() <= bound).all()), name


SIZES = st.one_of(st.integers(1, 9), st.integers(10, 70))


def ragged(test):
    """Runs a test on drawn shapes, and on those that every kernel has a tail or an edge for."""
    for shape in [(1, 1, 1, 1), (300, 16, 48, 33), (17, 1, 512, 10), (17, 512, 1, 10)]:
        test = example(*shape)(test)
    checks = [*settings.default.suppress_health_check, HealthCheck.function_scoped_fixture]
    test = given(st.integers(1, 150), SIZES, SIZES, SIZES)(test)
    return settings(max_examples=60, suppress_health_check=checks)(test)


@ragged
def test_every_element_in_float32(isa, rows, pixels, channels, outputs):
    check_every_element(rows, pixels, channels, outputs, torch.float32)


@ragged
def test_every_element_in_float64(rows, pixels, channels, outputs):
    check_every_element(rows, pixels, channels, outputs, torch.float64)


@pytest.mark.parametrize(
    "shape", [(160, 64, 64, 64), (160, 16, 256, 100), (640, 16, 128, 5), (33, 4, 16, 5)]
)
def test_error_is_at_most_twice_pytorchs(isa, shape):
    drawn = draw(*shape)
    got = poisoned(*drawn)
    exact = with_gradients(plain, *(t.double() for t in drawn))
    peer = with_gradients(plain, *drawn)
    for name, a, want, b in zip(NAMES, got, exact, peer, strict=True):
        error, peer_error = relative(a, want), relative(b, want)
        assert error <= ERROR_FACTOR * peer_error, (name, error / peer_error)


@pytest.mark.parametrize("shape", [(3, 4, 5, 2), (2, 1, 3, 3), (5, 3, 1, 1)])
def test_gradcheck(shape):
    leaves = [t.requires_grad_() for t in draw(*shape, torch.float64)[:3]]
    assert torch.autograd.gradcheck(ops.channels_last_linear, leaves)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_opcheck(dtype):
    x, weight, bias, dy = draw(5, 4, 3, 7, dtype)
    torch.library.opcheck(linear, (x, weight, bias))
    for need_dx in (True, False):
        torch.library.opcheck(linear_backward, (dy, x, weight, need_dx))


def test_compiles_as_one_graph():
    *leaves, dy = draw(5, 4, 3, 7)
    compiled = torch.compile(ops.channels_last_linear, fullgraph=True, backend="aot_eager")
    got = with_gradients(compiled, *leaves, dy)
    want = with_gradients(ops.channels_last_linear, *leaves, dy)
    assert all(map(torch.equal, got, want))


def test_same_bits_every_time_and_for_any_number_of_threads(isa):
    drawn = draw(150, 16, 40, 70)
    before = torch.get_num_threads()
    first = None
    try:
        for threads in (1, 2, 1, 2):
            torch.set_num_threads(threads)
            got = poisoned(*drawn)
            first = first or got
            assert all(map(torch.equal, got, first))
            # Whatever scratch holds next time must not matter.
            poisoned(*(torch.full_like(t, torch.nan) for t in drawn))
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, 1e38])
@pytest.mark.parametrize("rows", [[0], [3, 4, 5], [1, 39], [*range(40)]])
def test_rows_without_gradient_leave_no_trace(isa, bad, rows):
    x, weight, bias, dy = draw(40, 9, 10, 20)
    dy[rows] = 0
    clean = poisoned(x, weight, bias, dy)
    x[rows] = bad
    got = poisoned(x, weight, bias, dy)
    kept = [i for i in range(40) if i not in rows]
    assert torch.equal(got[0][kept], clean[0][kept])
    assert all(map(torch.equal, got[1:], clean[1:]))
    assert not got[1][rows].any()


def test_no_rows(isa):
    x, weight, bias, dy = draw(0, 4, 3, 5)
    y, dx, dweight, dbias = poisoned(x, weight, bias, dy)
    assert y.shape == (0, 5) and dx.shape == x.shape
    assert not dweight.any() and not dbias.any()


def test_only_the_gradients_that_are_wanted():
    x, weight, bias, _ = draw(5, 4, 3, 7)
    weight.requires_grad_()
    ops.channels_last_linear(x, weight, bias).sum().backward()
    assert x.grad is None and bias.grad is None
    want = x.transpose(1, 2).flatten(1).sum(0).expand(7, -1)
    torch.testing.assert_close(weight.grad, want)


GOOD = {"x": torch.zeros(5, 4, 3), "weight": torch.zeros(7, 12), "bias": torch.zeros(7)}


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("x", torch.zeros(5, 12), "x must have shape"),
        ("x", torch.zeros(5, 4, 3, dtype=torch.int64), "float32 or float64"),
        ("x", torch.zeros(5, 3, 4).transpose(1, 2), "x must be contiguous"),
        ("x", torch.zeros(5, 0, 3), "weight must have shape"),
        ("weight", torch.zeros(7, 4, 3), "weight must have shape"),
        ("weight", torch.zeros(7, 11), "weight must have shape"),
        ("weight", torch.zeros(7, 12, dtype=torch.float64), "weight must have dtype"),
        ("weight", torch.zeros(12, 7).t(), "weight must be contiguous"),
        ("weight", torch.zeros(0, 12), "weight must have at least one output"),
        ("bias", torch.zeros(8), "bias must have shape"),
    ],
)
def test_errors(name, value, message):
    with pytest.raises(RuntimeError, match=message):
        linear(*{**GOOD, name: value}.values())


def test_backward_errors():
    x, weight, _ = GOOD.values()
    with pytest.raises(RuntimeError, match="dy must have shape"):
        linear_backward(torch.zeros(5, 6), x, weight, True)
    with pytest.raises(RuntimeError, match="dy must have dtype"):
        linear_backward(torch.zeros(5, 7, dtype=torch.float64), x, weight, True)


def leaves_of(rows, samples, *image):
    """Leaves with rows outermost, and the same as a batch with rows outermost."""
    data = torch.randn(rows, samples, *image)
    return RowsFirst(data), data.permute(0, 1, 4, 2, 3).flatten(0, 1)


@pytest.mark.parametrize("bias", [True, False])
def test_head_goes_on_behind_the_linear_layer(bias):
    head = nn.Sequential(nn.Flatten(), nn.Linear(2 * 3 * 5, 7, bias=bias), nn.ReLU())
    head.append(nn.Linear(7, 4))
    h, folded = leaves_of(8, 3, 2, 3, 5)
    got = cpu_head.linear_head(head, h, 8)
    want = head(folded)
    assert got.shape == (24, 4)
    torch.testing.assert_close(got, want)
    parameters = list(head.parameters())
    for a, b in zip(*(torch.autograd.grad(o.square().sum(), parameters) for o in (got, want)),
                    strict=True):  # fmt: skip
        torch.testing.assert_close(a, b)


def test_other_heads_are_left_to_pytorch():
    h, folded = leaves_of(2, 3, 2, 2, 5)
    flatten, layer = nn.Flatten(), nn.Linear(20, 4)
    good = nn.Sequential(flatten, layer)
    assert cpu_head.linear_head(good, h, 2) is not None
    assert cpu_head.linear_head(good, folded, 2) is None
    assert cpu_head.linear_head(nn.Sequential(layer), h, 2) is None
    assert cpu_head.linear_head(nn.Sequential(flatten, nn.Linear(10, 4)), h, 2) is None
    assert cpu_head.linear_head(nn.Sequential(flatten, nn.Linear(20, 7)), h, 2) is None
    assert cpu_head.linear_head(good.double(), RowsFirst(h.data.double()), 2) is None
    assert cpu_head.linear_head(good, h, 2) is None
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert cpu_head.linear_head(good.float(), h, 2) is None


@pytest.mark.parametrize("where", [cpu_head.linear_head, plain_torch.channels_last_head])
def test_dropout_before_the_linear_layer_drops_what_pytorch_would(where):
    head = nn.Sequential(
        nn.Flatten(), nn.Identity(), nn.Dropout(0.3), nn.Linear(30, 7), nn.ReLU(), nn.Linear(7, 4)
    )
    h, _ = leaves_of(8, 3, 2, 3, 5)
    h.data.requires_grad_()
    found, states = [], []
    for run in (
        lambda: where(head, h, 8).unflatten(0, (8, 3)),
        lambda: head(h.folded()).unflatten(0, (3, 8)).transpose(0, 1),
    ):
        torch.manual_seed(5)
        logits = run()
        states.append(torch.get_rng_state())
        grads = torch.autograd.grad(logits.square().sum(), [h.data, *head.parameters()])
        found.append((logits, *grads))
    assert torch.equal(*states)
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b)


def test_what_overflowed_and_is_dropped_is_zero():
    h, _ = leaves_of(8, 3, 2, 3, 5)
    front = head_front(nn.Sequential(nn.Flatten(), nn.Dropout(0.3), nn.Linear(30, 7)), h, 8)
    h.data.fill_(torch.inf)
    images = front.images()
    assert set(images.unique().tolist()) == {0.0, torch.inf}


def test_a_head_that_is_refused_has_drawn_nothing():
    head = nn.Sequential(nn.Flatten(), nn.Dropout(0.3), nn.Linear(20, 4))
    h, _ = leaves_of(2, 3, 2, 2, 5)
    others = (
        nn.Sequential(nn.Flatten(), nn.Dropout(1.0), nn.Linear(20, 4)),
        nn.Sequential(nn.Flatten(), nn.AlphaDropout(0.3), nn.Linear(20, 4)),
        nn.Sequential(nn.Flatten(), nn.Dropout(0.3), nn.ReLU(), nn.Linear(20, 4)),
        nn.Sequential(nn.Dropout(0.3), nn.Flatten(), nn.Linear(20, 4)),
    )
    before = torch.get_rng_state()
    assert cpu_head.linear_head(head.double(), RowsFirst(h.data.double()), 2) is None
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert cpu_head.linear_head(head.float(), h, 2) is None
    for other in others:
        assert cpu_head.linear_head(other, h, 2) is None
    assert torch.equal(torch.get_rng_state(), before)
    head.eval()
    assert cpu_head.linear_head(head, h, 2) is not None
    assert torch.equal(torch.get_rng_state(), before)
