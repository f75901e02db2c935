"""Memory that malloc holds free is given back when the process has grown by an allowance."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import lasem_fast as lf
from lasem_fast.tree import heap


def test_memory_is_given_back_beyond_the_allowance_and_not_before(monkeypatch):
    sizes, trims = [100, 104, 120, 105, 115, 116, 106], []
    monkeypatch.setattr(heap, "_resident", lambda: sizes.pop(0))
    monkeypatch.setattr(heap, "_malloc_trim", lambda: trims.append)
    memory = heap.Heap(allowance=10)
    memory.keep_down()  # 104 of 100
    assert trims == []
    memory.keep_down()  # 120, then 105
    assert trims == [0]
    memory.keep_down()  # 115 of 105: not beyond
    assert trims == [0]
    memory.keep_down()  # 116, then 106
    assert trims == [0, 0] and sizes == []


def test_without_glibc_nothing_is_done(monkeypatch):
    monkeypatch.setattr(heap, "_malloc_trim", lambda: None)
    monkeypatch.setattr(heap, "_resident", lambda: pytest.fail("looked at the process"))
    heap.Heap(allowance=0).keep_down()


def test_a_bounded_step_looks_at_the_heap(monkeypatch):
    looks = []
    monkeypatch.setattr(heap.Heap, "keep_down", lambda self: looks.append(self.allowance))
    net = lf.TransferNet(nn.Sequential(nn.Linear(64, 64), nn.ReLU()) for _ in range(5))
    net.add_task("t", nn.Linear(64, 3))
    x, y = torch.randn(32, 64), torch.randint(3, (32,))
    em = lf.LASEM(net, max_memory=700_000)
    em(x, y, "t").loss.backward()
    assert looks and all(0 < allowance < 700_000 for allowance in looks)
