"""A convolution or linear layer of all branches side by side, in PyTorch on a CPU.

What autograd's own layer does not have: its backward leaves out rows that do not count, and it can
turn its images to rows outermost and channels last, with a ReLU behind it.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import lru_cache
from itertools import compress
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lasem_fast._host_values import is_transformed
from lasem_fast.backends import second_order
from lasem_fast.levels.row_liveness import Liveness

_CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
_relu_backward = torch.ops.aten.threshold_backward
_convolution_backward = torch.ops.aten.convolution_backward.default


class Wide(NamedTuple):
    """How a wide layer runs.

    Attributes:
        core: the layer of one branch, one that :func:`is_taken`.
        rows: for each of P parents and each of B branches, branch innermost, the level's row.
        branches: their number B.
        relu: whether a ReLU follows, and is part of it.
        rows_first: whether the batch is ``[P * N]``, else ``[N * P]`` with samples outermost.
        turned: whether the input has samples outermost and the output, images with their channels
            last, rows; then ``rows_first`` is the output's, and its gradient is written to: nobody
            else may hold it.
    """

    core: nn.Module
    rows: Sequence[int]
    branches: int
    relu: bool = False
    rows_first: bool = False
    turned: bool = False

    @property
    def parents(self) -> int:
        return len(self.rows) // self.branches


def is_taken(core: nn.Module, x: Tensor) -> bool:
    """Whether :func:`wide_core` is a way to run this layer."""
    if x.device.type not in ("cpu", "meta"):  # on the latter a step's costs are counted
        return False
    if torch.compiler.is_compiling() or is_transformed() or torch.is_autocast_enabled("cpu"):
        return False
    if x.is_complex():  # whose gradients are of conjugates
        return False
    if type(core) is nn.Linear:
        return x.dim() == 2
    return (
        type(core) in _CONVOLUTIONS
        and core.padding_mode == "zeros"
        and not isinstance(core.padding, str)
        and core.groups == 1
    )


def wide_core(
    how: Wide, x: Tensor, weight: Tensor, bias: Tensor | None, liveness: Liveness | None
) -> Tensor:
    """The layer's output.

    Args:
        how: the layer.
        x: the parents' batch, ``[N * P, C, ...]`` or ``[P * N, C, ...]``.
        weight: of all branches, ``[B * K, C, ...]``.
        bias: ``[B * K]`` or None.
        liveness: says before the backward which rows count; None: all.
    """
    return _WideCore.apply(x, weight, bias, how, liveness)


class _WideCore(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, bias, how, liveness):
        h = _turned(x, how.parents) if how.turned else x
        if isinstance(how.core, nn.Linear):
            y = F.linear(h, weight, bias)
        else:
            y = how.core._conv_forward(h, weight, bias)
        if how.relu:
            y.relu_()
        # x is what a gradient of the gradient is traced to
        ctx.save_for_backward(x, h if how.turned else None, weight, y if how.relu else None)
        ctx.how, ctx.liveness, ctx.biased = how, liveness, bias is not None
        return y

    @staticmethod
    def backward(ctx, dy) -> Any:
        x, h, weight, y = ctx.saved_tensors
        if ctx.how.turned:
            x = _turned(x, ctx.how.parents) if second_order.wanted() else h
        wanted = [*ctx.needs_input_grad[:2], ctx.biased and ctx.needs_input_grad[2]]
        live = None if ctx.liveness is None else ctx.liveness.live
        if live is not None:
            live = live.tolist()
        live = [live is None or live[row] for row in ctx.how.rows]
        return (*_gradients(ctx.how, x, weight, y, dy, wanted, live), None, None)


def _turned(x: Tensor, parents: int) -> Tensor:
    """``[N * P, C, H, W]`` as ``[P * N, C, H, W]``, channels last."""
    split = x.unflatten(0, (-1, parents)).permute(1, 0, 3, 4, 2)
    return split.contiguous().flatten(0, 1).permute(0, 3, 1, 2)


def _gradients(
    how: Wide,
    x: Tensor,
    weight: Tensor,
    y: Tensor | None,
    dy: Tensor,
    wanted: Sequence[bool],
    live: Sequence[bool],
) -> list[Tensor | None]:
    """Of input, weight and bias; differentiable. Parents of the same live branches are one batch.

    Args:
        how: the layer.
        x: its input, turned if it is.
        weight: ``[B * K, C, ...]``.
        y: the ReLU's output; None: there is no ReLU.
        dy: of the output.
        wanted: which gradients.
        live: for each of ``how.rows`` whether it counts.
    """
    dx = None
    of_weights: list[list[tuple[tuple[int, ...], Tensor]]] = [[], []]
    classes = _classes(tuple(live), how.branches)
    for taken, members in classes:
        part = _Part(members, taken, how)
        dz = part.of_gradient(dy, y)
        back, *found = _of_layer(how.core, part.of_input(x), part.of_weights(weight), dz, wanted)
        if back is not None:
            if part.has_parents and not how.turned:
                dx = back
            else:
                if dx is None:
                    every = sum(len(parents) for _, parents in classes) == how.parents
                    made = torch.empty_like if every else torch.zeros_like
                    plain = torch.contiguous_format if how.turned else torch.preserve_format
                    dx = made(x, memory_format=plain)
                part.put_input(back, dx)
        for parts, gradient in zip(of_weights, found, strict=True):
            if gradient is not None:
                parts.append((taken, gradient))
    if wanted[0] and dx is None:
        dx = torch.zeros_like(x)
    shapes = weight.shape[1:], ()
    return [dx, *(
        _side_by_side(parts, weight, shape, how.branches) if wants else None
        for parts, shape, wants in zip(of_weights, shapes, wanted[1:], strict=True)
    )]  # fmt: skip


@lru_cache(maxsize=256)
def _classes(live: tuple[bool, ...], branches: int) -> list[tuple[tuple[int, ...], list[int]]]:
    """The parents of every set of live branches, those with all of them first."""
    found: dict[tuple[int, ...], list[int]] = {}
    for parent in range(len(live) // branches):
        counts = live[parent * branches : (parent + 1) * branches]
        if taken := tuple(compress(range(branches), counts)):
            found.setdefault(taken, []).append(parent)
    return sorted(found.items(), key=lambda item: -len(item[0]))


def _side_by_side(
    parts: Sequence[tuple[tuple[int, ...], Tensor]],
    weight: Tensor,
    shape: Sequence[int],
    branches: int,
) -> Tensor:
    """The branches' gradients, each ``[K, *shape]``; 0 where nothing was found.

    Args:
        parts: branches and the gradients of theirs, side by side.
        weight: ``[B * K, ...]``.
        shape: of a branch's gradient, without K.
        branches: their number B.
    """
    width = len(weight) // branches
    if parts and len(parts[0][0]) == branches:
        (_, whole), *parts = parts
    else:
        whole = weight.new_zeros((len(weight), *shape))
    for taken, gradient in parts:
        for at, first, count in _runs(taken):
            own = gradient.narrow(0, at * width, count * width)
            whole.narrow(0, first * width, count * width).add_(own)
    return whole


class _Part:
    """Some parents through some branches: a part of a level's batch and of a layer's weights.

    Args:
        parents: their numbers, ascending.
        branches: their numbers, ascending.
        how: the whole layer.
    """

    def __init__(self, parents: Sequence[int], branches: Sequence[int], how: Wide) -> None:
        self.parents, self.branches, self.how = parents, branches, how
        self.has_parents = len(parents) == how.parents
        self.has_branches = len(branches) == how.branches
        neighbours = parents[-1] - parents[0] + 1 == len(parents)
        self.is_slice = self.has_parents or (how.rows_first and neighbours)

    def of_input(self, x: Tensor) -> Tensor:
        """The parents' samples as a batch; a view where they lie side by side."""
        if self.is_slice:
            return self._slice(x)
        part = self._empty(x, x.shape[1])
        for ours, whole in self._pairs(part, x):
            ours.copy_(whole)
        return part

    def of_gradient(self, dy: Tensor, y: Tensor | None) -> Tensor:
        """The gradient of what the ReLU reads, in these rows; ``y``: its output, None: no ReLU."""
        if self.is_slice and self.has_branches:
            dy = self._slice(dy)
            if y is None:
                return dy
            y = self._slice(y)
            if self.how.turned and not torch.is_grad_enabled():
                return _relu_backward.grad_input(dy, y, 0, grad_input=dy)
            return _relu_backward(dy, y, 0)
        width = dy.shape[1] // self.how.branches
        part = self._empty(dy if y is None else y, len(self.branches) * width)
        for ours, *whole in self._pairs(part, *([dy] if y is None else [dy, y])):
            for at, first, count in _runs(self.branches):
                target = ours.narrow(2, at * width, count * width)
                source = [s.narrow(2, first * width, count * width) for s in whole]
                if y is None:
                    target.copy_(*source)
                elif torch.is_grad_enabled():
                    target.copy_(_relu_backward(*source, 0))
                else:
                    _relu_backward.grad_input(*source, 0, grad_input=target)
        return part

    def of_weights(self, weight: Tensor) -> Tensor:
        """The branches' weights, side by side."""
        if self.has_branches:
            return weight
        parts = weight.chunk(self.how.branches)
        if len(self.branches) == 1:
            return parts[self.branches[0]]
        return torch.cat([parts[branch] for branch in self.branches])

    def put_input(self, part: Tensor, dx: Tensor) -> None:
        """The samples' gradients into those of the layer's own input."""
        ours = self._split(part, len(self.parents))
        rows_first = self.how.rows_first and not self.how.turned
        whole = _by_parent(dx, self.how.parents, rows_first)
        for at, first, count in _runs(self.parents):
            whole.narrow(0, first, count).copy_(ours.narrow(0, at, count))

    def _slice(self, batch: Tensor) -> Tensor:
        if self.has_parents:
            return batch
        samples = batch.shape[0] // self.how.parents
        return batch.narrow(0, self.parents[0] * samples, len(self.parents) * samples)

    def _empty(self, like: Tensor, channels: int) -> Tensor:
        samples = like.shape[0] // self.how.parents * len(self.parents)
        last = like.dim() == 4 and like.is_contiguous(memory_format=torch.channels_last)
        return torch.empty(
            (samples, channels, *like.shape[2:]), dtype=like.dtype,
            memory_format=torch.channels_last if last else torch.contiguous_format,
        )  # fmt: skip

    def _pairs(self, part: Tensor, *whole: Tensor) -> Iterator[list[Tensor]]:
        """The same parents in a batch of them alone and in batches of all, ``[p, N, C, ...]``."""
        ours = self._split(part, len(self.parents))
        theirs = [self._split(batch, self.how.parents) for batch in whole]
        for at, first, count in _runs(self.parents):
            yield [ours.narrow(0, at, count), *[t.narrow(0, first, count) for t in theirs]]

    def _split(self, batch: Tensor, parents: int) -> Tensor:
        return _by_parent(batch, parents, self.how.rows_first)


def _by_parent(batch: Tensor, parents: int, rows_first: bool) -> Tensor:
    """A view ``[P, N, ...]``."""
    if rows_first:
        return batch.unflatten(0, (parents, -1))
    return batch.unflatten(0, (-1, parents)).transpose(0, 1)


def _runs(numbers: Sequence[int]) -> list[tuple[int, int, int]]:
    """Runs of neighbours in ascending numbers: where in the list, from which number, how many."""
    starts = [i for i, n in enumerate(numbers) if i == 0 or numbers[i - 1] != n - 1]
    ends = [*starts[1:], len(numbers)]
    return [(a, numbers[a], b - a) for a, b in zip(starts, ends, strict=True)]


def _of_layer(
    core: nn.Module, x: Tensor, weight: Tensor, dy: Tensor, wanted: Sequence[bool]
) -> list[Tensor | None]:
    """Gradients of input, weight and bias of the layer alone; differentiable."""
    if isinstance(core, nn.Linear):
        return [
            dy @ weight if wanted[0] else None,
            dy.t() @ x if wanted[1] else None,
            dy.sum(0) if wanted[2] else None,
        ]
    found = _convolution_backward(
        dy, x, weight, [weight.shape[0]], core.stride, core.padding, core.dilation,
        False, [0] * (x.dim() - 2), 1, wanted,
    )  # fmt: skip
    return [gradient if wants else None for gradient, wants in zip(found, wanted, strict=True)]
