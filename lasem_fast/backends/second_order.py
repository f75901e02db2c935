"""Gradients of gradients: the backward of a kernel in plain PyTorch, where autograd wants a graph.

A kernel's backward gives numbers, in which inputs and weights would count as constants, unnoticed:
``once_differentiable`` refuses only where the gradient that comes in has a graph of its own. So a
backward that runs for ``create_graph=True`` computes the same from tensors that carry gradients.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
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


class Level(NamedTuple):
    """A level's backward for gradients of gradients; choices of ReLU and pool as the kernel's.

    Attributes:
        parents: for each row of the level, the parent that it reads, int64 ``[R]``.
        branches: for each row, its branch, int64 ``[R]``.
        skip_rows: for each row, the row of the skip that is added to it; None: its own.
        live: bool ``[R]``, the rows whose gradient counts; None: all.
        code: which position of each window won, ``[R, N, out_h, out_w, Co]``; :data:`_SHUT` more
            where the convolution's own ReLU is closed; :data:`_CLOSED` where nothing passes. None:
            there are no choices.
        pool: window and stride of the pool.
        pool_pad: padding before the first window.
    """

    parents: Tensor
    branches: Tensor
    skip_rows: Tensor | None
    live: Tensor | None
    code: Tensor | None
    pool: int
    pool_pad: int

    def gradients(
        self,
        convolve: Callable[..., Tensor],
        inputs: Sequence[Tensor],
        skip: Tensor | None,
        needed: Sequence[bool],
        dy: Tensor,
    ) -> list[Tensor | None]:
        """Gradients, with a graph, of parents, parameters and skip.

        Args:
            convolve: gives ``[P * N, G * Co, h, w]`` from some parents and the other ``inputs``.
            inputs: the parents ``[P, N, ...]``, then the parameters.
            skip: what is added, ``[S, N, h, w, Co]``, or None.
            needed: for each of ``inputs`` and ``skip``, whether its gradient is asked for.
            dy: ``[R, N, out_h, out_w, Co]``.
        """
        rows = torch.arange(len(self.parents), device=dy.device)
        if self.live is not None:
            rows = rows[self.live]
        # parents that no row reads may hold anything
        used, place = self.parents.to(dy.device)[rows].unique(return_inverse=True)
        branches = self.branches.to(dy.device)[rows]

        def level(x: Tensor, *others: Tensor) -> Tensor:
            parameters, added = (others[:-1], others[-1]) if skip is not None else (others, None)
            z = convolve(x[used], *parameters)
            z = z.unflatten(0, (len(used), -1)).unflatten(2, (-1, dy.shape[-1]))
            z = z[place, :, branches].permute(0, 1, 3, 4, 2)  # [R, N, h, w, Co]
            if added is not None:
                numbers = rows if self.skip_rows is None else self.skip_rows[rows]
                added = added[numbers]
            return self._chosen(z, added, rows)

        tensors = [*inputs] if skip is None else [*inputs, skip]
        found = gradients(level, tensors, needed[: len(tensors)], dy[rows])
        return [*found, *[None] * (len(needed) - len(tensors))]

    def _chosen(self, z: Tensor, added: Tensor | None, rows: Tensor) -> Tensor:
        """ReLUs, sum and pool with their choices as the kernel made them."""
        if self.code is None:
            return z if added is None else z + added
        code = self.code[rows]
        passes = code != _CLOSED
        position = torch.where(passes, code & (_SHUT - 1), 0).long()
        starts = [torch.arange(n, device=z.device) * self.pool - self.pool_pad
                  for n in code.shape[2:4]]  # fmt: skip
        row = starts[0][:, None, None] + position // self.pool
        column = starts[1][:, None] + position % self.pool
        index = torch.where(passes, row * z.shape[3] + column, 0).flatten(2, 3)

        def won(values: Tensor, is_open: Tensor) -> Tensor:
            picked = values.flatten(2, 3).gather(2, index).unflatten(2, code.shape[2:4])
            return torch.where(is_open, picked, 0)

        y = won(z, passes & (code & _SHUT == 0))
        return y if added is None else y + won(added, passes)


# As the kernels write them.
_SHUT, _CLOSED = 16, 255
