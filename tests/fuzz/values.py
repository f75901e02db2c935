"""Broken arguments: what takes the place of a good one. Each has a name for the report."""

from __future__ import annotations

import math
from collections.abc import Callable
from random import Random
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

ANYTHING: dict[str, Callable[[], Any]] = {
    "None": lambda: None,
    "True": lambda: True,
    "0": lambda: 0,
    "-1": lambda: -1,
    "1": lambda: 1,
    "7": lambda: 7,
    "2.5": lambda: 2.5,
    "0.5": lambda: 0.5,
    "-0.1": lambda: -0.1,
    "nan": lambda: math.nan,
    "inf": lambda: math.inf,
    "huge int": lambda: 10**30,
    "huge negative int": lambda: -(10**30),
    "huge float": lambda: 1e300,
    "1j": lambda: 1j,
    "''": lambda: "",
    "'nonsense'": lambda: "nonsense",
    "'a'": lambda: "a",
    "'c'": lambda: "c",
    "'\\x00.%'": lambda: "\x00.%",
    "b'bytes'": lambda: b"bytes",
    "[]": lambda: [],
    "()": lambda: (),
    "{}": lambda: {},
    "set()": lambda: set(),
    "[None]": lambda: [None],
    "[[]]": lambda: [[]],
    "[1, 'b']": lambda: [1, "b"],
    "[1, 1]": lambda: [1, 1],
    "[2, 2]": lambda: [2, 2],
    "[nan]": lambda: [math.nan],
    "{'a'}": lambda: {"a"},
    "{0}": lambda: {0},
    "{1, 99}": lambda: {1, 99},
    "{1}": lambda: {1},
    "{nan}": lambda: {math.nan},
    "range": lambda: range(3),
    "generator": lambda: (i for i in range(2)),
    "object": object,
    "a class": lambda: int,
    "lambda": lambda: lambda *a, **k: None,
    "a module": lambda: nn.Linear(4, 3),
    "an empty module": nn.Module,
    "a lazy module": lambda: nn.LazyLinear(3),
    "a module on meta": lambda: nn.Linear(4, 3, device="meta"),
    "a complex module": lambda: nn.Linear(4, 3, dtype=torch.complex64),
    "a NaN module": lambda: _filled(nn.Linear(4, 3), math.nan),
    "numpy array": lambda: np.ones((2, 2)),
    "numpy int": lambda: np.int64(1),
    "numpy strings": lambda: np.array(["a", "b"]),
    "tensor": lambda: torch.ones(2, 3),
    "0-d tensor": lambda: torch.tensor(1.0),
    "0-d int tensor": lambda: torch.tensor(1),
    "bool tensor": lambda: torch.tensor([True, False]),
    "int tensor": lambda: torch.tensor([1, 0]),
    "empty tensor": lambda: torch.zeros(0),
    "meta tensor": lambda: torch.zeros(2, device="meta"),
    "a device": lambda: torch.device("cpu"),
    "a dtype": lambda: torch.float32,
    "a raising iterator": lambda: _Raises(),
}


class _Raises:
    """Iterates, and has a length, until somebody looks."""

    def __iter__(self) -> Any:
        raise ValueError("values: expected nobody to look, got a look")

    def __len__(self) -> int:
        return 2


def _filled(module: nn.Module, value: float) -> nn.Module:
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.fill_(value)
    return module


def _first(tensor: Tensor, value: Any) -> Tensor:
    changed = tensor.clone()
    changed.flatten()[:1] = value
    return changed


OF_TENSORS: dict[str, Callable[[Tensor], Any]] = {
    "float64": lambda t: t.double(),
    "float16": lambda t: t.half(),
    "bfloat16": lambda t: t.bfloat16(),
    "complex": lambda t: t.to(torch.complex64),
    "int64": lambda t: t.long(),
    "int32": lambda t: t.int(),
    "uint8": lambda t: t.abs().to(torch.uint8),
    "bool": lambda t: t != 0,
    "on meta": lambda t: t.to("meta"),
    "sparse": lambda t: t.to_sparse(),
    "sparse csr": lambda t: t.reshape(len(t), -1).to_sparse_csr(),
    "quantised": lambda t: torch.quantize_per_tensor(t.float(), 0.1, 0, torch.qint8),
    "nested": lambda t: torch.nested.nested_tensor([t.float(), t.float()]),
    "no samples": lambda t: t[:0],
    "one sample less": lambda t: t[:-1],
    "twice": lambda t: torch.cat([t, t]),
    "0-d": lambda t: t.flatten()[0],
    "one dimension more": lambda t: t.unsqueeze(-1),
    "one dimension more in front": lambda t: t.unsqueeze(0),
    "flat": lambda t: t.flatten(),
    "no features": lambda t: t.unsqueeze(-1)[..., :0],
    "a feature too few": lambda t: t[..., :-1],
    "first NaN": lambda t: _first(t.float(), math.nan),
    "first inf": lambda t: _first(t.float(), math.inf),
    "first huge": lambda t: _first(t, 10**9),
    "first -1": lambda t: _first(t, -1),
    "all huge": lambda t: torch.full_like(t.float(), 3e38),
    "strided": lambda t: torch.stack([t, t + 1], dim=-1)[..., 0],
    "expanded": lambda t: t[:1].expand_as(t),
    "requires grad": lambda t: t.float().requires_grad_(),
    "a parameter": lambda t: nn.Parameter(t.float()),
    "numpy": lambda t: t.numpy(),
    "list": lambda t: t.tolist(),
    "in inference mode": lambda t: _inferred(t),
    "negative view": lambda t: torch._neg_view(t.float()),
}


def _inferred(tensor: Tensor) -> Tensor:
    with torch.inference_mode():
        return tensor.clone()


def broken(pick: Random, good: Any) -> tuple[str, Any]:
    """A name and a value that takes the place of ``good``."""
    if isinstance(good, Tensor) and pick.random() < 0.65:
        name = pick.choice(list(OF_TENSORS))
        try:
            return name, OF_TENSORS[name](good.detach())
        except (RuntimeError, TypeError, NotImplementedError, IndexError):
            pass  # this tensor has no such form
    name = pick.choice(list(ANYTHING))
    return name, ANYTHING[name]()
