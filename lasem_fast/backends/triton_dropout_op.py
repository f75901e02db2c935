"""Contract of the Triton dropout: schema, fake and autograd.

The kernel, and triton with it, is imported when the operator first runs.
"""

from __future__ import annotations

import torch
from torch import Tensor

from lasem_fast.backends import second_order

# as in lasem_fast.kernels.dropout
_ALONE, _CALM, _ZERO = range(3)

_library = torch.library.Library("lasem_fast", "FRAGMENT")
_library.define(
    "dropout_triton(Tensor x, Tensor mask, Tensor? places, int rows, int first, float scale, "
    "int half) -> Tensor"
)
_dropout = torch.ops.lasem_fast.dropout_triton.default


@torch.library.register_fake("lasem_fast::dropout_triton", lib=_library)
def _(x, mask, places, rows, first, scale, half):
    return x.new_empty((rows if half == _ALONE else 2 * rows, *x.shape[1:]))


@torch.library.impl(_library, "dropout_triton", "CUDA")
@torch.library.impl(_library, "dropout_triton", "CPU")  # for Triton's interpreter
def _(x, mask, places, rows, first, scale, half):
    from lasem_fast.kernels.dropout import dropout

    if x.dim() != 5 or first + rows > x.shape[0]:
        raise ValueError(f"x: expected [P, N, H, W, C] with rows {first} to {first + rows - 1}, "
                         f"got {list(x.shape)}")  # fmt: skip
    if mask.dtype != torch.bool or mask.numel() != rows * x[0].numel() or mask.device != x.device:
        raise ValueError(f"mask: expected {rows * x[0].numel()} bool on {x.device}, got "
                         f"{mask.numel()} of {mask.dtype} on {mask.device}")  # fmt: skip
    if places is not None and (places.shape != (rows,) or places.dtype != torch.int64):
        raise ValueError(f"places: expected {rows} of int64, got {list(places.shape)} of "
                         f"{places.dtype}")  # fmt: skip
    return dropout(x, mask.contiguous(), places, rows, first, scale, half)


class _Dropout(torch.autograd.Function):
    """Half of the output or all of it is dropped from; see :func:`dropped`."""

    @staticmethod
    def forward(ctx, x, mask, places, rows, scale, half):
        ctx.save_for_backward(mask, places)
        ctx.sizes = rows, scale, half, x.shape[0]
        return _dropout(x, mask, places, rows, x.shape[0] - rows, scale, half)

    @staticmethod
    def backward(ctx, dy):
        mask, places = ctx.saved_tensors
        rows, scale, half, parents = ctx.sizes
        first = 0 if half == _ALONE else rows
        if second_order.wanted():
            noisy = dy[first:]
            samples, height, width, channels = noisy.shape[1:]
            kept = mask.view(samples, rows, channels, height, width).permute(1, 0, 3, 4, 2)
            kept = kept if places is None else kept[places]
            dx = torch.where(kept, noisy * scale, 0)
            if parents > rows:
                dx = torch.cat([torch.zeros_like(dx), dx])
        else:
            back = _ZERO if parents > rows else _ALONE
            dx = _dropout(dy, mask, places, rows, first, scale, back)
        return dx, None, None, None, None, None


def dropped(x: Tensor, p: float, rows: int, *, pair: bool, places: Tensor | None = None) -> Tensor:
    """Dropout of a head's input as ``torch.nn.functional.dropout`` would draw it.

    The mask is drawn for the folded batch ``[N * rows, C * H * W]``, samples outermost and
    flattened: one launch of PyTorch's, and one that uses it.

    Args:
        x: ``[rows, N, H, W, C]`` or, of a pair, ``[2 * rows, N, H, W, C]``; any strides.
        p: above 0 and below 1.
        rows: how many rows are dropped from: the last ones.
        pair: whether the rows without dropout are kept before those with it.
        places: int64 ``[rows]``, which row of the batch each is; None: they are in order.

    Returns:
        ``[rows, N, H, W, C]``; with ``pair``, ``[2 * rows, N, H, W, C]``, first without dropout:
        what ``x`` has first. That half gets no gradient.
    """
    count = rows * x[0].numel()
    # the draw depends on the size alone; what it is drawn for is not looked at
    drawn_for = x.detach().reshape(-1)[:count] if x.is_contiguous() else x.new_empty(count)
    mask = torch.native_dropout(drawn_for, p, True)[1]
    return _Dropout.apply(x, mask, places, rows, 1 / (1 - p), _CALM if pair else _ALONE)
