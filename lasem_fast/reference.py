"""The naive loop over configurations, as published: the specification of what the tree computes.

Every configuration is a network of d stages and a head that is run on its own, once for the E-step
and once more for the M-step. Nothing is shared between configurations but the weights.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from lasem_fast import _checks
from lasem_fast.configs import Configuration
from lasem_fast.network import Network
from lasem_fast.plan import SHARED, SPECIFIC


class NaiveLoop:
    """Evaluates configurations, given as bits, one after another."""

    def __init__(self, configs: Sequence[Configuration]) -> None:
        self.configs = configs

    def logits(self, network: Network, x: Tensor) -> Tensor:
        """The head's outputs ``[C, N, K]`` of all configurations, in the layers' present modes."""
        outputs = []
        for config in self.configs:
            h = x.clone()  # a stage may write to its input
            for i, (branches, shared) in enumerate(zip(network.stages, config, strict=True)):
                branch = branches[SHARED if shared else SPECIFIC]
                h = branch(h)
                _checks.check_is_tensor(h, branch.module, f"stage {i + 1}")
            logits = network.head(h)
            _checks.check_logits(logits, 1, x.shape[0], network.task)
            outputs.append(logits)
        return torch.stack(outputs)

    def logits_without_and_with_noise(self, network: Network, x: Tensor) -> tuple[Tensor, Tensor]:
        """Outputs ``[C, N, K]`` for the E-step (dropout off, no gradient) and for the M-step."""
        with torch.no_grad(), network.random_layers_off():
            e_step = self.logits(network, x)
        return e_step, self.logits(network, x)
