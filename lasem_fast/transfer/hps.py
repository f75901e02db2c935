"""Hard parameter sharing: the shared branch is one module, weights and bias, for all tasks."""

from __future__ import annotations

from torch import nn

from lasem_fast.transfer.mechanism import Branch, TransferMechanism


class HardParameterSharing(TransferMechanism):
    """`hps`: all tasks use the very same weights where they share (Caruana, 1997)."""

    def shared_branch(self, stage: nn.Module, adapters: nn.Module | None) -> Branch:
        return Branch(stage)
