"""Dropout of a head's input, rows first, with the rows that no mask touches beside it: one launch.

The mask lies as PyTorch draws it, over the folded batch with samples outermost, so that equal
seeds drop the same values whatever evaluates the head.
"""

from __future__ import annotations

from math import prod

import torch
import triton
import triton.language as tl
from torch import Tensor

from lasem_fast.kernels.early_launch import early, wait_for_others
from lasem_fast.kernels.kept import kept
from lasem_fast.kernels.launches import Launch
from lasem_fast.kernels.level_geometry import passes_int32, reach
from lasem_fast.kernels.level_tiles import cdiv

# what the output's first half holds, if it has one
ALONE, CALM, ZERO = tl.constexpr(0), tl.constexpr(1), tl.constexpr(2)
_BLOCK = 512


@triton.jit(do_not_specialize=["rows", "first", "samples"])
def dropout_kernel(
    x, mask, places, y, rows, first, samples, x_p, x_n, x_h, x_w, x_c, scale,
    HEIGHT: tl.constexpr, WIDTH: tl.constexpr, CHANNELS: tl.constexpr, HALF: tl.constexpr,
    IN_PLACES: tl.constexpr, WIDE: tl.constexpr, BLOCK: tl.constexpr,
    EARLY: tl.constexpr,
):  # fmt: skip
    """y [rows or 2 rows, N, H, W, C] from x [P, N, H, W, C]; see dropout."""
    wait_for_others(EARLY)
    index: tl.constexpr = tl.int64 if WIDE else tl.int32
    FEATURES: tl.constexpr = HEIGHT * WIDTH * CHANNELS
    at = tl.program_id(0).to(index) * BLOCK + tl.arange(0, BLOCK)
    total = rows.to(index) * samples * FEATURES
    inside = at < total
    channel = at % CHANNELS
    w = at // CHANNELS % WIDTH
    h = at // (CHANNELS * WIDTH) % HEIGHT
    image = at // FEATURES
    row = image // samples
    n = image - row * samples
    pixel = n * x_n + h * x_h + w * x_w + channel * x_c
    of_sample = (channel * HEIGHT + h) * WIDTH + w
    place = row
    if IN_PLACES:
        place = tl.load(places + row, mask=inside, other=0).to(index)
    kept = tl.load(mask + (n * rows + place) * FEATURES + of_sample, mask=inside, other=0)
    value = tl.load(x + (row + first) * x_p + pixel, mask=inside, other=0.0)
    # chosen, not multiplied: what overflowed and is dropped is 0
    dropped = tl.where(kept != 0, value.to(tl.float32) * scale, 0.0).to(y.dtype.element_ty)
    if HALF == ALONE:
        tl.store(y + at, dropped, mask=inside)
    else:
        calm = tl.zeros((BLOCK,), y.dtype.element_ty)
        if HALF == CALM:
            calm = tl.load(x + row * x_p + pixel, mask=inside, other=0.0)
        tl.store(y + at, calm, mask=inside)
        tl.store(y + total + at, dropped, mask=inside)


def dropout(
    x: Tensor, mask: Tensor, places: Tensor | None, rows: int, first: int, scale: float, half: int
) -> Tensor:
    """Drops values of ``rows`` rows of ``x``.

    Args:
        x: ``[P, N, H, W, C]``, any strides; float32, float16 or bfloat16.
        mask: bool, contiguous, ``N * rows * C * H * W`` values in this order; False: dropped.
        places: int64 ``[rows]``, which row of the mask each of them has; None: its own.
        rows: how many are dropped from.
        first: the first of them.
        scale: of what is kept.
        half: ``ALONE``: the output is these rows; ``CALM``: before them, as many of the first rows
            of ``x`` as they are; ``ZERO``: before them, zeros in their place.

    Returns:
        ``[rows, N, H, W, C]``, or twice as many rows, contiguous.
    """
    y = x.new_empty((rows if half == ALONE.value else 2 * rows, *x.shape[1:]))
    if rows * x[0].numel() == 0:
        return y
    launch = _launch(
        tuple(x.shape), x.stride(), rows, first, scale, half, places is not None, x.device
    )
    launch(x, mask.view(torch.uint8), mask if places is None else places, y)
    return y


@kept
def _launch(
    x: tuple[int, ...], strides: tuple[int, ...], rows: int, first: int, scale: float, half: int,
    in_places: bool, device: torch.device,
) -> Launch:  # fmt: skip
    _, samples, height, width, channels = x
    values = rows * prod(x[1:])
    return Launch(
        dropout_kernel, (cdiv(values, _BLOCK),), (rows, first, samples, *strides, scale),
        HEIGHT=height, WIDTH=width, CHANNELS=channels, HALF=half, IN_PLACES=in_places,
        WIDE=passes_int32(reach(x, strides), 2 * values + _BLOCK), BLOCK=_BLOCK, num_warps=4,
        **early(device),
    )  # fmt: skip
