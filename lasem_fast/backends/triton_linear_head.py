"""The `triton` backend: heads of linear layers, a launch for each, dropout included."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from typing import NamedTuple

import torch
from torch import Tensor, nn

from lasem_fast.backends.operations import Layer
from lasem_fast.backends.triton_dropout_op import dropped
from lasem_fast.backends.triton_level import TritonLevel
from lasem_fast.levels.fold import Fold, RowsFirst, folded, index_tensor
from lasem_fast.levels.plan import Level
from lasem_fast.levels.relu_and_pool import ReluAndPool, relu_and_pool
from lasem_fast.levels.row_liveness import Liveness
from lasem_fast.networks.layers import does_nothing, flattens_samples, is_patched

_OPERATION = TritonLevel()


class _Step(NamedTuple):
    """A linear layer of a head: dropout before it with probability ``drop``, ReLU behind it."""

    drop: float
    linear: nn.Linear
    behind: ReluAndPool


def triton_head(
    head: nn.Module, h: Fold, rows: int, order: Sequence[int] | None = None
) -> Tensor | None:
    """A head of linear layers with ReLU and dropout between them, behind a flatten or not.

    Args:
        head: a task's head.
        h: the leaves, P ``rows`` of images or vectors.
        rows: number of leaves P.
        order: for each row of the result, its leaf, in the order that masks are drawn in; None: as
            they are.

    Returns:
        The logits ``[P * N, K]``, rows outermost; None for any other head or input.
    """
    return _run(head, h, rows, order, pair=False)


def triton_head_twice(
    head: nn.Module, h: Fold, rows: int, order: Sequence[int] | None = None
) -> Tensor | None:
    """The same without its dropout and with it, in the launches of one of them.

    Returns:
        The logits ``[2 * P * N, K]``, first those without dropout, which have no gradient; None
        for any other head or input, or one without active dropout.
    """
    return _run(head, h, rows, order, pair=True)


def _run(
    head: nn.Module, h: Fold, rows: int, order: Sequence[int] | None, *, pair: bool
) -> Tensor | None:
    layers = list(head) if type(head) is nn.Sequential else [head]
    if any(is_patched(layer) for layer in (head, *layers)):
        return None
    layers = [layer for layer in layers if not does_nothing(layer)]
    flat = bool(layers) and flattens_samples(layers[0])
    steps = _linear_steps(layers[1:] if flat else layers)
    if not steps or (pair and not any(step.drop for step in steps)):
        return None
    x = _rows_first(h, rows)
    if x is None:
        return None
    for number, (drop, linear, behind) in enumerate(steps, 1):
        layer = Layer(linear, [linear.weight], _biases(linear), flat, behind.relu, False,
                      behind.pool)  # fmt: skip
        if _OPERATION.why_not(layer, x) or (x.dim() == 5 and not flat):
            return None
        if drop:
            images = x if x.dim() == 5 else x[:, :, None, None]
            images = dropped(images, drop, rows, pair=pair, places=_places(order, x.device))
            x = images if x.dim() == 5 else images.flatten(2)
        count = x.shape[0]
        last = number == len(steps)
        level = _one_branch(count, rows, tuple(order) if last and order is not None else None)
        # rows without dropout send no gradient back
        liveness = Liveness(_second_half(rows, x.device)) if count > rows else None
        x = _OPERATION(layer, x, level, None, liveness)
        if x is None:
            return None
    return x.flatten(0, 1)


def _places(order: Sequence[int] | None, device: torch.device) -> Tensor | None:
    """Where each leaf stands in ``order``, which masks are drawn in."""
    if order is None:
        return None
    return index_tensor(tuple(sorted(range(len(order)), key=order.__getitem__)), device)


@cache
def _one_branch(count: int, rows: int, order: tuple[int, ...] | None) -> Level:
    """Every leaf, in an order: once, or first without and then with dropout."""
    every = tuple(range(rows)) if order is None else order
    parents = tuple(row + half for half in range(0, count, rows) for row in every)
    return Level(parents, (0,) * count, count)


def _linear_steps(layers: list[nn.Module]) -> list[_Step]:
    """Every linear layer with what stands around it; empty where there are other layers."""
    starts = [i for i, layer in enumerate(layers) if type(layer) is nn.Linear]
    if not starts:
        return []
    steps, before = [], layers[: starts[0]]
    for start, stop in zip(starts, [*starts[1:], len(layers)], strict=True):
        drop = _dropout(before)
        between = layers[start + 1 : stop]
        drops = [i for i, layer in enumerate(between) if type(layer) is nn.Dropout]
        cut = drops[0] if drops else len(between)
        before = between[cut:]
        behind = relu_and_pool(between[:cut])
        if drop is None or behind is None or behind.pool.size > 1:
            return []
        steps.append(_Step(drop, layers[start], behind))
    return [] if before else steps


def _dropout(layers: list[nn.Module]) -> float | None:
    """The probability of the only dropout that there is, 0 without one; None for other layers."""
    if not layers:
        return 0.0
    fits = len(layers) == 1 and type(layers[0]) is nn.Dropout and layers[0].p < 1
    return layers[0].p if fits else None


def _rows_first(h: Fold, rows: int) -> Tensor | None:
    if not isinstance(h, RowsFirst):
        h = folded(h)
        if h.dim() not in (2, 4):
            return None
        h = RowsFirst.of(h, rows)
    return h.data


def _biases(linear: nn.Linear) -> list[Tensor]:
    return [] if linear.bias is None else [linear.bias]


def _second_half(rows: int, device: torch.device) -> Tensor:
    """The mask of the last of twice ``rows``; kept, because a CUDA graph goes on reading it."""
    if torch.compiler.is_compiling():
        return torch.arange(2 * rows, device=device) >= rows
    return _kept_half(rows, device)


@cache
def _kept_half(rows: int, device: torch.device) -> Tensor:
    with torch.inference_mode(False):
        return torch.arange(2 * rows, device=device) >= rows
