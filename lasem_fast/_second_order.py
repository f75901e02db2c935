"""Gradients of gradients: the backward of a kernel in plain PyTorch, where autograd wants a graph.

A kernel's backward gives numbers, in which inputs and weights would count as constants, unnoticed:
``once_differentiable`` refuses only where the gradient that comes in has a graph of its own. So a
backward that runs for ``create_graph=True`` computes the same from tensors that carry gradients.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor


def wanted() -> bool:
    """Whether the backward that runs now has to carry gradients itself."""
    # a compiled backward never does, and PyTorch says so
    return torch.is_grad_enabled() and not torch.compiler.is_compiling()


def gradients(
    function: Callable[..., Tensor], inputs: Sequence[Tensor], needed: Sequence[bool], dy: Tensor
) -> list[Tensor | None]:
    """Gradients, with a graph, of ``function(*inputs)``; None for inputs that need none."""
    wrt = [t for t, needs in zip(inputs, needed, strict=True) if needs]
    y = function(*inputs)
    found = iter(torch.autograd.grad(y, wrt, dy.to(y.dtype), create_graph=True))
    return [next(found) if needs else None for needs in needed]


def won(z: Tensor, code: Tensor, pool: int, pool_pad: int) -> Tensor:
    """ReLU and max-pool of a level with their choices as the kernel made them.

    Args:
        z: the convolution ``[P, G, N, h, w, Co]``.
        code: which position of each window won, ``[P, G, N, out_h, out_w, Co]``; any that is not
            in the window says that the ReLU is closed.
        pool: window and stride of the pool.
        pool_pad: padding before the first window.
    """
    position = code.long()
    is_open = position < pool * pool
    starts = [torch.arange(n, device=z.device) * pool - pool_pad for n in code.shape[3:5]]
    row = starts[0][:, None, None] + position // pool
    column = starts[1][:, None] + position % pool
    index = torch.where(is_open, row * z.shape[4] + column, 0)
    picked = z.flatten(3, 4).gather(3, index.flatten(3, 4)).unflatten(3, code.shape[3:5])
    return torch.where(is_open, picked, 0)


def rows_in_branches(z: Tensor, prefixes: int, branches: int) -> Tensor:
    """``[P * N, G * Co, h, w]`` as ``[P, G, N, h, w, Co]``."""
    split = z.unflatten(1, (branches, -1)).unflatten(0, (prefixes, -1))
    return split.permute(0, 2, 1, 4, 5, 3)


def head_gradient(
    logits: Tensor, target: Tensor, posterior: Tensor, dloss: Tensor, sigma: float | None = None
) -> Tensor:
    """d(loss)/d(logits) of a posterior head, the posterior held constant.

    Args:
        logits: ``[C, N, K]``.
        target: labels ``[N]``; with ``sigma``, the Gaussian likelihood's values ``[N, K]``.
        posterior: ``[C]``; where it is 0 there is no gradient.
        dloss: scalar.
        sigma: of the Gaussian likelihood; None for classification.
    """
    scale = (posterior / logits.shape[1])[:, None, None]
    # chosen before it is used: 0 * NaN is NaN, in gradients too
    logits = torch.where(scale > 0, logits.to(posterior.dtype), 0)
    if sigma is None:
        residual = logits.softmax(dim=2) - F.one_hot(target, logits.shape[2])
    else:
        residual = (logits - target) / sigma**2
    return dloss * torch.where(scale > 0, scale * residual, 0)
