"""A small slice of the zoo with the `triton` backend, under the interpreter."""

from __future__ import annotations

import random

import pytest
from zoo.cases import draw
from zoo.kinds import KINDS

pytestmark = [
    pytest.mark.filterwarnings("ignore"),  # numpy's, for -inf - -inf; PyTorch's, about layers
]


@pytest.mark.parametrize("seed", range(3))
def test_histories(seed):
    KINDS["history"].check(draw(random.Random(seed), max_depth=2), "triton")


@pytest.mark.parametrize("seed", range(4))
def test_float32(seed):
    kind = KINDS["float32"]
    kind.check(kind.draw(random.Random(seed)), "triton")
