"""Transfer mechanisms: how a stage's `shared` branch carries knowledge between tasks."""

from lasem_fast.transfer.dfcnn import DeconvolutionalFactorization, DeconvSizes
from lasem_fast.transfer.hps import HardParameterSharing
from lasem_fast.transfer.mechanism import Branch, TransferMechanism
from lasem_fast.transfer.tf import TensorFactorization

MECHANISMS = {
    "hps": HardParameterSharing,
    "tf": TensorFactorization,
    "dfcnn": DeconvolutionalFactorization,
}

__all__ = [
    "MECHANISMS",
    "Branch",
    "DeconvSizes",
    "DeconvolutionalFactorization",
    "HardParameterSharing",
    "TensorFactorization",
    "TransferMechanism",
]
