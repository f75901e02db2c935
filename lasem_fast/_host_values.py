"""Whether values can be looked at where they are, without waiting and without ending a trace."""

from __future__ import annotations

import torch
from torch import Tensor


def is_transformed() -> bool:
    """Whether a torch.func transform (vmap, grad, jacrev) runs this."""
    return torch._C._are_functorch_transforms_active()


def on_host(values: Tensor) -> bool:
    """Whether NumPy can read a tensor's values: on the CPU, neither compiled nor transformed."""
    is_there = values.device.type == "cpu"
    return is_there and not torch.compiler.is_compiling() and not is_transformed()
