"""Who looks at operators, so that they have to be called as ones."""

from __future__ import annotations

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from lasem_fast.backends.looked_at import is_looked_at


class _Subclass(torch.Tensor):
    pass


def test_nobody():
    assert not is_looked_at(torch.zeros(1))
    assert not is_looked_at(nn.Parameter(torch.zeros(1)))


def test_a_mode():
    with FlopCounterMode(display=False):
        assert is_looked_at(torch.zeros(1))


def test_a_subclass():
    assert is_looked_at(torch.zeros(1).as_subclass(_Subclass))


def test_a_profiler():
    with torch.profiler.profile():
        assert is_looked_at(torch.zeros(1))
    assert not is_looked_at(torch.zeros(1))


def test_a_compiler():
    @torch.compile(backend="eager", fullgraph=True)
    def looked_at(x):
        return x + 1 if is_looked_at(x) else x

    assert looked_at(torch.zeros(1)).item() == 1
