"""The `triton` backend: heads of linear layers, a launch for each, dropout included."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from typing import NamedTuple

import torch
from torch import Tensor, nn

from lasem_fast.backends.operations import Layer, Scores, Targets
from lasem_fast.backends.triton_dropout_op import dropped
from lasem_fast.backends.triton_level import TritonLevel, computed_in
from lasem_fast.backends.triton_scored_linear_op import DTYPES as SCORED_DTYPES
from lasem_fast.backends.triton_scored_linear_op import scored_linear
from lasem_fast.backends.triton_scores import kind_of, prior_form
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


def triton_scored_head(
    head: nn.Module,
    h: Fold,
    leaves: Sequence[int],
    order: Sequence[int] | None,
    targets: Targets,
    pair: bool,
) -> Scores | None:
    """The same with the posterior head, which is part of the last layer's launches.

    Returns:
        The scores; None for any other head, input, likelihood or precision, where nothing needs a
        gradient, and for outputs that are too many.
    """
    kind = kind_of(targets.likelihood)
    chain = None if kind is None else _chain(head, h, len(leaves), pair)
    if chain is None or not torch.is_grad_enabled():
        return None
    form = _last_form(chain, len(leaves), targets.y)
    if form is None:
        return None
    targets.check(chain.x.new_empty(1, dtype=form.dtype).expand(form.outputs))
    x = _before_last(chain, len(leaves), order, pair)
    if x is None:
        return None
    images = x if x.dim() == 5 else x[:, :, None, None]
    linear = chain.steps[-1].linear
    y = targets.y.flatten(1) if kind == "gaussian" else targets.y
    prior = prior_form(targets.prior, targets.task, targets.count)
    scores = scored_linear(
        images.contiguous(), linear.weight.contiguous(), *(_biases(linear) or [None]),
        index_tensor(tuple(leaves), x.device), y, **prior._asdict(), likelihood=kind,
        sigma=getattr(targets.likelihood, "sigma", 1.0), paired=pair,
    )  # fmt: skip
    return Scores(*scores, counted=prior.wins is not None)


class _Chain(NamedTuple):
    """A head of linear layers on its leaves.

    Attributes:
        x: the leaves, ``[P, N, H, W, C]`` or ``[P, N, F]``.
        flat: whether samples are flattened first.
        steps: the layers; at least one.
    """

    x: Tensor
    flat: bool
    steps: list[_Step]

    def layer(self, step: _Step) -> Layer:
        linear, behind = step.linear, step.behind
        return Layer(linear, [linear.weight], _biases(linear), self.flat, behind.relu, False,
                     behind.pool)  # fmt: skip


class _LastForm(NamedTuple):
    """What a head's outputs are: their dtype and shape ``[C, N, K]``."""

    dtype: torch.dtype
    outputs: tuple[int, int, int]


def _run(
    head: nn.Module, h: Fold, rows: int, order: Sequence[int] | None, *, pair: bool
) -> Tensor | None:
    chain = _chain(head, h, rows, pair)
    x = None if chain is None else _before_last(chain, rows, order, pair)
    if x is not None:
        x = _linear(chain, chain.steps[-1], x, rows, order)
    return None if x is None else x.flatten(0, 1)


def _chain(head: nn.Module, h: Fold, rows: int, pair: bool) -> _Chain | None:
    """The head's layers; None for any other head or input, with ``pair`` without dropout too."""
    layers = list(head) if type(head) is nn.Sequential else [head]
    if any(is_patched(layer) for layer in (head, *layers)):
        return None
    layers = [layer for layer in layers if not does_nothing(layer)]
    flat = bool(layers) and flattens_samples(layers[0])
    steps = _linear_steps(layers[1:] if flat else layers)
    if not steps or (pair and not any(step.drop for step in steps)):
        return None
    x = _rows_first(h, rows)
    if x is None or (x.dim() == 5 and not flat):
        return None
    return _Chain(x, flat, steps)


def _before_last(
    chain: _Chain, rows: int, order: Sequence[int] | None, pair: bool
) -> Tensor | None:
    """What the last linear layer reads; with ``pair`` first without dropout, then with it."""
    x = chain.x
    for step in chain.steps:
        if _OPERATION.why_not(chain.layer(step), x):
            return None
        if step.drop:
            images = x if x.dim() == 5 else x[:, :, None, None]
            images = dropped(images, step.drop, rows, pair=pair, places=_places(order, x.device))
            x = images if x.dim() == 5 else images.flatten(2)
        if step is chain.steps[-1]:
            return x
        x = _linear(chain, step, x, rows, None)
        if x is None:
            return None
    return None


def _linear(
    chain: _Chain, step: _Step, x: Tensor, rows: int, order: Sequence[int] | None
) -> Tensor | None:
    """One layer on all rows, which come out in an order."""
    count = x.shape[0]
    level = _one_branch(count, rows, None if order is None else tuple(order))
    # rows without dropout send no gradient back
    liveness = Liveness(_second_half(rows, x.device)) if count > rows else None
    return _OPERATION(chain.layer(step), x, level, None, liveness)


def _last_form(chain: _Chain, configs: int, y: Tensor) -> _LastForm | None:
    """Of a head whose last layer's launches can be the posterior head's too; else None."""
    x, step = chain.x, chain.steps[-1]
    linear = step.linear
    if _OPERATION.why_not(chain.layer(step), x) or step.behind.relu or not x.shape[1]:
        return None
    dtype = computed_in(x, [linear.weight, *_biases(linear)])
    if dtype not in SCORED_DTYPES or torch.float64 in (x.dtype, y.dtype):
        return None
    if len(chain.steps) == 1 and x.dtype != dtype:
        return None
    sizes = configs, x.shape[1], linear.in_features, linear.out_features
    from lasem_fast.kernels.scored_linear import takes  # and triton with it

    return _LastForm(dtype, (configs, x.shape[1], linear.out_features)) if takes(*sizes) else None


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
