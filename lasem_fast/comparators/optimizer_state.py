"""The state of a small optimiser in a form that JSON holds without loss."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from lasem_fast.networks.saved import lasting


def to_plain(optimizer: Optimizer) -> dict[str, Any]:
    """What an optimiser remembers of its parameters, by their numbers; reads values."""
    state = optimizer.state_dict()["state"]
    return {str(n): {k: _plain(v) for k, v in kept.items()} for n, kept in state.items()}


def load_plain(optimizer: Optimizer, state: dict[str, Any]) -> None:
    """Gives an optimiser what was taken by :func:`to_plain`, on its parameters' device."""
    with lasting():
        found = {int(n): {k: _value(v) for k, v in kept.items()} for n, kept in state.items()}
    optimizer.load_state_dict({**optimizer.state_dict(), "state": found})


def _plain(value: Any) -> Any:
    if not isinstance(value, Tensor):
        return value
    form = {"dtype": str(value.dtype).removeprefix("torch."), "shape": list(value.shape)}
    return {**form, "values": value.detach().cpu().flatten().tolist()}


def _value(plain: Any) -> Any:
    if not isinstance(plain, dict):
        return plain
    dtype = getattr(torch, plain["dtype"])
    return torch.tensor(plain["values"], dtype=dtype).reshape(plain["shape"])
