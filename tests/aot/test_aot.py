"""Every kernel and tile compiles for sm_80 and sm_90, without spills and within its budget."""

from __future__ import annotations

import json
import os
import re

import pytest
from budget import ARCHITECTURES, BUDGET, compile_all, jobs, launches, uses_tensor_cores

from bench.compiling import compiled, machine_code, specialised
from lasem_fast.kernels import (
    box_dgrad,
    box_forward,
    box_wgrad,
    level_dgrad,
    level_forward,
    level_wgrad,
)

if os.environ.get("TRITON_INTERPRET") == "1":
    raise pytest.UsageError("tests/aot: expected an environment without TRITON_INTERPRET")

LAUNCHES = launches()
ENTRIES = json.loads(BUDGET.read_text())


@pytest.fixture(scope="module")
def footprints():
    return compile_all()


def test_the_budget_lists_every_launch_and_no_other():
    assert set(ENTRIES) == {f"{name}/sm_{capability}" for name, capability in jobs()}


@pytest.mark.parametrize(("name", "capability"), jobs())
def test_footprint(footprints, name, capability):
    got, allowed = footprints[f"{name}/sm_{capability}"], ENTRIES[f"{name}/sm_{capability}"]
    assert got.stack == 0, f"spills {got.stack} bytes per thread"
    assert got.registers <= allowed["registers"]
    assert got.shared <= min(allowed["shared"], ARCHITECTURES[capability])
    assert got.tensor_core == uses_tensor_cores(LAUNCHES[name])


def test_every_tile_of_every_table_is_compiled():
    names = {"_".join(name.split("/")[::2][:2]) for name in LAUNCHES}
    for module in (level_forward, level_dgrad, level_wgrad):
        kernel = module.__name__.rpartition(".")[2]
        ragged = (
            *getattr(module, "RAGGED_TILES", ()),
            *getattr(module, "RAGGED_TF32_TILES", ()),
        )
        tf32 = getattr(module, "TF32_TILES", ())
        for tile in (*module.TENSOR_CORE_TILES, *tf32, *ragged, *module.FMA_TILES):
            assert f"{kernel}_{'x'.join(map(str, tile))}" in names


# Instructions that a warp may issue per step of the largest tile, bf16 on sm_90.
MOST_INSTRUCTIONS = {
    "level_forward/bf16/64x64x64x4x3/pool1": 190,
    "level_dgrad/bf16/64x64x64x4x3/pool2": 400,
    "level_wgrad/bf16/64x64x32x4x5/pool2": 400,
}


@pytest.mark.parametrize("name", MOST_INSTRUCTIONS)
def test_instructions_of_a_step(name):
    loop = machine_code(specialised(LAUNCHES[name]), 90).loop
    tile = [LAUNCHES[name].arguments[size] for size in ("ROWS", "COLUMNS", "DEPTH")]
    warps = LAUNCHES[name].options["num_warps"]
    assert loop.flops == 2 * tile[0] * tile[1] * tile[2] // warps  # one step in each pass
    assert loop.instructions <= MOST_INSTRUCTIONS[name]


BOX_TILES = [
    (module.__name__.rpartition(".")[2], tile)
    for module in (box_forward, box_dgrad, box_wgrad)
    for tile in module.TILES
]


@pytest.mark.parametrize(("kernel", "tile"), BOX_TILES)
def test_operands_come_in_boxes(kernel, tile):
    """By tensor copies, to products of warp groups wherever one side of a tile has 64 rows."""
    launch = next(
        launch
        for name, launch in LAUNCHES.items()
        if name.startswith(f"{kernel}/") and name.endswith("/pool2") and _has(launch, tile)
    )
    opcodes = machine_code(specialised(launch), 90).opcodes
    assert "UTMALDG" in opcodes
    assert ("HGMMA" in opcodes) == (max(tile.rows, tile.columns) >= 64)


def _has(launch, tile):
    """Whether a launch is of a tile."""
    a = launch.arguments
    pixels = a["IMAGES"] * a["BOX_H"] * a["BOX_W"]
    sizes = (a["ROWS"], a["COLUMNS"], pixels) if "ROWS" in a else (pixels, a["COLUMNS"], a["DEPTH"])
    return sizes == tuple(tile[:3])


# Instructions that a warp may issue per step; a multiply and an add are 2 FLOPs.
MOST_BOX_INSTRUCTIONS = {("box_forward", 0): 150, ("box_dgrad", 0): 160, ("box_wgrad", 0): 260}


@pytest.mark.parametrize(("kernel", "number"), MOST_BOX_INSTRUCTIONS)
def test_instructions_of_a_step_in_boxes(kernel, number):
    module = {"box_forward": box_forward, "box_dgrad": box_dgrad, "box_wgrad": box_wgrad}[kernel]
    tile = module.TILES[number]
    launch = next(
        launch
        for name, launch in LAUNCHES.items()
        if name.startswith(f"{kernel}/") and name.endswith("/pool2") and _has(launch, tile)
    )
    loop = machine_code(specialised(launch), 90).loop
    assert loop.flops == 2 * tile.rows * tile.columns * tile.depth // tile.warps
    assert loop.instructions <= MOST_BOX_INSTRUCTIONS[kernel, number]


# What reads or writes memory that other kernels write or read.
_ACCESS = re.compile(r"\b(ld\.global|st\.global|cp\.async|atom|red)\b")


# One of each kernel.
_KERNELS = sorted({launch.kernel.__name__: name for name, launch in LAUNCHES.items()}.values())


@pytest.mark.parametrize("name", _KERNELS)
def test_a_kernel_that_is_launched_early_waits_before_it_looks_at_memory(name):
    launch = LAUNCHES[name]
    early = launch._replace(arguments=launch.arguments | {"EARLY": True})
    ptx = compiled(early, 90).asm["ptx"]
    before = ptx[: ptx.index("griddepcontrol.wait")]
    assert not _ACCESS.search(before)
    assert "bra" not in before.split()
