"""Every tile of every table, as Triton compiled it, on a level with a skip and ragged sizes."""

from __future__ import annotations

import pytest
import torch
from levels import truth
from shapes import CAPABILITIES, PRECISIONS, SHAPES, drawn, results, run

from lasem_fast.backends.triton_level_op import Tiles
from lasem_fast.kernels import level_dgrad, level_forward, level_wgrad

MODULES = {"forward": level_forward, "dgrad": level_dgrad, "wgrad": level_wgrad}


def tiles():
    """Kernel, tile and precision."""
    for name, module in MODULES.items():
        of_halves = [*module.TENSOR_CORE_TILES, *getattr(module, "RAGGED_TILES", ())]
        yield from ((name, tile, "bf16") for tile in of_halves)
        of_tf32 = getattr(module, "TF32_TILES", module.TENSOR_CORE_TILES)
        yield from ((name, tile, "tf32") for tile in of_tf32)
        yield from ((name, tile, "fp32") for tile in module.FMA_TILES)


@pytest.mark.parametrize("capability", CAPABILITIES)
@pytest.mark.parametrize(("name", "tile", "precision"), list(tiles()))
def test_every_tile_is_exact(name, tile, precision, capability):
    dtype, tf32 = PRECISIONS[precision]
    case = drawn(SHAPES["72 channels, skip"], dtype)
    dy = case.gradient()
    got = results(run(case, dy, capability, Tiles(**{name: tile}), tf32=tf32))
    for key, want in results(truth(case, dy)).items():
        assert torch.equal(got[key], want.to(got[key].dtype)), key
