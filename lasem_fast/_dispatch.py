"""Which backend evaluates the configurations, and why another one cannot."""

from __future__ import annotations

import os
import warnings
from collections.abc import Sequence
from functools import cache
from importlib.util import find_spec
from typing import Any

import torch

from lasem_fast import _ops, choices
from lasem_fast.backends import (
    cpu_head,
    cpu_scores,
    plain_torch,
    triton_level,
    triton_scores,
    winograd,
)
from lasem_fast.configs import Configuration
from lasem_fast.operations import Operations
from lasem_fast.plan import Plan
from lasem_fast.reference import NaiveLoop
from lasem_fast.tree import Tree
from lasem_fast.ways import OneOf

_AVAILABLE = "available"

_PYTORCH = {
    "PyTorch": plain_torch.wide_level,
    "PyTorch, channels last": plain_torch.channels_last_level,
}
_CPU_LEVELS = {
    "Winograd F(4x4, 3x3)": winograd.winograd_level,
    "Winograd F(3x3, 3x3)": winograd.small_tile_level,
    "Winograd F(2x2, 5x5)": winograd.large_filter_level,
    **_PYTORCH,
}
_GPU_LEVELS = {"Triton": triton_level.triton_level, **_PYTORCH}
# One for all LASEMs of a process, so that each shape is looked up once. What the rule leaves falls
# to PyTorch's wide level, which comes behind in each list of operations.
_ON_CPU = OneOf(_CPU_LEVELS, "cpu", rule=(winograd.thrifty_level,))
# Compilers of kernels have bugs: before it is timed, Triton has to agree with PyTorch in float64.
_ON_GPU = OneOf(_GPU_LEVELS, "cuda", rule=(triton_level.triton_level,), trusted="PyTorch")


def backends() -> dict[str, str]:
    """What each backend says of itself: ``"available"``, or why it is not."""
    why_not = _ops.why_unsupported()
    no_triton = _why_no_triton()
    return {
        "reference": _AVAILABLE,
        "torch": _AVAILABLE,
        "cpp": f"not available: {why_not}" if why_not else _AVAILABLE,
        "triton": f"not available: {no_triton}" if no_triton else _AVAILABLE,
    }


def _why_no_triton() -> str:
    """Why Triton kernels cannot run here, or ""; does not import triton."""
    if find_spec("triton") is None:
        return "triton is not installed"
    if os.environ.get("TRITON_INTERPRET") == "1" or torch.cuda.is_available():
        return ""
    return "there is no CUDA device"


def choose(backend: Any) -> str:
    """The name of the backend to use.

    Raises:
        TypeError, ValueError: not the name of a backend.
        ValueError: ``LASEM_FAST_CHOICES`` is not as :mod:`lasem_fast.choices` describes.
        RuntimeError: the one that was asked for by name cannot run here; the message says why.
    """
    if not isinstance(backend, str):
        raise TypeError(f"backend: expected a name, got {type(backend).__name__}")
    choices.process()
    known = backends()
    if backend == "auto":
        # the interpreter is for tests: nobody wants it who did not ask for it
        fast = ["triton", "cpp"] if torch.cuda.is_available() else ["cpp"]
        found = next(name for name in [*fast, "torch"] if known[name] == _AVAILABLE)
        if found != fast[0]:
            _warn_once(fast[0], known[fast[0]])
        return found
    if backend not in known:
        hint = "; 'triton' is the one for CUDA devices" if backend == "cuda" else ""
        raise ValueError(f"backend: expected one of {['auto', *known]}, got {backend!r}{hint}")
    if known[backend] != _AVAILABLE:
        raise RuntimeError(f"backend {backend!r}: {known[backend]}")
    return backend


@cache
def _warn_once(wanted: str, reason: str) -> None:
    """A silent fall-back would only be noticed by its speed."""
    warnings.warn(
        f"lasem_fast runs without its fast kernels, in plain PyTorch, which takes several times as "
        f"long: backend {wanted!r} is {reason}. backend='torch' says that this is meant.",
        RuntimeWarning,
        stacklevel=4,  # LASEM(...) -> choose -> here
    )


def operations(backend: str) -> Operations:
    """What a backend that can run does in its own way."""
    if backend == "reference":
        return Operations()
    if backend == "cpp":
        return Operations(
            levels=(_ON_CPU, plain_torch.wide_level),
            heads=(
                cpu_head.linear_head,
                plain_torch.channels_last_head,
            ),
            scores=(cpu_scores.scores,),
        )
    if backend == "triton":
        # a net may stay on the CPU or move later, so the CPU's operations stand behind
        return operations("cpp" if _ops.supported() else "torch").after(
            Operations(
                levels=(_ON_GPU, triton_level.triton_level),
                heads=(triton_level.triton_head,),
                scores=(triton_scores.scores,),
            )
        )
    return Operations(levels=(plain_torch.wide_level,))


def evaluator(backend: str, configs: Sequence[Configuration]) -> NaiveLoop | Tree:
    """What evaluates these configurations with a backend that can run."""
    if backend == "reference":
        return NaiveLoop(configs)
    return Tree(Plan.of_configs(configs), operations(backend))
