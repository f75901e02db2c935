"""Every kernel and tile compiles for sm_80 and sm_90, without spills and within its budget."""

from __future__ import annotations

import json
import os

import pytest
from budget import ARCHITECTURES, BUDGET, compile_all, launches, uses_tensor_cores

from lasem_fast.kernels import level_dgrad, level_forward, level_wgrad

if os.environ.get("TRITON_INTERPRET") == "1":
    raise pytest.UsageError("tests/aot: expected an environment without TRITON_INTERPRET")

LAUNCHES = launches()
ENTRIES = json.loads(BUDGET.read_text())


@pytest.fixture(scope="module")
def footprints():
    return compile_all()


def test_the_budget_lists_every_launch_and_no_other():
    assert set(ENTRIES) == {f"{name}/sm_{c}" for name in LAUNCHES for c in ARCHITECTURES}


@pytest.mark.parametrize("capability", ARCHITECTURES)
@pytest.mark.parametrize("name", LAUNCHES)
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
        ragged = getattr(module, "RAGGED_TILES", ())
        tf32 = getattr(module, "TF32_TILES", ())
        for tile in (*module.TENSOR_CORE_TILES, *tf32, *ragged, *module.FMA_TILES):
            assert f"{kernel}_{'x'.join(map(str, tile))}" in names
