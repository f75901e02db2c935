"""A wide convolution or linear layer in PyTorch whose backward runs on the rows that count."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import compress
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lasem_fast._host_values import on_host
from lasem_fast.levels.row_liveness import Liveness

_CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
# Picking rows moves memory: where nearly all count, the whole backward is faster.
_MOST_LIVE = 0.85


class Places(NamedTuple):
    """Where a level's rows lie in the folded batch of a wide layer.

    Attributes:
        rows: the numbers of the rows, of one parent through all branches after the other.
        branches: how many branches there are.
        samples_first: whether the batch is ``[N * P]`` with samples outermost, else ``[P * N]``.
    """

    rows: Sequence[int]
    branches: int
    samples_first: bool

    @property
    def parents(self) -> int:
        return len(self.rows) // self.branches


def follows(core: nn.Module, x: Tensor, liveness: Liveness | None) -> bool:
    """Whether :func:`followed` is a way to run this layer."""
    if liveness is None or not torch.is_grad_enabled():
        return False
    # elsewhere nobody waits to see which rows count
    if not on_host(x) or torch.is_autocast_enabled("cpu"):
        return False
    if type(core) is nn.Linear:
        return x.dim() == 2
    return (
        type(core) in _CONVOLUTIONS
        and core.padding_mode == "zeros"
        and not isinstance(core.padding, str)
        and core.groups == 1
    )


def followed(
    core: nn.Module,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    liveness: Liveness,
    places: Places,
) -> Tensor:
    """The layer with the weights of B branches side by side, ``[.., B * K, ...]``.

    Args:
        core: a layer for which :func:`follows`.
        x: the parents' batch, ``[N * P, C, ...]`` or ``[P * N, C, ...]``.
        weight: ``[B * K, C, ...]``.
        bias: ``[B * K]`` or None.
        liveness: says before the backward which rows count.
        places: the level's rows in the batch.
    """
    return _Followed.apply(x, weight, bias, core, liveness, places)


class _Followed(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, bias, core, liveness, places):
        ctx.save_for_backward(x, weight)
        ctx.core, ctx.liveness, ctx.places = core, liveness, places
        ctx.biased = bias is not None
        if isinstance(core, nn.Linear):
            return F.linear(x, weight, bias)
        return core._conv_forward(x, weight, bias)

    @staticmethod
    def backward(ctx, dy) -> Any:
        x, weight = ctx.saved_tensors
        wanted = [*ctx.needs_input_grad[:2], ctx.biased and ctx.needs_input_grad[2]]
        live = ctx.liveness.live
        if live is not None:
            live = live.tolist()
            live = [live[row] for row in ctx.places.rows]
        if live is None or sum(live) > _MOST_LIVE * len(live):
            found = _gradients(ctx.core, x, weight, dy, wanted)
        else:
            found = _followed_gradients(ctx.core, x, weight, dy, wanted, live, ctx.places)
        return (*found, None, None, None)


def _followed_gradients(
    core: nn.Module,
    x: Tensor,
    weight: Tensor,
    dy: Tensor,
    wanted: list[bool],
    live: list[bool],
    places: Places,
) -> list[Tensor | None]:
    """Parents whose rows count in the same branches are one batch.

    ``live``: whether they do, in the order of the places' rows.
    """
    parents, branches = places.parents, places.branches
    classes: dict[tuple[int, ...], list[int]] = {}
    for parent in range(parents):
        counts = live[parent * branches : (parent + 1) * branches]
        if taken := tuple(compress(range(branches), counts)):
            classes.setdefault(taken, []).append(parent)
    dx = dweight = dbias = None
    if wanted[0]:
        every = sum(map(len, classes.values())) == parents
        dx = torch.empty_like(x) if every else torch.zeros_like(x)
    if wanted[1]:
        dweight = torch.zeros_like(weight)
    if wanted[2]:
        dbias = weight.new_zeros(weight.shape[0])
    for taken, members in classes.items():
        batch = _Members(members, parents, places.samples_first)
        upstream = batch.of(_channels(dy, taken, branches, 1))
        own = _channels(weight, taken, branches, 0)
        back, *of_weights = _gradients(core, batch.of(x), own, upstream, wanted)
        if dx is not None:
            batch.put(back, dx)
        for total, part in zip((dweight, dbias), of_weights, strict=True):
            if total is not None:
                for branch, gradient in zip(taken, part.chunk(len(taken)), strict=True):
                    total.unflatten(0, (branches, -1))[branch].add_(gradient)
    return [dx, dweight, dbias]


def _channels(values: Tensor, taken: tuple[int, ...], branches: int, dim: int) -> Tensor:
    """The channels of some branches, which lie side by side."""
    if len(taken) == branches:
        return values
    parts = values.chunk(branches, dim)
    return torch.cat([parts[branch] for branch in taken], dim) if taken[1:] else parts[taken[0]]


class _Members:
    """Some parents' samples in a batch; where the parents lie side by side, nothing is looked up.

    Args:
        members: numbers of parents, ascending.
        parents: how many there are.
        samples_first: see :class:`Places`.
    """

    def __init__(self, members: list[int], parents: int, samples_first: bool) -> None:
        self.members, self.parents, self.samples_first = members, parents, samples_first
        self.dim = 1 if samples_first else 0
        self.side_by_side = members[-1] - members[0] + 1 == len(members)

    def of(self, batch: Tensor) -> Tensor:
        """Their samples alone, as a batch in the same memory format."""
        if len(self.members) == self.parents:
            return batch
        if not batch.is_contiguous() and batch.dim() == 4:
            return self._picked(batch.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
        return self._picked(batch)

    def put(self, part: Tensor, batch: Tensor) -> None:
        """Their samples into their places."""
        split, part = self._split(batch, self.parents), self._split(part, len(self.members))
        if self.side_by_side:
            split.narrow(self.dim, self.members[0], len(self.members)).copy_(part)
        else:
            split.index_copy_(self.dim, torch.tensor(self.members), part)

    def _picked(self, batch: Tensor) -> Tensor:
        split = self._split(batch, self.parents)
        if self.side_by_side:
            part = split.narrow(self.dim, self.members[0], len(self.members))
        else:
            part = split.index_select(self.dim, torch.tensor(self.members))
        return part.flatten(0, 1)

    def _split(self, batch: Tensor, parents: int) -> Tensor:
        return batch.unflatten(0, (-1, parents) if self.samples_first else (parents, -1))


def _gradients(
    core: nn.Module, x: Tensor, weight: Tensor, dy: Tensor, wanted: list[bool]
) -> list[Tensor | None]:
    """Of input, weight and bias; differentiable."""
    if isinstance(core, nn.Linear):
        return [
            dy @ weight if wanted[0] else None,
            dy.t() @ x if wanted[1] else None,
            dy.sum(0) if wanted[2] else None,
        ]
    found = torch.ops.aten.convolution_backward(
        dy, x, weight, [weight.shape[0]], core.stride, core.padding, core.dilation,
        False, [0] * (x.dim() - 2), 1, wanted,
    )  # fmt: skip
    return [gradient if wants else None for gradient, wants in zip(found, wanted, strict=True)]
