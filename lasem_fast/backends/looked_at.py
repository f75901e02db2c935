"""Whether an operator of ours has to be called as one, or its launches can be made at once.

Through PyTorch's dispatcher an operator that is written in Python takes as long as several
launches. It is needed where somebody looks at operators: a compiler, a mode, a subclass, or a
profiler.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import is_in_torch_dispatch_mode

_PLAIN = (Tensor, nn.Parameter)


def is_looked_at(x: Tensor) -> bool:
    """Whether somebody looks at the operators that run on ``x``."""
    return (
        torch.compiler.is_compiling()
        or is_in_torch_dispatch_mode()
        or type(x) not in _PLAIN
        or torch.autograd._profiler_enabled()
    )
