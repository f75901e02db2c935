"""Tensor factorisation: a shared tensor that a task turns with one square factor per mode."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor, nn

from lasem_fast._numbers import finite_number
from lasem_fast.initialisers import glorot_uniform_
from lasem_fast.transfer.generated import Factors, GeneratingMechanism, Knowledge


class TuckerFactors(Factors):
    """A task's ``[n, n]`` factor for each mode of the weight, and its bias."""

    def __init__(self, knowledge: Knowledge) -> None:
        super().__init__(knowledge)
        self.modes = nn.ParameterList(
            glorot_uniform_(knowledge.tensor.detach().new_empty(n, n), n, n)
            for n in knowledge.weight_shape
        )


class TensorFactorization(GeneratingMechanism):
    """`tf`: weight[a, b, ...] = sum_{i, j, ...} shared[i, j, ...] U_0[i, a] U_1[j, b] ...

    The shared tensor has the weight's shape, a mode per dimension: C_out, C_in and the kernel's
    sides for a convolution, outputs and inputs for a linear layer. The task has a square factor U
    per mode and the bias. An auxiliary term keeps the factors near orthogonal: for every factor the
    Frobenius norm (not squared) of U^T U - I, times ``aux_weight``, added once for each shared
    stage of a configuration and so weighted by the posterior; its gradient goes to factors only.

    Args:
        aux_weight: weight of the auxiliary term, at least 0; the release uses 0.1.
        init: how new specific branches are drawn. Shared tensors and factors are Glorot-uniform.

    Raises:
        ValueError: ``aux_weight`` is not as described, or (when the net is made) a stage has
            parameters outside convolutions and linear layers.

    Source: Yang and Hospedales, ICLR 2017; Bulat et al., AAAI 2020.
    """

    name = "tf"
    layer_types = (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.Linear)

    def __init__(
        self, aux_weight: float = 0.1, init: Callable[[nn.Module], object] | None = None
    ) -> None:
        super().__init__(init)
        self.aux_weight = finite_number(aux_weight, "aux_weight", zero=True)

    def new_knowledge(self, layer: nn.Module, number: int, where: str) -> Knowledge:
        out, inputs, *kernel = layer.weight.shape
        area = math.prod(kernel)
        shared = torch.empty_like(layer.weight.detach())
        return Knowledge(shared, (area * inputs, area * out), layer)

    def new_factors(self, knowledge: Knowledge) -> TuckerFactors:
        return TuckerFactors(knowledge)

    def weight(self, knowledge: Knowledge, factors: TuckerFactors) -> Tensor:
        weight = knowledge.tensor
        # under autocast a turned tensor would have another dtype than the next factor
        with torch.autocast(weight.device.type, enabled=False):
            for mode in factors.modes:  # each turn consumes the first mode and appends its result
                weight = torch.tensordot(weight, mode, dims=([0], [0]))
        return weight

    def auxiliary_loss(self, shared: nn.Module, adapters: nn.Module | None) -> Tensor | None:
        if adapters is None or self.aux_weight == 0:
            return None
        modes = [mode for factors in adapters for mode in factors.modes]
        # nothing of a small difference would be left in lower precision
        with torch.autocast(modes[0].device.type, enabled=False):
            norms = [
                torch.linalg.vector_norm(
                    mode.T @ mode - torch.eye(len(mode), dtype=mode.dtype, device=mode.device)
                )
                for mode in modes
            ]
            return self.aux_weight * torch.stack(norms).sum()
