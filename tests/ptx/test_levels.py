"""The level kernels as Triton compiled them, against PyTorch in float64."""

from __future__ import annotations

import pytest
import torch
from levels import truth
from shapes import CAPABILITIES, PRECISIONS, SHAPES, drawn, results, run

from lasem_fast.backends.triton_level_op import Tiles

# A float32 result may be off from float64 by twice what PyTorch's is: the order of the sum differs.
ERROR_FACTOR = 2


@pytest.mark.parametrize("capability", CAPABILITIES)
@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("name", SHAPES)
def test_exact_on_integers_whatever_the_order_of_warps(name, precision, capability):
    """Every sum is exact, so that only one result is right, rounded once to the dtype at hand."""
    shape, (dtype, tf32) = SHAPES[name], PRECISIONS[precision]
    case = drawn(shape, dtype)
    dy = case.gradient()
    tiles = Tiles() if precision == "fp32" else shape.tiles  # the large ones are of tensor cores
    got = results(run(case, dy, capability, tiles, tf32=tf32))
    again = run(case, dy, capability, tiles, tf32=tf32, seed=1)
    want, again = results(truth(case, dy)), results(again)
    for key, value in got.items():
        assert torch.equal(value, want[key].to(value.dtype)), key
        assert torch.equal(value, again[key]), key


def rounded(precision: str):
    """Normal values that the products' operands hold exactly: they are rounded before, once."""

    def values(*sizes: int) -> torch.Tensor:
        drawn = torch.randn(sizes)
        if precision == "tf32":  # 10 bits behind the point; the 13 below are cut off
            return (drawn.view(torch.int32) & ~0x1FFF).view(torch.float32).double()
        return drawn.to(PRECISIONS[precision][0]).double()

    return values


@pytest.mark.parametrize("capability", CAPABILITIES)
@pytest.mark.parametrize("precision", PRECISIONS)
def test_rounding(precision, capability):
    """No ReLU and no pool, whose gradients would jump. PyTorch's own error is the measure."""
    dtype, tf32 = PRECISIONS[precision]
    shape = SHAPES["72 channels, skip"]._replace(relu=0, relu_after=0, live=None)
    case = drawn(shape, dtype, rounded(precision))
    dy = rounded(precision)(*case.gradient().shape)
    tiles = Tiles() if precision == "fp32" else shape.tiles
    got = results(run(case, dy, capability, tiles, tf32=tf32))
    exact, peer = results(truth(case, dy)), results(truth(case, dy, torch.float32))
    for key, value in got.items():
        error = float((value.double() - exact[key]).norm())
        plain = float((peer[key].to(value.dtype).double() - exact[key]).norm())
        assert error <= ERROR_FACTOR * plain, key
