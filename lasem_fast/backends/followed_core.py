"""A wide convolution or linear layer in PyTorch whose backward runs on the rows that count."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lasem_fast.levels.row_liveness import Liveness
from lasem_fast.networks.checks import is_transformed

_CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
# Picking rows moves memory: where nearly all count, the whole backward is faster.
_MOST_LIVE = 0.9


class Places(NamedTuple):
    """Where a level's rows lie in the folded batch of a wide layer.

    Attributes:
        rows: for each of P parents and B branches, the number of the row, int64 ``[P, B]``.
        samples_first: whether the batch is ``[N * P]`` with samples outermost, else ``[P * N]``.
    """

    rows: Tensor
    samples_first: bool


def follows(core: nn.Module, x: Tensor, liveness: Liveness | None) -> bool:
    """Whether :func:`followed` is a way to run this layer."""
    if liveness is None or x.device.type != "cpu" or not torch.is_grad_enabled():
        return False  # on a device nobody waits to see which rows count
    if torch.compiler.is_compiling() or is_transformed() or torch.is_autocast_enabled("cpu"):
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
        if live is not None and float(live[ctx.places.rows].float().mean()) > _MOST_LIVE:
            live = None
        if live is None:
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
    live: Tensor,
    places: Places,
) -> list[Tensor | None]:
    """Parents whose rows count in the same branches are one batch."""
    classes: dict[tuple[int, ...], list[int]] = {}
    for parent, counts in enumerate(live[places.rows].tolist()):
        taken = tuple(branch for branch, counted in enumerate(counts) if counted)
        if taken:
            classes.setdefault(taken, []).append(parent)
    parents, branches = places.rows.shape
    dx = dweight = dbias = None
    if wanted[0]:
        every = sum(map(len, classes.values())) == parents
        dx = torch.empty_like(x) if every else torch.zeros_like(x)
    if wanted[1]:
        dweight = torch.zeros_like(weight)
    if wanted[2]:
        dbias = weight.new_zeros(weight.shape[0])
    for taken, members in classes.items():
        rows, upstream = x, _channels(dy, taken, branches, 1)
        images = torch.tensor(members, device=x.device)
        images = _samples_of(images, parents, x.shape[0] // parents, places.samples_first)
        if len(members) < parents:
            rows, upstream = x.index_select(0, images), upstream.index_select(0, images)
        own = _channels(weight, taken, branches, 0)
        back, *of_weights = _gradients(core, rows, own, upstream, wanted)
        if dx is not None:
            dx.index_copy_(0, images, back)
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


def _samples_of(rows: Tensor, parents: int, samples: int, samples_first: bool) -> Tensor:
    """Where all samples of some parents lie in the batch."""
    n = torch.arange(samples, device=rows.device)
    if samples_first:
        return (n[:, None] * parents + rows).flatten()
    return (rows[:, None] * samples + n).flatten()


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
