"""Every tile of every table, as Triton compiled it, on a level with a skip and ragged sizes."""

from __future__ import annotations

import pytest
import torch
from levels import truth
from shapes import CAPABILITIES, PRECISIONS, SHAPES, Shape, drawn, exact, run

from lasem_fast.backends.triton_level_op import Tiles
from lasem_fast.kernels import (
    box_dgrad,
    box_forward,
    box_wgrad,
    level_dgrad,
    level_forward,
    level_wgrad,
)
from lasem_fast.kernels.kept import forget
from lasem_fast.kernels.level_rows import Rows
from lasem_fast.kernels.level_tiles import MOST_SHARED

MODULES = {"forward": level_forward, "dgrad": level_dgrad, "wgrad": level_wgrad}
IN_BOXES = {"forward": box_forward, "dgrad": box_dgrad, "wgrad": box_wgrad}


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
    exact(run(case, dy, capability, Tiles(**{name: tile}), tf32=tf32), truth(case, dy))


@pytest.mark.parametrize(
    ("name", "tile"), [(name, tile) for name, module in IN_BOXES.items() for tile in module.TILES]
)
def test_every_tile_that_reads_boxes_is_exact(name, tile, monkeypatch):
    """The last blocks of pixels and of columns are ragged; wgrad also in two parts."""
    shape = Shape(72, 136, (5, 6), 2 - (name == "dgrad"), rows=Rows((2, 0, 2), (1, 0, 0), 3),
                  live=(True, False, True))  # fmt: skip
    if name == "dgrad":
        shape = shape._replace(channels=136, out=72)
    case = drawn(shape, torch.bfloat16)
    dy = case.gradient()
    want = truth(case, dy)
    for parts in (1, 2) if name == "wgrad" else (1,):

        def splits_of(programs, steps, parts=parts):
            return parts if programs <= MOST_SHARED else 1

        monkeypatch.setattr(box_wgrad, "splits_of", splits_of)
        forget()
        exact(run(case, dy, 90, Tiles(**{name: tile}), boxes=True), want)
