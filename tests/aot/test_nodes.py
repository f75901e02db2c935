"""How many nodes the graph of a captured step has."""

from __future__ import annotations

from bench.cases import Case
from bench.recording import step_launches


def test_a_captured_step_of_cifar_4_has_20_nodes():
    launches, others = step_launches(Case("cifar-4", 10, "bf16"), boxes=True, captured=True)
    assert len(launches) <= 20
    # a zero that a graph takes in as it is
    assert others == {"clone": 1}
    copies = [i for i, launch in enumerate(launches) if "copies" in launch.kernel.__name__]
    assert copies == [0]
