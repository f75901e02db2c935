"""Levels and heads in plain PyTorch, on any device and in any dtype."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call

from lasem_fast.fold import Fold, RowsFirst, folded
from lasem_fast.layers import PlainStage, flatten_then_linear, plain_stage, same_form
from lasem_fast.network import tensors_in_force
from lasem_fast.transfer import Branch


def wide_level(branches: Sequence[Branch], h: Fold, rows: int) -> Tensor | None:
    """A level on which every row goes through every branch, as one wide layer.

    Args:
        branches: the B branches of a stage.
        h: the level's input, folded ``[N * P, ...]``.
        rows: number of rows P; the wide layer does not need it.

    Returns:
        The output ``[N * P * B, ...]``, branch innermost; None unless every branch is one
        convolution or linear layer between parameter-free layers, of the same form.
    """
    wide = _wide(branches)
    if wide is None:
        return None
    stage, weights = wide
    h = folded(h)
    for layer in stage.before:
        h = layer(h)
    if isinstance(stage.core, nn.Linear) and h.dim() != 2:
        return None
    h = functional_call(stage.core, weights, (h,))
    for layer in stage.after:
        h = layer(h)
    return _branches_into_batch(h, len(branches))


def channels_last_level(branches: Sequence[Branch], h: Fold, rows: int) -> RowsFirst | None:
    """:func:`wide_level` on channels-last images, for 2D convolutions that give images.

    Args:
        branches: the B branches of a stage.
        h: the level's input, P ``rows`` of images.
        rows: number of rows P.

    Returns:
        The output with ``P * B`` rows, branch innermost; None for any other stage or input.
    """
    wide = _wide(branches)
    if wide is None:
        return None
    stage, weights = wide
    flattens = any(type(layer) in (nn.Flatten, nn.Unflatten) for layer in _layers(stage))
    if type(stage.core) is not nn.Conv2d or flattens:
        return None
    if not isinstance(h, RowsFirst):
        h = folded(h)
        if h.dim() != 4:
            return None
    x = RowsFirst.of(h, rows).data.contiguous()
    if x.dim() != 5:
        return None
    images = x.flatten(0, 1).permute(0, 3, 1, 2)
    weights["weight"] = weights["weight"].contiguous(memory_format=torch.channels_last)
    for layer in stage.before:
        images = layer(images)
    images = functional_call(stage.core, weights, (images,))
    for layer in stage.after:
        images = layer(images)
    # [P * N, B * K, H, W] as [P, B, N, H, W, K]
    split = images.unflatten(1, (len(branches), -1)).unflatten(0, (rows, -1))
    return RowsFirst(split.permute(0, 2, 1, 4, 5, 3).contiguous().flatten(0, 1))


def _wide(branches: Sequence[Branch]) -> tuple[PlainStage, dict[str, Tensor]] | None:
    """A stage's layers, and its branches' weights as those of one wide layer; None if not plain."""
    if len(branches) == 1:
        return None
    plain = [plain_stage(branch.module) for branch in branches]
    first = plain[0]
    if first is None or any(not same_form(first, other) for other in plain[1:]):
        return None
    wide = {}
    for name in ("weight", "bias"):
        tensors = tensors_in_force(branches, plain, name)
        if tensors is None:
            return None
        if tensors[0] is not None:
            wide[name] = torch.cat(tensors)
    return first, wide


def _layers(stage: PlainStage) -> tuple[nn.Module, ...]:
    return (*stage.before, stage.core, *stage.after)


def _branches_into_batch(h: Tensor, branches: int) -> Tensor:
    """``[N, B * K, ...]`` as ``[N * B, K, ...]``: a view, but for channels-last activations."""
    if (
        h.dim() == 4
        and not h.is_contiguous()
        and h.is_contiguous(memory_format=torch.channels_last)
    ):
        split = h.unflatten(1, (branches, -1)).permute(0, 1, 3, 4, 2)
        return split.flatten(0, 1).permute(0, 3, 1, 2)
    return h.unflatten(1, (branches, -1)).flatten(0, 1)


def channels_last_head(head: nn.Module, h: Fold, rows: int) -> Tensor | None:
    """A head that flattens images and goes on with a linear layer, on channels-last images.

    The linear layer's weight is put into the images' order instead of the images into its own,
    which moves less memory.

    Args:
        head: a task's head.
        h: the leaves, images with rows outermost and channels last.
        rows: number of leaves P.

    Returns:
        The logits ``[P * N, K]``, rows outermost; None for any other head or form, and where the
        weight is the larger one.
    """
    if not isinstance(h, RowsFirst) or h.data.dim() != 5 or not flatten_then_linear(head):
        return None
    samples, height, width, channels = h.data.shape[1:]
    linear = head[1]
    if linear.in_features != height * width * channels or linear.out_features > rows * samples:
        return None
    weight = linear.weight.unflatten(1, (channels, height * width)).transpose(1, 2).flatten(1)
    logits = F.linear(h.data.flatten(2).flatten(0, 1), weight, linear.bias)
    return head[2:](logits)
