"""The `torch` backend: a level in plain PyTorch, on any device and in any dtype."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.func import functional_call

from lasem_fast.fold import Fold, folded
from lasem_fast.layers import plain_stage, same_form
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
    h = folded(h)
    for layer in first.before:
        h = layer(h)
    if isinstance(first.core, nn.Linear) and h.dim() != 2:
        return None
    h = functional_call(first.core, wide, (h,))
    for layer in first.after:
        h = layer(h)
    return _branches_into_batch(h, len(branches))


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
