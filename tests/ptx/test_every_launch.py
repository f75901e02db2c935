"""The engine knows every instruction of every kernel and tile that is compiled ahead of time."""

from __future__ import annotations

import box_launches
import dropout_launches
import head_launches
import level_launches
import pytest
from engine import Executable
from parsing import parse
from shapes import CAPABILITIES
from triton.tools.tensor_descriptor import TensorDescriptor

from bench.compiling import compiled

LAUNCHES = level_launches.launches() | head_launches.launches() | dropout_launches.launches()
IN_BOXES = box_launches.launches()


def is_translated(launch, capability: int) -> str:
    ptx = compiled(launch, capability).asm["ptx"]
    Executable(parse(ptx))
    return ptx


@pytest.mark.parametrize("capability", CAPABILITIES)
@pytest.mark.parametrize("name", LAUNCHES)
def test_it_is_translated(name, capability):
    is_translated(LAUNCHES[name], capability)


@pytest.mark.parametrize("name", IN_BOXES)
def test_it_is_translated_with_tensor_copies(name):
    """No kernel that reads boxes is left out."""
    reads_boxes = any(isinstance(a, TensorDescriptor) for a in IN_BOXES[name].arguments.values())
    assert ("cp.async.bulk.tensor" in is_translated(IN_BOXES[name], 90)) == reads_boxes
