"""The CPU kernels against PyTorch in float64, and against the error of PyTorch in float32."""

from __future__ import annotations

import os
import random
import subprocess
import sys
import threading
from itertools import product

import pytest
import torch
import torch.nn.functional as F
from isas import has

from lasem_fast.backends import cpu_ops as ops

pytestmark = pytest.mark.skipif(not ops.supported(), reason=ops.why_unsupported())

level_op = torch.ops.lasem_fast.winograd_level.default
level_backward_op = torch.ops.lasem_fast.winograd_level_backward.default

# Error against float64 as a multiple of PyTorch's in float32, per filter and tile: y, dx, dweight,
# dbias. Measured at most (1.0, 0.5, 1.2, 1.1), (0.9, 1.1, 1.4, 1.1), (1.9, 3.5, 2.7, 1.1),
# (2.4, 4.5, 3.1, 0.7) and (3.2, 2.3, 4.2, 1.1).
ERROR_FACTOR = {
    (3, 1): (2, 2, 2, 2),
    (3, 2): (2, 2, 2, 2),
    (3, 3): (3, 5, 3, 2),
    (3, 4): (4, 6, 4, 2),
    (5, 2): (4, 4, 6, 2),
}
ALGORITHMS = list(ERROR_FACTOR)
# Filter, tile and pool for which no transform rounds the weight gradient; its factor is then 2.
BY_WINDOW = {(3, 2, 2), (3, 2, 3), (3, 3, 3), (3, 4, 3), (5, 2, 2), (5, 2, 3)}
# Images that are one tile of three products a side; measured at most (1.6, 1.3, 1.1, 1.2).
SMALL = [(2, 2), (1, 2), (2, 1), (1, 1)]
SMALL_ERROR_FACTOR = (2, 2, 2, 2)


def every_row(x, weight):
    """Parents and branches of a full level, branch innermost."""
    prefixes, branches = x.shape[0], weight.shape[0]
    return torch.arange(prefixes).repeat_interleave(branches), torch.arange(branches).repeat(
        prefixes
    )


def level(x, weight, bias, *sizes):
    """The full level [P, G, N, h, w, Co] and its code; see test_level_rows.py for other lists."""
    parameters, rows = (list(weight), list(bias)), every_row(x, weight)
    outputs = level_op(x, *parameters, *rows, None, None, *sizes, True, False)
    return tuple(t.unflatten(0, (x.shape[0], weight.shape[0])) for t in outputs)


def level_backward(dy, x, code, weight, *sizes):
    """dx, and the branches' dweight and dbias as one tensor each."""
    dy, code, rows = dy.flatten(0, 1), code.flatten(0, 1), every_row(x, weight)
    dx, *grads = level_backward_op(dy, x, code, list(weight), *rows, None, *sizes, True)
    return dx, *map(torch.stack, grads)


def full_level(x, weight, bias, **sizes):
    """The autograd function on the full level, [P, G, N, h, w, Co]."""
    parents, branches = every_row(x, weight)
    rows = {"parents": parents, "branches": branches}
    y = ops.winograd_level(x, list(weight), list(bias), **rows, **sizes)
    return y.unflatten(0, (x.shape[0], weight.shape[0]))


def conv(x, weight, bias, padding):
    """[P, N, H, W, C] -> convolution [P * N, G * Co, H', W']."""
    images = x.flatten(0, 1).permute(0, 3, 1, 2)
    return F.conv2d(images, weight.flatten(0, 1), bias.flatten(), padding=padding)


def conv_size(x, weight, padding):
    return [n + 2 * padding - weight.shape[-1] + 1 for n in x.shape[2:4]]


def as_level(z, x, weight):
    """[P * N, G * Co, h, w] -> [P, G, N, h, w, Co]."""
    prefixes, samples = x.shape[:2]
    z = z.reshape(prefixes, samples, weight.shape[0], weight.shape[1], *z.shape[2:])
    return z.permute(0, 2, 1, 4, 5, 3)


def reference(x, weight, bias, padding, pool, pool_pad, out_h, out_w):
    z = conv(x, weight, bias, padding).relu()
    if pool > 1:
        after = [
            max(0, n * pool - pool_pad - m)
            for n, m in zip((out_h, out_w), z.shape[2:], strict=True)
        ]
        z = F.pad(z, (pool_pad, after[1], pool_pad, after[0]), value=-torch.inf)
        z = F.max_pool2d(z, pool)[:, :, :out_h, :out_w]
    return as_level(z, x, weight)


def gradients_at_code(dy, x, code, weight, padding, pool, pool_pad):
    """PyTorch's gradients of one level where `code`, not activations, opens ReLU and pool."""
    prefixes, branches, samples, out_h, out_w, channels = dy.shape
    height, width = conv_size(x, weight, padding)
    size = (prefixes, samples, branches, channels, out_h * pool, out_w * pool)
    dz = dy.new_zeros(size)
    for position in range(pool * pool):
        at = (..., slice(position // pool, None, pool), slice(position % pool, None, pool))
        dz[at] = torch.where(code == position, dy, 0).permute(0, 2, 1, 5, 3, 4)
    inside = (slice(pool_pad, pool_pad + height), slice(pool_pad, pool_pad + width))
    dz = dz[(..., *inside)].flatten(0, 1).flatten(1, 2)
    dz = F.pad(dz, (0, width - dz.shape[3], 0, height - dz.shape[2]))
    leaves = [x.detach().requires_grad_(), weight.detach().requires_grad_()]
    bias = dy.new_zeros(branches, channels, requires_grad=True)
    return torch.autograd.grad(conv(*leaves, bias, padding), [*leaves, bias], dz)


def draw(seed, dtype, filter_size=3, channels=(1, 3, 5, 16, 31, 32, 33, 64, 100), side=40):
    """A drawn level: tensors, and the integers of the operator with the tile last."""
    pick = random.Random(seed)
    torch.manual_seed(seed)
    prefixes, samples, branches = pick.randint(1, 5), pick.randint(1, 3), pick.randint(1, 3)
    c, co = pick.choice(channels), pick.choice(channels)
    padding, pool = pick.randint(0, filter_size - 1), pick.randint(1, 3)
    pool_pad = pick.randint(0, pool // 2)
    height, width = (
        max(pick.choice([pick.randint(3, side), pick.randint(1, 6)]), filter_size - 2 * padding)
        for _ in range(2)
    )
    x = torch.randn(prefixes, samples, height, width, c, dtype=dtype)
    weight = torch.randn(branches, co, c, filter_size, filter_size, dtype=dtype)
    weight /= filter_size * c**0.5
    bias = torch.randn(branches, co, dtype=dtype) / 10
    out = []
    for n in conv_size(x, weight, padding):
        floor, ceil = (n + 2 * pool_pad - pool) // pool + 1, (n - 1 + pool_pad) // pool + 1
        out.append(pick.choice([max(1, min(floor, ceil)), ceil]))
    tile = pick.choice([tile for r, tile in ALGORITHMS if r == filter_size])
    return (x, weight, bias), (padding, pool, pool_pad, *out, tile)


def relative(a, b):
    return ((a - b).norm() / b.norm().clamp_min(1e-300)).item()


def exact_and_plain(x, weight, bias, dy, code, sizes):
    """PyTorch's y, dx, dweight and dbias in float64 and in float32."""
    return (
        (
            reference(x.to(dtype), weight.to(dtype), bias.to(dtype), *sizes),
            *gradients_at_code(dy.to(dtype), x.to(dtype), code, weight.to(dtype), *sizes[:3]),
        )
        for dtype in (torch.float64, torch.float32)
    )


def assert_few_times_the_error(got, exact, plain, factors):
    """Of y, dx, dweight and dbias: at most so many times PyTorch's error in float32."""
    names = ("y", "dx", "dweight", "dbias")
    for name, ours, want, peer, k in zip(names, got, exact, plain, factors, strict=True):
        error, peer_error = relative(ours, want), relative(peer, want)
        assert error <= k * peer_error, f"{name}: {error / peer_error:.1f} times PyTorch's error"


@pytest.mark.parametrize("filter_size", [3, 5])
@pytest.mark.parametrize("seed", range(60))
def test_float64_equals_pytorch(schedule, seed, filter_size):
    tensors, sizes = draw(seed, torch.float64, filter_size, side=24)
    padding, pool, pool_pad, out_h, out_w, tile = sizes
    leaves = [t.clone().requires_grad_() for t in tensors]
    expected = reference(*leaves, padding, pool, pool_pad, out_h, out_w)
    dy = torch.randn_like(expected)
    expected_grads = torch.autograd.grad(expected, leaves, dy)
    y = full_level(
        *leaves, padding=padding, pool=pool, pool_pad=pool_pad, out_size=(out_h, out_w), tile=tile
    )
    grads = torch.autograd.grad(y, leaves, dy)
    torch.testing.assert_close(y, expected, rtol=1e-11, atol=1e-12)
    for got, want in zip(grads, expected_grads, strict=True):
        assert relative(got, want) < 1e-12


@pytest.mark.parametrize("algorithm", ALGORITHMS)
@pytest.mark.parametrize("pool", [1, 2, 3])
def test_input_gradient_at_every_border(schedule, algorithm, pool):
    """Patches overlap: the first to write a pixel stores, the others add, however tiles are cut."""
    torch.manual_seed(0)
    filter_size, tile = algorithm
    weight = torch.randn(2, 3, 5, filter_size, filter_size, dtype=torch.float64)
    bias = torch.zeros(2, 3, dtype=torch.float64)
    for side, padding, pool_pad in product(range(1, 14), range(filter_size), range(pool // 2 + 1)):
        x = torch.randn(1, 2, side, 14 - side, 5, dtype=torch.float64)
        size = conv_size(x, weight, padding)
        if min(size) < 1:
            continue
        out = [(n - 1 + pool_pad) // pool + 1 for n in size]
        y, code = level(x, weight, bias, padding, pool, pool_pad, *out, tile)
        dy = torch.randn_like(y)
        ops._cpu.poison_outputs(True)
        try:
            dx, *_ = level_backward(dy, x, code, weight, padding, pool, pool_pad, tile, True)
        finally:
            ops._cpu.poison_outputs(False)
        want, *_ = gradients_at_code(dy, x, code, weight, padding, pool, pool_pad)
        assert relative(dx, want) < 1e-12, (side, padding, pool_pad)


@pytest.mark.parametrize("filter_size", [3, 5])
@pytest.mark.parametrize("seed", range(60))
def test_float32_ragged_shapes(isa, schedule, seed, filter_size):
    """Every element against float64, outputs poisoned; the error bound is that of whole levels."""
    tensors, sizes = draw(seed, torch.float32, filter_size)
    padding, pool, pool_pad, _out_h, _out_w, tile = sizes
    torch.use_deterministic_algorithms(True)  # fills what empty() returns with NaN
    ops._cpu.poison_outputs(True)
    try:
        y, code = level(*tensors, *sizes)
        dy = torch.randn_like(y)
        grads = level_backward(
            dy, tensors[0], code, tensors[1], padding, pool, pool_pad, tile, True
        )
    finally:
        ops._cpu.poison_outputs(False)
        torch.use_deterministic_algorithms(False)
    wide = [t.double() for t in tensors]
    want = reference(*wide, *sizes[:5])
    wants = gradients_at_code(dy.double(), wide[0], code, wide[1], padding, pool, pool_pad)
    for got, exact in zip((y, *grads), (want, *wants), strict=True):
        assert got.shape == exact.shape
        assert relative(got, exact) < 1e-5
    torch.testing.assert_close(y.double(), want, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("algorithm", ALGORITHMS)
@pytest.mark.parametrize("pool", [1, 2, 3])
@pytest.mark.parametrize("channels", [3, 33, 64])
def test_float32_error(isa, schedule, algorithm, pool, channels):
    torch.manual_seed(channels + pool)
    filter_size, tile = algorithm
    x = torch.randn(2, 2, 24, 24, channels).relu()
    weight = torch.randn(2, 64, channels, filter_size, filter_size)
    weight /= filter_size * channels**0.5
    bias = torch.randn(2, 64) / 10
    sizes = (filter_size // 2, pool, 0, 24 // pool, 24 // pool)
    y, code = level(x, weight, bias, *sizes, tile)
    dy = torch.randn_like(y)
    grads = level_backward(dy, x, code, weight, *sizes[:3], tile, True)
    exact, plain = exact_and_plain(x, weight, bias, dy, code, sizes)
    factors = ERROR_FACTOR[(3, 1) if filter_size == 3 and channels <= 4 else algorithm]
    if (*algorithm, pool) in BY_WINDOW:
        factors = (*factors[:2], 2, factors[3])
    assert_few_times_the_error((y, *grads), exact, plain, factors)


@pytest.mark.parametrize(("height", "width"), SMALL)
@pytest.mark.parametrize("pool", [1, 2, 3])
def test_small_images_equal_pytorch(schedule, height, width, pool):
    """Where the border is all that F(2x2, 3x3) would read beside the pixels."""
    torch.manual_seed(height + width)
    leaves = [
        torch.randn(shape, dtype=torch.float64, requires_grad=True)
        for shape in [(3, 5, height, width, 9), (2, 7, 9, 3, 3), (2, 7)]
    ]
    out = tuple(-(-n // pool) for n in (height, width))
    want = reference(*leaves, 1, pool, 0, *out)
    got = full_level(*leaves, padding=1, pool=pool, out_size=out)
    torch.testing.assert_close(got, want, rtol=1e-11, atol=1e-12)
    dy = torch.randn_like(want)
    grads = (torch.autograd.grad(y, leaves, dy) for y in (got, want))
    for ours, pytorch in zip(*grads, strict=True):
        assert relative(ours, pytorch) < 1e-12


@pytest.mark.parametrize(("height", "width"), SMALL)
@pytest.mark.parametrize("channels", [5, 33, 128])
def test_float32_error_of_small_images(isa, schedule, height, width, channels):
    torch.manual_seed(channels)
    x = torch.randn(2, 40, height, width, channels).relu()
    weight = torch.randn(2, 70, channels, 3, 3) / (3 * channels**0.5)
    bias = torch.randn(2, 70) / 10
    sizes = (1, 1, 0, height, width)
    ops._cpu.poison_outputs(True)
    try:
        y, code = level(x, weight, bias, *sizes, 2)
        dy = torch.randn_like(y)
        grads = level_backward(dy, x, code, weight, *sizes[:3], 2, True)
    finally:
        ops._cpu.poison_outputs(False)
    exact, plain = exact_and_plain(x, weight, bias, dy, code, sizes)
    assert_few_times_the_error((y, *grads), exact, plain, SMALL_ERROR_FACTOR)


@pytest.mark.parametrize("algorithm", ALGORITHMS)
@pytest.mark.parametrize(("pool", "pool_pad", "size"), [(1, 0, 5), (2, 1, 3), (3, 1, 2)])
def test_gradcheck(algorithm, pool, pool_pad, size):
    torch.manual_seed(0)
    filter_size, tile = algorithm
    leaves = [
        torch.randn(shape, dtype=torch.float64, requires_grad=True)
        for shape in [(1, 2, 5, 5, 5), (2, 2, 5, filter_size, filter_size), (2, 2)]
    ]

    def f(x, weight, bias):
        return full_level(
            x,
            weight,
            bias,
            padding=filter_size // 2,
            pool=pool,
            pool_pad=pool_pad,
            out_size=(size, size),
            tile=tile,
        )

    assert torch.autograd.gradcheck(f, leaves)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(("filter_size", "tile"), [(3, 4), (5, 2)])
def test_opcheck_of_levels(dtype, filter_size, tile):
    torch.manual_seed(0)
    x = torch.randn(2, 2, 6, 7, 5, dtype=dtype)
    weights = [torch.randn(3, 5, filter_size, filter_size, dtype=dtype) for _ in range(2)]
    biases = [torch.randn(3, dtype=dtype) for _ in range(2)]
    padding = filter_size // 2
    rows = torch.tensor([1, 0, 0]), torch.tensor([1, 0, 1])
    height, width = (n + 2 * padding - filter_size + 1 for n in x.shape[2:4])
    skip = torch.randn(2, 2, height, width, 3, dtype=dtype), torch.tensor([1, 0, 1])
    for tail in ((*skip, padding, 2, 0, 3, 3, tile, True, True),
                 (None, None, padding, 2, 0, 3, 3, tile, True, False)):  # fmt: skip
        torch.library.opcheck(level_op, (x, weights, [], *rows, *tail))
        torch.library.opcheck(level_op, (x, weights, biases, *rows, *tail))
        y, code = level_op(x, weights, biases, *rows, *tail)
    dy = torch.randn_like(y)
    for needs, live in (
        ((True, True), None),
        ((True, False), None),
        ((False, True), torch.tensor([True, False, True])),
    ):
        torch.library.opcheck(
            level_backward_op,
            (dy, x, code, weights, *rows, live, padding, 2, 0, tile, *needs),
        )
        torch.library.opcheck(
            torch.ops.lasem_fast.winograd_level_skip_backward.default,
            (dy, code, skip[1], live, 2, height, width, 2, 0),
        )


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_opcheck_of_the_posterior_head(dtype):
    torch.manual_seed(0)
    logits, labels = torch.randn(4, 5, 3, dtype=dtype), torch.tensor([0, 1, 2, 0, 1])
    head = torch.ops.lasem_fast.posterior_head.default
    torch.library.opcheck(head, (logits, labels, torch.zeros(4, dtype=dtype), 0))
    backward = torch.ops.lasem_fast.posterior_head_backward.default
    torch.library.opcheck(backward, (logits, torch.rand(4, dtype=dtype)))


@pytest.mark.parametrize("pool", [2, 3])
@pytest.mark.parametrize("seed", range(3))
def test_code_breaks_ties_as_pytorch(isa, pool, seed):
    """Small integers: every sum is exact, and windows are full of ties, at zero too."""
    torch.manual_seed(seed)
    x = torch.randint(-1, 2, (2, 2, 12, 12, 3)).float()
    weight = torch.randint(-1, 2, (2, 20, 3, 3, 3)).float()
    bias = torch.zeros(2, 20)
    n = 12 // pool
    y, code = level(x, weight, bias, 1, pool, 0, n, n, 1)
    z = conv(x, weight, bias, 1).relu()
    want, index = F.max_pool2d(z, pool, return_indices=True)
    row, column = index // 12 % pool, index % 12 % pool
    want_code = torch.where(want > 0, row * pool + column, 255).to(torch.uint8)
    assert torch.equal(y, as_level(want, x, weight))
    assert torch.equal(code, as_level(want_code, x, weight))


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, 1e38])
@pytest.mark.parametrize("algorithm", ALGORITHMS)
@pytest.mark.parametrize("pool", [1, 2, 3])
def test_bad_sample_stays_alone(isa, schedule, bad, algorithm, pool):
    torch.manual_seed(0)
    filter_size, tile = algorithm
    padding = filter_size // 2
    x = torch.randn(2, 3, 11, 11, 20)
    weight, bias = torch.randn(2, 20, 20, filter_size, filter_size), torch.randn(2, 20)
    n = -(-11 // pool)
    sizes = (padding, pool, 0, n, n, tile)
    y, code = level(x, weight, bias, *sizes)
    poisoned = x.clone()
    poisoned[1, 1, 4:7] = bad
    bad_y, bad_code = level(poisoned, weight, bias, *sizes)
    others = torch.ones(2, 3, dtype=torch.bool)
    others[1, 1] = False
    assert torch.equal(bad_y.transpose(1, 2)[others], y.transpose(1, 2)[others])
    assert torch.equal(bad_code.transpose(1, 2)[others], code.transpose(1, 2)[others])
    nan = reference(poisoned, weight, bias, *sizes[:5]).isnan()
    assert bad_y[nan].isnan().all()

    # A configuration that is left out sends exactly zero: the sample must leave no trace.
    dy = torch.randn_like(y)
    dy[1, :, 1] = 0
    ints = (padding, pool, 0, tile, True)
    grads = level_backward(dy, poisoned, bad_code, weight, *ints)
    clean = level_backward(dy, x, code, weight, *ints)
    for got, want in zip(grads, clean, strict=True):
        assert torch.equal(got, want)


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize(
    ("filter_size", "tile", "pool"), [(3, 4, 2), (3, 4, 3), (5, 2, 1), (5, 2, 3)]
)
def test_same_bits_every_time(isa, schedule, threads, filter_size, tile, pool):
    torch.manual_seed(pool)
    weight = torch.randn(2, 17, 33, filter_size, filter_size) / 10
    tensors = (torch.randn(2, 3, 20, 23, 33), weight, torch.randn(2, 17))
    padding, pool_pad = filter_size // 2, 0
    out = [n // pool for n in tensors[0].shape[2:4]]
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        dy, first = None, None
        for _ in range(5):
            y, code = level(*tensors, padding, pool, pool_pad, *out, tile)
            dy = torch.randn_like(y) if dy is None else dy
            grads = level_backward(
                dy, tensors[0], code, tensors[1], padding, pool, pool_pad, tile, True
            )
            first = first or (y, code, *grads)
            assert all(torch.equal(a, b) for a, b in zip(first, (y, code, *grads), strict=True))
            # Whatever scratch holds next time must not matter.
            poison = torch.full_like(tensors[0], torch.nan)
            level(poison, *tensors[1:], padding, pool, pool_pad, *out, tile)
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize(("channels", "pool"), [(32, 1), (48, 2), (64, 3)])
def test_outputs_larger_than_the_caches(isa, channels, pool):
    """They are stored past the caches; each image is as if it had come alone."""
    torch.manual_seed(pool)
    x, bias = torch.randn(2, 12, 33, 35, 20), torch.randn(2, channels)
    weight = torch.randn(2, channels, 20, 3, 3) / 10
    out = [-(-n // pool) for n in x.shape[2:4]]
    outputs = level(x, weight, bias, 1, pool, 0, *out, 4)
    assert outputs[0].nbytes > 1 << 20
    for i in range(x.shape[1]):
        alone = level(x[:, i : i + 1].contiguous(), weight, bias, 1, pool, 0, *out, 4)
        assert all(torch.equal(a[:, :, i : i + 1], b) for a, b in zip(outputs, alone, strict=True))


@pytest.mark.parametrize("algorithm", ALGORITHMS)
@pytest.mark.parametrize("pool", [1, 2, 3])
def test_without_input_gradient(isa, schedule, algorithm, pool):
    filter_size, tile = algorithm
    torch.manual_seed(pool)
    x, weight = torch.randn(2, 3, 11, 14, 19), torch.randn(2, 17, 19, filter_size, filter_size)
    out = [-(-n // pool) for n in x.shape[2:4]]
    y, code = level(x, weight, torch.randn(2, 17), filter_size // 2, pool, 0, *out, tile)
    dy = torch.randn_like(y)
    with_dx, without = (
        level_backward(dy, x, code, weight, filter_size // 2, pool, 0, tile, need_dx)
        for need_dx in (True, False)
    )
    assert without[0].numel() == 0
    assert all(torch.equal(a, b) for a, b in zip(with_dx[1:], without[1:], strict=True))


def test_concurrent_calls(isa):
    (x, weight, bias), _ = draw(1, torch.float32, channels=(32,), side=24)
    sizes = (1, 1, 0, *x.shape[2:4], 4)
    want = level(x, weight, bias, *sizes)[0]
    got = [None] * 4

    def work(i):
        for _ in range(10):
            got[i] = level(x, weight, bias, *sizes)[0]

    threads = [threading.Thread(target=work, args=(i,)) for i in range(4)]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    assert all(torch.equal(g, want) for g in got)
    assert ops.clear_scratch() > 0
    assert ops.clear_scratch() == 0


def test_empty_batch(isa):
    x, weight, bias = torch.randn(2, 0, 6, 6, 8), torch.randn(2, 4, 8, 3, 3), torch.randn(2, 4)
    leaves = [t.requires_grad_() for t in (x, weight, bias)]
    y = full_level(*leaves, padding=1)
    assert y.shape == (2, 2, 0, 6, 6, 4)
    y.sum().backward()
    assert x.grad.shape == x.shape
    assert not weight.grad.any() and not bias.grad.any()


def test_no_input_gradient(isa):
    (x, weight, bias), _ = draw(3, torch.float32)
    weight.requires_grad_()
    full_level(x, weight, bias, padding=1).sum().backward()
    assert x.grad is None and weight.grad.isfinite().all()


@pytest.mark.parametrize(
    ("filter_size", "side", "tile"),
    [(3, 1, 2), (3, 2, 2), (3, 3, 3), (3, 4, 4), (3, 6, 3), (3, 8, 4), (3, 32, 4), (5, 9, 2)],
)
def test_the_tile_of_fewest_products_is_the_default(filter_size, side, tile):
    (_, weight, bias), _ = draw(3, torch.float32, filter_size, channels=(8,))
    x, padding = torch.randn(1, 2, side, side, 8), filter_size // 2
    want = level(x, weight, bias, padding, 1, 0, *x.shape[2:4], tile)[0]
    assert torch.equal(full_level(x, weight, bias, padding=padding), want)


GOOD = {
    "x": torch.zeros(1, 2, 6, 6, 8),
    "weights": [torch.zeros(4, 8, 3, 3)] * 2,
    "biases": [torch.zeros(4)] * 2,
    "parents": torch.zeros(2, dtype=torch.int64),
    "branches": torch.arange(2),
    "skip": None,
    "skip_rows": None,
    "padding": 1,
    "pool": 2,
    "pool_pad": 0,
    "out_h": 3,
    "out_w": 3,
    "tile": 4,
    "relu": True,
    "relu_after": False,
}


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("x", torch.zeros(2, 6, 6, 8), "x must have shape"),
        ("x", torch.zeros(1, 2, 6, 6, 8, dtype=torch.int64), "float32 or float64"),
        ("x", torch.zeros(1, 2, 6, 8, 6).transpose(3, 4), "x must be contiguous"),
        ("weights", [], "weights must have at least one branch"),
        ("weights", [torch.zeros(4, 8, 9)] * 2, r"weights\[0\] must have shape \(Co, C, R, R\)"),
        ("weights", [torch.zeros(4, 8, 7, 7)] * 2, r"weights\[0\] must have filters .*, got 7"),
        ("weights", [torch.zeros(4, 8, 5, 3)] * 2, r"weights\[0\] must have shape"),
        ("weights", [torch.zeros(4, 8, 5, 5)] * 2, "tile must be 2 for filters of 5 x 5, got 4"),
        ("weights", [torch.zeros(4, 7, 3, 3)] * 2, r"weights\[0\] must have shape"),
        ("weights", [torch.zeros(4, 8, 3, 3).double()] * 2, r"weights\[0\] must have dtype"),
        (
            "weights",
            [torch.zeros(4, 8, 3, 3), torch.zeros(5, 8, 3, 3)],
            r"weights\[1\] must have shape \(4, 8, 3, 3, \), got \(5, 8, 3, 3, \)",
        ),
        (
            "weights",
            [torch.zeros(4, 8, 3, 3), torch.zeros(4, 8, 3, 3).transpose(2, 3)],
            r"weights\[1\] must be contiguous",
        ),
        ("weights", [torch.zeros(0, 8, 3, 3)] * 2, "weights must have at least one output"),
        ("biases", [torch.zeros(4)], "biases must be none or one for each of the 2 branches, got"),
        ("biases", [torch.zeros(5)] * 2, r"biases\[0\] must have shape"),
        ("biases", [torch.zeros(4), torch.zeros(4).double()], r"biases\[1\] must have dtype"),
        ("parents", torch.zeros(2), "parents must have dtype"),
        ("parents", torch.zeros(1, 2).long(), r"parents must have shape \(R,\), got 2 dim"),
        ("parents", torch.tensor([0, 1]), "parents must be from 0 to 0, got 1 for row 1"),
        ("branches", torch.tensor([0, -1]), "branches must be from 0 to 1, got -1 for row 1"),
        ("branches", torch.zeros(3).long(), "branches must have shape"),
        ("branches", torch.ones(2).long(), "each pair once, got parent 0 through branch 1 as rows"),
        ("skip", torch.zeros(2, 2, 6, 6, 5), "skip must have shape"),
        ("skip", torch.zeros(2, 6, 6, 4), r"skip must have shape \(S, N, conv_h, conv_w, Co\)"),
        ("skip", torch.zeros(3, 2, 6, 6, 4), "skip must have shape"),
        ("skip_rows", torch.zeros(2).long(), "skip_rows must come with skip"),
        ("padding", 3, "padding must be from 0 to 2, got 3"),
        ("padding", -1, "padding must be from 0 to 2, got -1"),
        ("pool", 4, "pool must be 1, 2 or 3, got 4"),
        ("pool_pad", 2, "pool_pad must be"),
        ("out_h", 4, "out_h must be"),
        ("out_h", 2**62, "out_h must be"),
        ("out_w", 2**63 - 1, "out_w must be"),
        ("out_w", 0, "out_w must be"),
        ("out_w", 2**62, "out_w must be"),
        ("tile", 5, "tile must be"),
    ],
)
def test_level_errors(name, value, message):
    with pytest.raises(RuntimeError, match=message):
        level_op(*{**GOOD, name: value}.values())


def test_backward_errors():
    x, weights = GOOD["x"], GOOD["weights"]
    y, code = level_op(*GOOD.values())
    rows = GOOD["parents"], GOOD["branches"]
    with pytest.raises(RuntimeError, match="dy must have shape"):
        level_backward_op(y[:1], x, code, weights, *rows, None, 1, 2, 0, 4, True, True)
    with pytest.raises(RuntimeError, match="code must have dtype"):
        level_backward_op(y, x, y, weights, *rows, None, 1, 2, 0, 4, True, True)
    live = torch.ones(3, dtype=torch.bool)
    skip = torch.zeros(3, 2, 6, 6, 4)
    with pytest.raises(RuntimeError, match="skip_rows must be from 0 to 2, got 3 for row 1"):
        level_op(*{**GOOD, "skip": skip, "skip_rows": torch.tensor([0, 3])}.values())
    with pytest.raises(RuntimeError, match="live must have shape"):
        level_backward_op(y, x, code, weights, *rows, live, 1, 2, 0, 4, True, True)


@pytest.mark.parametrize(
    ("value", "want"), [("avx2", "avx2"), ("avx512", "avx512"), ("sse9", None)]
)
def test_environment_chooses(value, want):
    if want and not has(want):
        pytest.skip(f"this CPU has no {want}")
    code = (
        "from lasem_fast.backends import cpu_ops as ops; "
        "print(ops.isa(), ops.supported(), ops.why_unsupported())"
    )
    out = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, "LASEM_FAST_CPU_ISA": value},
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    assert out.startswith(f"{want} {want is not None}")
    assert ("LASEM_FAST_CPU_ISA" in out) == (want is None)


def test_force_isa_refuses():
    with pytest.raises(ValueError, match="sse9"):
        ops.force_isa("sse9")


def test_force_schedule_refuses():
    with pytest.raises(ValueError, match="got by row"):
        ops._cpu.force_schedule("by row")


def head_reference(logits, labels, log_prior, mean):
    log_p = torch.log_softmax(logits, 2).gather(2, labels[None, :, None].expand(len(logits), -1, 1))
    log_p = log_p.squeeze(2)
    samples = log_p.new_tensor(log_p.shape[1])
    likelihood = log_p.logsumexp(1) - samples.log() if mean else log_p.sum(1)
    posterior = torch.softmax(log_prior + likelihood, 0)
    nll = -log_p.mean(1)
    return likelihood, posterior, nll, (posterior.detach() * nll).sum()


@pytest.mark.parametrize("mean", [False, True])
@pytest.mark.parametrize("shape", [(1, 1, 1), (4, 3, 2), (16, 10, 10), (64, 7, 100)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_posterior_head(mean, shape, dtype):
    torch.manual_seed(0)
    logits = (torch.randn(shape, dtype=dtype) * 2).requires_grad_()
    labels = torch.randint(0, shape[2], shape[1:2])
    log_prior = torch.randn(shape[0], dtype=dtype).log_softmax(0)
    if shape[0] > 1:
        log_prior[0] = -torch.inf
    got = ops.posterior_head(logits, labels, log_prior, mean_likelihood=mean)
    wide = logits.detach().double().requires_grad_()
    want = head_reference(wide, labels, log_prior.double(), mean)
    tolerance = 1e-12 if dtype == torch.float64 else 1e-6
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a.double(), b, rtol=tolerance, atol=tolerance)
    (grad,) = torch.autograd.grad(got[3] * 3, logits)
    (want_grad,) = torch.autograd.grad(want[3] * 3, wide)
    torch.testing.assert_close(grad.double(), want_grad, rtol=tolerance, atol=tolerance)
    if shape[0] > 1:
        assert got[1][0] == 0 and not grad[0].any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_nll_has_a_gradient_for_other_weights(dtype):
    """Alone, beside the loss, and where nothing of a configuration may be read."""
    torch.manual_seed(0)
    logits = torch.randn(5, 4, 3, dtype=dtype)
    labels, prior = torch.tensor([0, 1, 2, 0]), torch.zeros(5, dtype=dtype)
    weights = torch.tensor([0.5, 0.0, -0.2, 0.0, 1e-3], dtype=dtype)
    leaf, wide = (logits.detach().to(t, copy=True).requires_grad_() for t in (dtype, torch.double))
    got = ops.posterior_head(leaf, labels, prior, nll_grad=True)
    want = head_reference(wide, labels, prior.double(), False)
    tolerance = 1e-12 if dtype == torch.float64 else 1e-6
    for with_loss in (0, 3):
        (grad,) = torch.autograd.grad(
            (weights * got[2]).sum() + with_loss * got[3], leaf, retain_graph=True
        )
        (exact,) = torch.autograd.grad(
            (weights.double() * want[2]).sum() + with_loss * want[3], wide, retain_graph=True
        )
        torch.testing.assert_close(grad.double(), exact, rtol=tolerance, atol=tolerance)
    logits[3] = torch.nan
    leaf = logits.requires_grad_()
    nll = ops.posterior_head(leaf, labels, prior, nll_grad=True)[2]
    nll.backward(weights)
    assert leaf.grad.isfinite().all() and not leaf.grad[[1, 3]].any()
    assert not ops.posterior_head(leaf, labels, prior)[2].requires_grad


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((torch.zeros(2, 3), torch.zeros(2)), "residual must have shape"),
        ((torch.zeros(2, 0, 4), torch.zeros(2)), "residual must not be empty"),
        ((torch.zeros(2, 3, 4), torch.zeros(3)), "weights must have shape"),
        ((torch.zeros(2, 3, 4), torch.zeros(2).double()), "weights must have dtype"),
    ],
)
def test_posterior_head_backward_errors(arguments, message):
    with pytest.raises(RuntimeError, match=message):
        torch.ops.lasem_fast.posterior_head_backward.default(*arguments)


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
def test_posterior_head_masks_bad_configurations(bad):
    torch.manual_seed(0)
    logits = torch.randn(5, 4, 3)
    labels = torch.tensor([0, 1, 2, 0])
    prior = torch.zeros(5)
    logits[2, 1, labels[1]] = bad
    leaf = logits.clone().requires_grad_()
    likelihood, posterior, nll, loss = ops.posterior_head(leaf, labels, prior)
    loss.backward()
    keep = [0, 1, 3, 4]
    want = ops.posterior_head(logits[keep], labels, prior[keep])
    assert likelihood[2] == -torch.inf and nll[2] == torch.inf and posterior[2] == 0
    assert not leaf.grad[2].any() and leaf.grad.isfinite().all()
    torch.testing.assert_close(posterior[keep], want[1])
    assert loss.isnan() and want[3].isfinite()


def test_gradients_that_fall_below_the_smallest_normal_number_are_zero():
    """Many CPUs are slow at such numbers; PyTorch's own operators still have them."""
    logits = torch.zeros(2, 3, 4, requires_grad=True)
    labels, small = torch.zeros(3, dtype=torch.int64), torch.tensor(1e-39)
    _, posterior, _, loss = ops.posterior_head(logits, labels, torch.tensor([0.0, -89.0]))
    loss.backward()
    assert 0 < posterior[1] < torch.finfo(torch.float32).tiny and not logits.grad[1].any()
    assert logits.grad[0].any() and float(small * 1) > 0


def test_posterior_head_nothing_left():
    logits = torch.full((2, 3, 4), torch.nan, requires_grad=True)
    loss = ops.posterior_head(logits, torch.zeros(3, dtype=torch.int64), torch.zeros(2))[3]
    loss.backward()
    assert loss.isnan() and not logits.grad.any()


@pytest.mark.parametrize("label", [4, -1, 2**40])
def test_a_label_that_is_none_makes_the_loss_nan(label):
    """Where values may not be looked at: inside torch.compile."""
    logits = torch.randn(2, 3, 4, requires_grad=True)
    loss = ops.posterior_head(logits, torch.tensor([0, label, 1]), torch.zeros(2))[3]
    loss.backward()
    assert loss.isnan() and not logits.grad.any()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((torch.zeros(2, 3), torch.zeros(3).long(), torch.zeros(2), 0), "logits must have shape"),
        ((torch.zeros(2, 3, 4), torch.zeros(2).long(), torch.zeros(2), 0), "labels must have"),
        ((torch.zeros(2, 3, 4), torch.zeros(3).int(), torch.zeros(2), 0), "labels must have dtype"),
        ((torch.zeros(2, 3, 4), torch.zeros(3).long(), torch.zeros(3), 0), "log_prior must have"),
        ((torch.zeros(2, 3, 4), torch.zeros(3).long(), torch.zeros(2), 2), "likelihood must be"),
    ],
)
def test_posterior_head_errors(arguments, message):
    with pytest.raises(RuntimeError, match=message):
        torch.ops.lasem_fast.posterior_head.default(*arguments)


def test_tree_equals_pytorch_in_float64():
    """Two levels, head of sums: the output of one level is the next one's input by a view."""
    torch.manual_seed(0)
    weights = [torch.randn(s, dtype=torch.float64) / 5 for s in [(2, 6, 5, 3, 3), (2, 4, 6, 3, 3)]]
    weights = [w.requires_grad_() for w in weights]
    biases = [torch.zeros(2, 6).double(), torch.zeros(2, 4).double()]
    images = torch.randn(1, 3, 9, 9, 5, dtype=torch.float64)
    results = []
    for fast in (True, False):
        x = images
        for weight, bias in zip(weights, biases, strict=True):
            side = -(-x.shape[2] // 3)
            x = (
                full_level(x, weight, bias, padding=1, pool=3, out_size=(side, side), tile=4)
                if fast
                else reference(x, weight, bias, 1, 3, 0, side, side)
            ).flatten(0, 1)
        results.append((x, *torch.autograd.grad(x.square().sum(), weights)))
    for got, want in zip(*results, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-11, atol=1e-11)


def test_memory_of_outputs_is_used_again_and_given_back():
    x, weight = torch.randn(1, 2, 64, 64, 8), torch.randn(2, 16, 8, 3, 3)
    run = lambda: level(x, weight, torch.zeros(2, 16), 1, 1, 0, 64, 64, 4)[0]  # noqa: E731
    ops.clear_scratch()
    first = run()
    view, address, values = first.flatten(0, 1), first.data_ptr(), first.clone()
    del first
    assert run().data_ptr() != address and torch.equal(view.view_as(values), values)
    del view
    assert run().data_ptr() == address or run().data_ptr() == address
    assert ops.clear_scratch() >= values.nbytes and ops.clear_scratch() == 0


def test_autocast_computes_in_float32_what_came_in_lower_precision():
    x = torch.randn(1, 2, 6, 6, 5, dtype=torch.bfloat16, requires_grad=True)
    weight, bias = torch.randn(2, 4, 5, 3, 3, requires_grad=True), torch.randn(2, 4)
    exact = x.detach().float().requires_grad_()
    expected = full_level(exact, weight, bias, padding=1)
    (dx,) = torch.autograd.grad(expected.sum(), exact)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = full_level(x, weight, bias, padding=1)
    assert torch.equal(y, expected)
    (got,) = torch.autograd.grad(y.sum(), x)
    assert torch.equal(got, dx.bfloat16())
    with pytest.raises(RuntimeError, match="x must have dtype float32 or float64"):
        full_level(x, weight, bias, padding=1)
