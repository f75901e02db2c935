"""Filters of all branches, channels last and in the dtype of the products; one launch."""

from __future__ import annotations

from collections.abc import Sequence
from math import prod

import torch
import triton
import triton.language as tl
from torch import Tensor

from lasem_fast.kernels.box_form import BoxForm, Filters
from lasem_fast.kernels.early_launch import early, wait_for_others
from lasem_fast.kernels.kept import kept
from lasem_fast.kernels.launches import Launch
from lasem_fast.kernels.level_geometry import arrivals_buffer, same_strides
from lasem_fast.kernels.level_tiles import cdiv
from lasem_fast.kernels.parts import nobody_yet

_BLOCK = 1024


@triton.jit
def weight_copies_kernel(
    weight0, weight1, copy, arrivals, w_o, w_c, w_h, w_w,
    BRANCHES: tl.constexpr, C_IN: tl.constexpr, C_OUT: tl.constexpr,
    KH: tl.constexpr, KW: tl.constexpr, LINE: tl.constexpr, BLOCK: tl.constexpr,
    EARLY: tl.constexpr,
):  # fmt: skip
    """copy [B, Co, LINE] of the weights [Co, C, KH, KW]: the filter, then zeros."""
    wait_for_others(EARLY)
    if tl.program_id(0) == 0:
        nobody_yet(arrivals)
    SIZE: tl.constexpr = C_OUT * LINE
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = at < BRANCHES * SIZE
    place = at % LINE
    channel = place % C_IN
    kw = place // C_IN % KW
    kh = place // (C_IN * KW)
    channel_out = at // LINE % C_OUT
    weight = tl.where(at >= SIZE, weight1, weight0)
    weight += channel_out * w_o + channel * w_c + kh * w_h + kw * w_w
    value = tl.load(weight, mask=inside & (place < C_IN * KH * KW), other=0.0)
    tl.store(copy + at, value.to(copy.dtype.element_ty), inside)


def weight_copies(weights: Sequence[Tensor], dtype: torch.dtype, form: BoxForm) -> Filters:
    """The filters of one ``[Co, C, KH, KW]`` per branch.

    Args:
        weights: one or two, any strides.
        dtype: of the copy.
        form: of the level.
    """
    weights = same_strides(list(weights))
    shape, launch = _launch(
        len(weights), tuple(weights[0].shape), weights[0].stride(), form.kernel, form.channels,
        weights[0].device,
    )  # fmt: skip
    copy, arrivals = weights[0].new_empty(shape, dtype=dtype), arrivals_buffer(weights[0])
    launch(weights[0], weights[-1], copy, arrivals)
    return Filters(copy, arrivals, len(weights), form.kernel)


@kept
def _launch(
    branches: int, weight: tuple[int, ...], strides: tuple[int, ...], kernel: tuple[int, int],
    channels: int, device: torch.device,
) -> tuple[tuple[int, ...], Launch]:  # fmt: skip
    """The copy's shape, and what makes it."""
    channels_out, channels_in, kh, kw = weight
    shape = branches * channels_out, prod(kernel), channels
    return shape, Launch(
        weight_copies_kernel, (cdiv(prod(shape), _BLOCK),), strides,
        BRANCHES=branches, C_IN=channels_in, C_OUT=channels_out, KH=kh, KW=kw,
        LINE=prod(kernel) * channels, BLOCK=_BLOCK, num_warps=4, **early(device),
    )  # fmt: skip
