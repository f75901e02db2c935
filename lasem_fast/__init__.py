"""lasem_fast: train a network while finding out which of its layers should be shared.

LASEM ("Sharing Less is More", Lee, Behpour, Eaton, ICML 2021) treats the transfer configuration of
a network as a latent variable; this package evaluates all configurations through a shared-prefix
tree.
"""

from importlib import import_module
from typing import Any

from lasem_fast import initialisers, likelihoods, nets, optim, priors, transfer
from lasem_fast.backends import choices
from lasem_fast.capture import CapturedStep, capture
from lasem_fast.configs import ConfigSpace
from lasem_fast.em import LASEM
from lasem_fast.em_step import EMStep
from lasem_fast.net import TransferNet
from lasem_fast.search.dispatch import backends
from lasem_fast.version import __version__

__all__ = [
    "LASEM",
    "CapturedStep",
    "ConfigSpace",
    "EMStep",
    "TransferNet",
    "__version__",
    "backends",
    "capture",
    "choices",
    "comparators",
    "datasets",
    "initialisers",
    "lifelong",
    "likelihoods",
    "metrics",
    "nets",
    "optim",
    "priors",
    "transfer",
]


_WHEN_ASKED_FOR = ("comparators", "datasets", "lifelong", "metrics")


def __getattr__(name: str) -> Any:
    """Imports what needs more than PyTorch (NumPy) when it is first asked for."""
    if name in _WHEN_ASKED_FOR:
        return import_module(f"lasem_fast.{name}")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
