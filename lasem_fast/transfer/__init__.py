"""Transfer mechanisms: how a stage's `shared` branch carries knowledge between tasks."""

from lasem_fast.transfer.hps import HardParameterSharing
from lasem_fast.transfer.mechanism import Branch, TransferMechanism

MECHANISMS = {"hps": HardParameterSharing}

__all__ = ["MECHANISMS", "Branch", "HardParameterSharing", "TransferMechanism"]
