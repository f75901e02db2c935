"""The `triton` backend against brute force in float64 on every small net."""

from __future__ import annotations

import parity
import pytest

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")  # numpy's, for -inf - -inf


@pytest.mark.parametrize("net", parity.NETS)
def test_every_net(net):
    parity.check("triton", parity.problem(net))


@pytest.mark.parametrize("layout", [name for name in parity.LAYOUTS if name != "contiguous"])
def test_every_layout(layout):
    parity.check("triton", parity.problem("pool 2", layout=layout))
