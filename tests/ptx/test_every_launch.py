"""The engine knows every instruction of every kernel and tile that is compiled ahead of time."""

from __future__ import annotations

import dropout_launches
import head_launches
import level_launches
import pytest
from engine import Executable
from parsing import parse
from shapes import CAPABILITIES

from bench.compiling import compiled

LAUNCHES = level_launches.launches() | head_launches.launches() | dropout_launches.launches()


@pytest.mark.parametrize("capability", CAPABILITIES)
@pytest.mark.parametrize("name", LAUNCHES)
def test_it_is_translated(name, capability):
    Executable(parse(compiled(LAUNCHES[name], capability).asm["ptx"]))
