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
