"""Which backend evaluates the configurations, and why another one cannot."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from lasem_fast import _ops
from lasem_fast.backends import cpu_scores, plain_torch, winograd
from lasem_fast.configs import Configuration
from lasem_fast.fastest import fastest
from lasem_fast.operations import Operations
from lasem_fast.plan import Plan
from lasem_fast.reference import NaiveLoop
from lasem_fast.tree import Tree

_AVAILABLE = "available"

# The first that takes a level is the one where nothing is measured.
_CPU_LEVELS = {
    "Winograd F(4x4, 3x3)": winograd.winograd_level,
    "Winograd F(3x3, 3x3)": winograd.small_tile_level,
    "Winograd F(2x2, 5x5)": winograd.large_filter_level,
    "PyTorch": plain_torch.wide_level,
    "PyTorch, channels last": plain_torch.channels_last_level,
}


def backends() -> dict[str, str]:
    """What each backend says of itself: ``"available"``, or why it is not."""
    why_not = _ops.why_unsupported()
    absent = "not available: this version of lasem_fast has no such kernels"
    return {
        "reference": _AVAILABLE,
        "torch": _AVAILABLE,
        "cpp": f"not available: {why_not}" if why_not else _AVAILABLE,
        "triton": absent,
        "cuda": absent,
    }


def choose(backend: Any) -> str:
    """The name of the backend to use.

    Raises:
        TypeError, ValueError: not the name of a backend.
        RuntimeError: the one that was asked for by name cannot run here; the message says why.
    """
    if not isinstance(backend, str):
        raise TypeError(f"backend: expected a name, got {type(backend).__name__}")
    known = backends()
    if backend == "auto":
        return "cpp" if known["cpp"] == _AVAILABLE else "torch"
    if backend not in known:
        raise ValueError(f"backend: expected one of {['auto', *known]}, got {backend!r}")
    if known[backend] != _AVAILABLE:
        raise RuntimeError(f"backend {backend!r}: {known[backend]}")
    return backend


def operations(backend: str) -> Operations:
    """What a backend that can run does in its own way."""
    if backend == "reference":
        return Operations()
    if backend == "cpp":
        return Operations(
            levels=(fastest(_CPU_LEVELS),),
            heads=(plain_torch.channels_last_head,),
            scores=(cpu_scores.scores,),
        )
    return Operations(levels=(plain_torch.wide_level,))


def evaluator(backend: str, configs: Sequence[Configuration]) -> NaiveLoop | Tree:
    """What evaluates these configurations with a backend that can run."""
    if backend == "reference":
        return NaiveLoop(configs)
    return Tree(Plan.of_configs(configs), operations(backend))
