"""The `cpp` backend: 3x3 or 5x5 convolution, ReLU and pool of a level as one Winograd kernel."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from lasem_fast import _ops
from lasem_fast.fold import Fold, RowsFirst, folded
from lasem_fast.layers import plain_stage, same_form
from lasem_fast.network import tensors_in_force
from lasem_fast.relu_and_pool import relu_and_pool
from lasem_fast.transfer import Branch


def winograd_level(
    branches: Sequence[Branch], h: Fold, rows: int, tile: int = 4, filter_size: int = 3
) -> RowsFirst | None:
    """A level whose stage is a convolution, ReLU and perhaps a 2x2 or 3x3 max-pool.

    Args:
        branches: the B branches of a stage.
        h: the level's input, P ``rows`` of float32 images on the CPU.
        rows: number of rows P.
        tile: m of the algorithm, F(m x m, r x r).
        filter_size: r, 3 or 5; the convolution has r x r filters and stride 1.

    Returns:
        The output with ``P * B`` rows, branch innermost; None for any other stage or input.
    """
    first = plain_stage(branches[0].module)
    behind = None if first is None or first.before else relu_and_pool(first.after)
    if behind is None or not behind.relu or not _fits(first.core, filter_size) or not _takes(h):
        return None
    pool = behind.pool
    stages = [first, *(plain_stage(branch.module) for branch in branches[1:])]
    if not all(same_form(first, stage) for stage in stages[1:]):
        return None
    weights = tensors_in_force(branches, stages, "weight")
    biases = tensors_in_force(branches, stages, "bias")
    if weights is None or biases is None or any(w.dtype != torch.float32 for w in weights):
        return None
    # channels-last weights are stacked as channels last
    weight = torch.stack(weights).contiguous()
    bias = weight.new_zeros(weight.shape[:2]) if biases[0] is None else torch.stack(biases)
    x = RowsFirst.of(h if isinstance(h, RowsFirst) else folded(h), rows).data.contiguous()
    padding = _padding(first.core)
    size = tuple(pool.output(n + 2 * padding - filter_size + 1) for n in x.shape[2:4])
    # every row through every branch, branch innermost
    parents = torch.arange(rows).repeat_interleave(len(branches))
    y = _ops.winograd_level(
        x, weight, bias, parents=parents, branches=torch.arange(len(branches)).repeat(rows),
        padding=padding, pool=pool.size, pool_pad=pool.padding, out_size=size, tile=tile,
    )  # fmt: skip
    return RowsFirst(y)


def small_tile_level(branches: Sequence[Branch], h: Fold, rows: int) -> RowsFirst | None:
    """:func:`winograd_level` by F(3x3, 3x3) where a pool of 3 follows: tiles and windows line up.

    Fewer outputs per multiplication, but none computed in vain where the image is no multiple of 4.
    """
    stage = plain_stage(branches[0].module)
    behind = None if stage is None else relu_and_pool(stage.after)
    if behind is None or behind.pool.size != 3:
        return None
    return winograd_level(branches, h, rows, tile=3)


def large_filter_level(branches: Sequence[Branch], h: Fold, rows: int) -> RowsFirst | None:
    """:func:`winograd_level` of 5x5 filters, by F(2x2, 5x5)."""
    return winograd_level(branches, h, rows, tile=2, filter_size=5)


def thrifty_level(branches: Sequence[Branch], h: Fold, rows: int) -> RowsFirst | None:
    """A level by the tile that takes the fewest products.

    A tile of F(m x m, r x r) takes (m + r - 1)^2 products for each pair of channels; None where a
    direct convolution, r^2 for each of its outputs, takes no more: on images of 2 x 2, say, where
    most of a tile lies outside.
    """
    stage = plain_stage(branches[0].module)
    if stage is None or not _takes(h):
        return None
    for filter_size, ways in _WAYS.items():
        if _fits(stage.core, filter_size):
            grown = 2 * _padding(stage.core) - filter_size + 1
            height, width = (n + grown for n in _image_size(h))
            direct = height * width * filter_size**2
            by_products = {
                -(-height // m) * -(-width // m) * (m + filter_size - 1) ** 2: way
                for m, way in ways
            }
            for products in sorted(by_products):
                if products >= direct:
                    break
                if (out := by_products[products](branches, h, rows)) is not None:
                    return out
    return None


# By filter size: the tile m and the operation; of equal ones the last is taken.
_WAYS = {3: ((3, small_tile_level), (4, winograd_level)), 5: ((2, large_filter_level),)}


def _image_size(h: Fold) -> tuple[int, int]:
    if isinstance(h, RowsFirst):
        return h.data.shape[2:4]
    return (h if isinstance(h, Tensor) else h.parts[0]).shape[2:4]


def _takes(h: Fold) -> bool:
    data = h.data if isinstance(h, RowsFirst) else (h if isinstance(h, Tensor) else h.parts[0])
    if isinstance(h, Tensor) and h.dim() != 4:
        return False
    return (
        data.device.type == "cpu"
        and data.dtype == torch.float32
        and not torch.is_autocast_enabled("cpu")
    )


def _fits(conv: nn.Module, filter_size: int) -> bool:
    return (
        type(conv) is nn.Conv2d
        and conv.kernel_size == (filter_size, filter_size)
        and conv.stride == (1, 1)
        and conv.dilation == (1, 1)
        and conv.padding_mode == "zeros"
        and _padding(conv) in range(filter_size)
    )


def _padding(conv: nn.Conv2d) -> int | None:
    """The padding on every side, of odd filters; None where the sides differ."""
    if conv.padding in ("same", "valid"):
        return conv.kernel_size[0] // 2 if conv.padding == "same" else 0
    return conv.padding[0] if conv.padding[0] == conv.padding[1] else None
