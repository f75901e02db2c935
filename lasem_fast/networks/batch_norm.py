"""Batch norm in training mode: every configuration has the statistics of its own mini-batch.

A tree evaluates many rows of a level as one batch. A batch-norm layer inside sees each of them
apart, as if it were alone; what its running statistics move by is the mean over the rows, weighted
by the posterior of the configurations that go through them, and they move once per step.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lasem_fast._host_values import is_transformed
from lasem_fast.levels.fold import index_tensor
from lasem_fast.networks.layers import modules_in, uses_batch_statistics

OfRows = Callable[[Tensor, dict[Any, Tensor]], Tensor]
"""From the weights of the configurations ``[C]`` to those of some rows ``[R]``; what is found on
the way is kept in the dictionary for others with the same weights."""


class _Seen(NamedTuple):
    """A layer's statistics of some rows: mean and unbiased variance, ``[R, 2 * C]``."""

    statistics: Tensor
    weights: OfRows


class BatchNorms:
    """The batch-norm layers of a network during one step."""

    def __init__(self) -> None:
        self.begin()

    def begin(self, configs: Sequence[int] | None = None) -> None:
        """Forgets what was seen; what follows evaluates these configurations, None: all."""
        self._configs = configs
        # by layer and by how often it had been called in its branch before
        self._seen: dict[tuple[nn.Module, int], list[_Seen]] = {}
        self._is_done = False

    @contextmanager
    def apart(self, module: nn.Module, rows: int, samples: int, weights: OfRows) -> Iterator[None]:
        """Whatever runs in ``module`` meanwhile sees the rows of its input apart.

        Args:
            module: a branch of a stage, or a head.
            rows: how many there are.
            samples: N; the input is folded, ``[N * rows, ...]``.
            weights: gives the rows' weights.
        """
        calls: dict[nn.Module, int] = {}

        def forward(layer: nn.Module, h: Tensor) -> Tensor:
            if not uses_batch_statistics(layer, patched=True):  # since its stage was called
                return type(layer).forward(layer, h)
            if not torch.compiler.is_compiling() and is_checkpointed():
                raise ValueError(
                    f"net: expected {layer} in training mode outside of torch.utils.checkpoint, "
                    f"because what is run again in the backward does not know which samples "
                    f"belong to which configuration; LASEM(max_memory=...) saves memory instead"
                )
            out, seen = _folded(layer, h, rows, samples)
            calls[layer] = calls.get(layer, -1) + 1
            if seen is not None:
                self.note(layer, calls[layer], seen, weights)
            return out

        with _forward_of([module], forward):
            yield

    def note(self, layer: nn.Module, number: int, statistics: Tensor, weights: OfRows) -> None:
        """Keeps what a layer saw until the running statistics move.

        Args:
            layer: the batch norm.
            number: how often it had been called in its branch before.
            statistics: of each row, mean and unbiased variance ``[R, 2 * C]``.
            weights: gives the rows' weights.
        """
        # a checkpointed branch runs again in the backward
        if not self._is_done and layer.training and layer.running_mean is not None:
            self._seen.setdefault((layer, number), []).append(_Seen(statistics, weights))

    @torch.no_grad()
    def move(self, weights: Tensor) -> None:
        """Moves all running statistics seen, with the configurations' weights ``[C]``.

        As many times as each layer was called, in order. A layer whose rows have no weight stays
        as it is; what a row without weight holds, NaN as well, is of no account.
        """
        if self._configs is not None:
            weights = weights[torch.tensor(self._configs, device=weights.device)]
        known: dict[Any, Tensor] = {}
        alike: dict[tuple, list[_Moving]] = {}
        for (layer, number), parts in self._seen.items():
            of_rows = _joined([part.weights(weights, known) for part in parts])
            moving = _Moving(layer, _joined([part.statistics for part in parts]), of_rows)
            alike.setdefault((number, *moving.form()), []).append(moving)
        # a layer's further calls behind its first ones
        for key in sorted(alike, key=lambda key: key[0]):
            _move(alike[key])
        self._is_done = True
        self._seen = {}


@contextmanager
def frozen(modules: Sequence[nn.Module]) -> Iterator[None]:
    """Batch-norm layers that would use a batch's statistics scale and shift only; none moves."""

    def forward(layer: nn.Module, h: Tensor) -> Tensor:
        # under autocast the layer's own tensors have another dtype than what comes in
        zeros = h.new_zeros(h.shape[1], dtype=_held_in(layer, h))
        return F.batch_norm(
            h, zeros, zeros + 1, layer.weight, layer.bias, training=False, eps=layer.eps
        )

    with _forward_of(modules, forward):
        yield


@contextmanager
def _forward_of(
    modules: Sequence[nn.Module], forward: Callable[[nn.Module, Tensor], Tensor]
) -> Iterator[None]:
    layers = [layer for layer in modules_in(*modules) if uses_batch_statistics(layer)]
    for layer in layers:
        layer.__dict__["forward"] = partial(forward, layer)
    try:
        yield
    finally:
        for layer in layers:
            del layer.__dict__["forward"]


def is_checkpointed() -> bool:
    """Whether this runs in a part of a stage, or of a loop, that runs again in the backward."""
    frame = sys._getframe()
    while frame is not None:
        name = frame.f_globals.get("__name__", "")
        if name == "torch.utils.checkpoint":
            return True
        if name.startswith("lasem_fast.tree."):  # which may checkpoint whole stages
            return False
        frame = frame.f_back
    return False


def check_values(layer: nn.Module, values: int) -> None:
    """A variance needs more than one of a channel's values."""
    if values == 1:
        raise ValueError(
            f"x: expected more than one value per channel for {layer} in training mode, got one "
            f"sample of one"
        )


def _folded(layer: nn.Module, h: Tensor, rows: int, samples: int) -> tuple[Tensor, Tensor | None]:
    """What :func:`normalised` gives, of a folded batch."""
    layer._check_input_dim(h)
    if h.shape[0] != samples * rows:
        raise ValueError(
            f"net: expected {layer} in training mode to see one entry for each of the {samples} "
            f"samples, because every configuration has statistics of its own, got "
            f"{h.shape[0] / rows:g}; put it into evaluation mode or use GroupNorm or LayerNorm"
        )
    check_values(layer, h.numel() // (rows * h.shape[1]) if h.numel() else 0)
    # samples are outermost: all rows' channels side by side are the channels of one batch
    apart = h.reshape(samples, rows * h.shape[1], *h.shape[2:])
    weight, bias = (None if t is None else t.repeat(rows) for t in (layer.weight, layer.bias))
    out, statistics = normalised(layer, apart, rows, weight, bias)
    out = out.view(h.shape)
    if not h.is_contiguous() and h.dim() == 4:
        out = out.contiguous(memory_format=torch.channels_last)
    return out, statistics


def normalised(
    layer: nn.Module, apart: Tensor, rows: int, weight: Tensor | None, bias: Tensor | None
) -> tuple[Tensor, Tensor | None]:
    """PyTorch's batch norm of rows that are side by side as channels.

    Args:
        layer: a batch norm like that of each row.
        apart: ``[N, rows * C, ...]``.
        rows: how many there are.
        weight: ``[rows * C]``, or None.
        bias: likewise.

    Returns:
        The output, contiguous; mean and unbiased variance of each row, ``[rows, 2 * C]``, or None
        inside torch.func transforms.
    """
    mean = var = None
    if not is_transformed():  # those take no tensors that are written to
        dtype = _held_in(layer, apart)
        mean, var = torch.zeros(2, apart.shape[1], dtype=dtype, device=apart.device)
    # contiguous, and its gradient too, which goes through a vector: where a single image or its
    # gradient has odd strides, the gradient that PyTorch 2.13 gives is wrong
    apart = apart.contiguous()
    # with momentum 1 they become the batch's own
    out = F.batch_norm(apart, mean, var, weight, bias, training=True, momentum=1.0, eps=layer.eps)
    out = out.flatten().view(apart.shape)
    if mean is None:
        return out, None
    return out, torch.cat([mean.view(rows, -1), var.view(rows, -1)], dim=1)


def _held_in(layer: nn.Module, h: Tensor) -> torch.dtype:
    """The dtype of a batch norm's tensors; where it has none, that of its input."""
    held = layer.weight if layer.running_mean is None else layer.running_mean
    return h.dtype if held is None else held.dtype


def _joined(parts: list[Tensor]) -> Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(parts)


class _Moving(NamedTuple):
    """A layer, its statistics of some rows ``[R, 2 * C]`` and what these weigh, ``[R]``."""

    layer: nn.Module
    statistics: Tensor
    weights: Tensor

    def form(self) -> tuple:
        """What layers that move together have in common."""
        layer, running = self.layer, self.layer.running_mean
        tracks = layer.num_batches_tracked is not None
        return len(self.weights), running.dtype, running.device, layer.momentum, tracks


def _move(layers: list[_Moving]) -> None:
    """Moves layers of one form; as many operations as for one of them."""
    first, counts = layers[0].layer, [moving.layer.num_batches_tracked for moving in layers]
    running = [t for m in layers for t in (m.layer.running_mean, m.layer.running_var)]
    sizes = [len(t) for t in running]
    weights = torch.stack([m.weights for m in layers], dim=1).to(running[0].dtype)
    total = weights.sum(0)
    moves = total > 0
    if first.num_batches_tracked is not None:
        torch._foreach_add_(counts, [*moves.to(counts[0].dtype).unbind()])
    momentum = first.momentum
    if momentum is None:  # the mean over all mini-batches
        momentum = 1 / torch.stack(counts).clamp(min=1).to(weights.dtype)
    momentum = momentum * moves.to(weights.dtype)
    widths = index_tensor(tuple(2 * size for size in sizes[::2]), weights.device)

    def spread(t: Tensor) -> Tensor:
        """From layers to their channels, twice each."""
        return t.repeat_interleave(widths, dim=-1, output_size=sum(sizes))

    # chosen, not multiplied: 0 * NaN is NaN; and no product of matrices, which autocast rounds
    shares = spread(weights / total) * torch.cat([m.statistics for m in layers], dim=1)
    seen = torch.where(spread(weights > 0), shares, 0).sum(0)
    moved = torch.cat(running).lerp(seen, spread(momentum))
    torch._foreach_copy_(running, [*moved.split(sizes)])
