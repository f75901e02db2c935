"""Deconvolutional factorisation: a small shared tensor that a task deconvolves into kernels."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lasem_fast._numbers import is_whole
from lasem_fast.initialisers import glorot_uniform_
from lasem_fast.transfer.generated import Factors, GeneratingMechanism, Knowledge


class DeconvSizes(NamedTuple):
    """Sizes of one layer's tensors.

    Attributes:
        knowledge: side h of the shared tensor; the kernel's side is 2 h - 1.
        knowledge_channels: its channels.
        filter: side t of the task's deconvolution filters, odd.
        task_channels: channels of what the deconvolution gives.
    """

    knowledge: int
    knowledge_channels: int
    filter: int
    task_channels: int


class DeconvKnowledge(Knowledge):
    """The shared tensor ``[1, C_k, h, h]`` of a convolution."""

    def __init__(self, layer: nn.Conv2d, sizes: DeconvSizes) -> None:
        h, channels = sizes.knowledge, sizes.knowledge_channels
        shared = layer.weight.detach().new_empty(1, channels, h, h)
        super().__init__(shared, (h * h, h * channels), layer)  # release: [1, h, h, C_k]
        self.sizes = sizes


class DeconvolutionalFactors(Factors):
    """A task's deconvolution ``[C_k, C_t, t, t]`` with its bias, contraction and bias."""

    def __init__(self, knowledge: DeconvKnowledge) -> None:
        super().__init__(knowledge)
        _, channels, t, task = knowledge.sizes
        out, inputs = knowledge.weight_shape[:2]
        new = knowledge.tensor.detach().new_empty
        # the fans are those of the release's layouts [t, t, C_t, C_k] and [C_t, C_in, C_out]
        self.deconvolution = nn.Parameter(
            glorot_uniform_(new(channels, task, t, t), t * t * task, t * t * channels)
        )
        self.deconvolution_bias = nn.Parameter(glorot_uniform_(new(task), 1, task))
        self.contraction = nn.Parameter(
            glorot_uniform_(new(out, inputs, task), task * inputs, task * out)
        )


class DeconvolutionalFactorization(GeneratingMechanism):
    """`dfcnn`: kernel = contraction of a deconvolution of a small shared tensor.

    Shared by all tasks: a tensor ``[1, C_k, h, h]`` per convolution. The task's own: a
    deconvolution of stride 2 that makes ``[C_t, 2h - 1, 2h - 1]`` of it, with a bias, no
    activation; a contraction ``[C_out, C_in, C_t]`` of that to the kernel; the convolution's bias.
    The release's L2 term on these tensors has no effect there (its gradients are of size 1e-19)
    and is left out.

    Args:
        sizes: one :class:`DeconvSizes` per convolution of the net, in order. None: h from the
            kernel, C_k half of C_out (rounded up), t = 3 and C_t = 2 C_k; the paper's own tables
            follow no rule and are in :mod:`lasem_fast.nets`.
        init: how new specific branches are drawn. All other tensors are Glorot-uniform.

    Raises:
        ValueError: ``sizes`` is not as described, or (when the net is made) a stage has parameters
            outside ``nn.Conv2d``, or a kernel that is not square with an odd side: deconvolution
            gives no others, and no matrices.

    Source: Lee, Stokes, Eaton, "Learning Shared Knowledge for Deep Lifelong Learning Using
    Deconvolutional Networks", IJCAI 2019.
    """

    name = "dfcnn"
    layer_types = (nn.Conv2d,)

    def __init__(
        self,
        sizes: Sequence[DeconvSizes | Sequence[int]] | None = None,
        init: Callable[[nn.Module], object] | None = None,
    ) -> None:
        super().__init__(init)
        listed = isinstance(sizes, Sequence) and not isinstance(sizes, (str, bytes))
        if sizes is not None and not listed:
            raise TypeError(
                f"sizes: expected a sequence of DeconvSizes or None, got {type(sizes).__name__} "
                f"{sizes!r}"
            )
        self.sizes = None if sizes is None else [_checked(entry) for entry in sizes]

    def check_layer_count(self, count: int) -> None:
        if self.sizes is not None and len(self.sizes) != count:
            raise ValueError(
                f"sizes: expected one entry for each of the net's {count} convolutions, got "
                f"{len(self.sizes)}"
            )

    def new_knowledge(self, layer: nn.Module, number: int, where: str) -> DeconvKnowledge:
        height, width = layer.kernel_size
        if height != width or height % 2 == 0:
            raise ValueError(
                f"transfer='dfcnn': expected square kernels with an odd side, got "
                f"{height} x {width} at {where}"
            )
        sizes = _derived(layer) if self.sizes is None else self.sizes[number]
        if 2 * sizes.knowledge - 1 != height:
            raise ValueError(
                f"sizes: expected knowledge={(height + 1) // 2} for the {height} x {height} kernel "
                f"at {where}, got {sizes.knowledge}"
            )
        return DeconvKnowledge(layer, sizes)

    def new_factors(self, knowledge: DeconvKnowledge) -> DeconvolutionalFactors:
        return DeconvolutionalFactors(knowledge)

    def weight(self, knowledge: DeconvKnowledge, factors: DeconvolutionalFactors) -> Tensor:
        deconvolved = F.conv_transpose2d(
            knowledge.tensor,
            factors.deconvolution,
            factors.deconvolution_bias,
            stride=2,
            padding=(knowledge.sizes.filter - 1) // 2,
        )
        return torch.einsum("oit,thw->oihw", factors.contraction, deconvolved[0])


def _checked(entry: Any) -> DeconvSizes:
    try:
        sizes = DeconvSizes(*entry)
    except TypeError:
        raise ValueError(
            f"sizes: expected entries of {len(DeconvSizes._fields)} sizes {DeconvSizes._fields}, "
            f"got {entry!r}"
        ) from None
    if not all(is_whole(n) and n >= 1 for n in sizes) or sizes.filter % 2 == 0:
        raise ValueError(
            f"sizes: expected whole numbers of at least 1 and an odd filter, got {sizes}"
        )
    return DeconvSizes(*map(int, sizes))


def _derived(layer: nn.Conv2d) -> DeconvSizes:
    channels = -(-layer.out_channels // 2)
    return DeconvSizes((layer.kernel_size[0] + 1) // 2, channels, 3, 2 * channels)
