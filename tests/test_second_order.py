"""Gradients of gradients: every backend's are those of the naive loop."""

from __future__ import annotations

import pytest
import torch
from nets import batch, small_net
from oracle import assert_equals
from torch import nn

import lasem_fast as lf
from lasem_fast.backends import cpu_ops as ops

needs_kernels = pytest.mark.skipif(not ops.supported(), reason=ops.why_unsupported())


def _second_order(backend, make, x, y, **options):
    """Gradients of the squared input gradient, to every parameter and to the input."""
    torch.manual_seed(0)
    net = make()
    em = lf.LASEM(net, backend=backend, **options)
    x = x.clone().requires_grad_()
    (first,) = torch.autograd.grad(em(x, y, "a").loss, x, create_graph=True)
    wrt = {"x": x, **dict(net.named_parameters())}
    found = torch.autograd.grad(first.square().sum(), list(wrt.values()), allow_unused=True)
    return first.detach(), {
        n: torch.zeros_like(p) if g is None else g
        for (n, p), g in zip(wrt.items(), found, strict=True)
    }


@needs_kernels
@pytest.mark.parametrize("likelihood", ["joint", "mean"])
def test_the_posterior_head_in_a_whole_step(likelihood):
    x, y = batch()
    make = lambda: small_net(2, extra=(nn.Tanh,))  # noqa: E731
    first, second = _second_order("cpp", make, x, y, likelihood=likelihood)
    exact_first, exact = _second_order("reference", make, x, y, likelihood=likelihood)
    assert_equals(first, exact_first, "gradient")
    assert any(float(g.abs().max()) > 1e-6 for g in exact.values())
    for name, gradient in second.items():
        assert_equals(gradient, exact[name], f"second-order gradient of {name}")


@needs_kernels
def test_every_kernel_in_float32():
    def make():
        stages = [
            nn.Sequential(nn.Conv2d(2, 8, 3, padding=1), nn.ReLU()),
            nn.Sequential(nn.Conv2d(8, 8, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2)),
        ]
        net = lf.TransferNet(stages)
        net.add_task("a", nn.Sequential(nn.Flatten(), nn.Linear(72, 5), nn.Tanh(), nn.Linear(5, 3)))
        return net

    x, y = batch(dtype=torch.float32)
    first, fast = _second_order("cpp", make, x, y)
    plain_first, plain = _second_order("torch", make, x, y)
    exact_first, exact = _second_order("torch", lambda: make().double(), x.double(), y)
    # 6: what the kernels' gradients are held to
    assert (first - exact_first).norm() <= 6 * (plain_first - exact_first).norm()
    for name, got in fast.items():
        error, allowed = (got - exact[name]).norm(), (plain[name] - exact[name]).norm()
        assert error <= 6 * allowed + 6 * torch.finfo(torch.float32).eps * exact[name].norm(), name


@needs_kernels
@pytest.mark.parametrize(
    ("pool", "pool_pad", "size"), [(1, 0, (5, 6)), (2, 1, (3, 4)), (3, 1, (2, 3)), (3, 0, (2, 2))]
)
@pytest.mark.parametrize(
    "tail",
    [
        None,
        {},
        {"skip_rows": torch.tensor([1, 1, 0]), "relu": False},
        {"skip_rows": torch.tensor([1, 2, 1]), "relu_after": True},
        {"live": torch.tensor([True, False, True])},
    ],
)
def test_a_level(pool, pool_pad, size, tail):
    shapes = [
        (2, 1, 5, 6, 2),
        (2, 2, 2, 3, 3),
        (2, 2),
        *([] if tail is None else [(3, 1, 5, 6, 2)]),
    ]
    leaves = [torch.randn(s, dtype=torch.float64, requires_grad=True) for s in shapes]
    keywords = dict(tail or {})
    liveness = ops.Liveness(keywords.pop("live", None))
    rows = {"parents": torch.tensor([1, 0, 1]), "branches": torch.tensor([1, 0, 0])}

    def level(x, weight, bias, skip=None):
        sizes = {"padding": 1, "pool": pool, "pool_pad": pool_pad, "out_size": size}
        parameters = list(weight), list(bias)
        return ops.winograd_level(
            x, *parameters, **rows, **sizes, skip=skip, **keywords, liveness=liveness
        )

    if liveness.live is None:  # else the gradient is not that of the outputs
        assert torch.autograd.gradgradcheck(level, leaves)
    dy = torch.randn(3, 1, *size, 2, dtype=torch.float64)
    kernel = torch.autograd.grad(level(*leaves), leaves, dy)
    plain = torch.autograd.grad(level(*leaves), leaves, dy, create_graph=True)
    for got, want in zip(plain, kernel, strict=True):
        assert_equals(got.detach(), want, "gradient")


@needs_kernels
def test_a_level_without_biases():
    x, row = torch.randn(1, 1, 4, 4, 2).double().requires_grad_(), torch.tensor([0])
    weight = torch.randn(2, 2, 3, 3).double().requires_grad_()

    def level(x, weight):
        return ops.winograd_level(x, [weight], [], parents=row, branches=row, padding=1)

    assert torch.autograd.gradgradcheck(level, (x, weight))


@needs_kernels
def test_a_heads_linear_layer():
    shapes = [(3, 4, 2), (5, 8), (5,)]
    leaves = [torch.randn(s, dtype=torch.float64, requires_grad=True) for s in shapes]
    assert torch.autograd.gradgradcheck(ops.channels_last_linear, leaves)


@needs_kernels
def test_only_what_needs_a_gradient_gets_one():
    x, weight, bias = torch.randn(1, 1, 4, 4, 2), torch.randn(2, 2, 3, 3), torch.zeros(2)
    weight.requires_grad_()
    row = torch.tensor([0])
    y = ops.winograd_level(x, [weight], [bias], parents=row, branches=row, padding=1)
    (grad,) = torch.autograd.grad(y.square().sum(), weight, create_graph=True)
    grad.sum().backward()
    assert x.grad is None and bias.grad is None and weight.grad is not None


@needs_kernels
def test_configurations_without_weight_leave_no_nan():
    logits = torch.randn(3, 4, 2, dtype=torch.float64)
    logits[1] = torch.nan
    logits.requires_grad_()
    prior = torch.tensor([0.0, 0.0, -torch.inf])
    loss = ops.posterior_head(logits, torch.tensor([0, 1, 0, 1]), prior)[3]
    (first,) = torch.autograd.grad(loss, logits, create_graph=True)
    (second,) = torch.autograd.grad(first.square().sum(), logits)
    assert not first[1:].any() and not second[1:].any() and bool(second[0].any())
