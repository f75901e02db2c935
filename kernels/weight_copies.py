"""Weights of all branches, channels last and in the dtype of the products; one launch."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from lasem_fast.kernels.level_geometry import device_of, same_strides
from lasem_fast.kernels.level_tiles import cdiv

_BLOCK = 1024


@triton.jit
def weight_copies_kernel(
    weight0, weight1, copy, w_o, w_c, w_h, w_w,
    BRANCHES: tl.constexpr, C_IN: tl.constexpr, C_OUT: tl.constexpr,
    KH: tl.constexpr, KW: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """copy [B, Co, KH, KW, C] of the weights [Co, C, KH, KW]."""
    SIZE: tl.constexpr = C_OUT * KH * KW * C_IN
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = at < BRANCHES * SIZE
    channel = at % C_IN
    kw = at // C_IN % KW
    kh = at // (C_IN * KW) % KH
    channel_out = at // (C_IN * KW * KH) % C_OUT
    weight = tl.where(at >= SIZE, weight1, weight0)
    weight += channel_out * w_o + channel * w_c + kh * w_h + kw * w_w
    tl.store(copy + at, tl.load(weight, mask=inside, other=0.0).to(copy.dtype.element_ty), inside)


def weight_copies(weights: Sequence[Tensor], dtype: torch.dtype) -> Tensor:
    """``[B * Co, KH * KW, C]`` in ``dtype``, contiguous, of one ``[Co, C, KH, KW]`` per branch.

    Args:
        weights: one or two, any strides.
        dtype: of the copy.
    """
    weights = same_strides(list(weights))
    channels_out, channels, kh, kw = weights[0].shape
    size = len(weights) * weights[0].numel()
    copy = weights[0].new_empty((len(weights) * channels_out, kh * kw, channels), dtype=dtype)
    with device_of(copy):
        weight_copies_kernel[cdiv(size, _BLOCK),](
            weights[0], weights[-1], copy, *weights[0].stride(),
            BRANCHES=len(weights), C_IN=channels, C_OUT=channels_out, KH=kh, KW=kw,
            BLOCK=_BLOCK, num_warps=4,
        )  # fmt: skip
    return copy
