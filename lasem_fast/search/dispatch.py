"""Which backend evaluates the configurations, and why another one cannot."""

from __future__ import annotations

import os
import warnings
from collections.abc import Sequence
from functools import cache
from importlib.util import find_spec
from typing import Any

import torch

from lasem_fast.backends import (
    choices,
    cpu_head,
    cpu_level,
    cpu_norm,
    cpu_ops,
    cpu_scores,
    plain_torch,
    triton_level,
    triton_linear_head,
    triton_scores,
)
from lasem_fast.backends.operations import LevelOperation, Operations
from lasem_fast.backends.ways import OneOf
from lasem_fast.configs import Configuration
from lasem_fast.levels.plan import Plan
from lasem_fast.tree.bounded import BoundedTree
from lasem_fast.tree.evaluation import Evaluator
from lasem_fast.tree.reference import NaiveLoop
from lasem_fast.tree.tree import Tree

_AVAILABLE = "available"

# One for all LASEMs of a process, so that each shape is looked up once.
# Where there is no CUDA device: in Triton's interpreter, or for a recording of the launches.
_WITHOUT_DEVICE: tuple[LevelOperation, ...] = (triton_level.GatherLevel(),)
# Compilers of kernels have bugs: before it is timed, Triton has to agree with PyTorch in float64.
_ON_GPU: tuple[LevelOperation, ...] = (
    OneOf(
        {
            "Triton": triton_level.TritonLevel(),
            "Triton, gathering": triton_level.GatherLevel(),
            "PyTorch": plain_torch.TorchLevel(),
        },
        "cuda",
        trusted="PyTorch",
    ),
)
_ON_CPU = OneOf({"C++": cpu_level.CpuLevel(), "PyTorch": plain_torch.TorchLevel()}, "cpu")


def backends() -> dict[str, str]:
    """What each backend says of itself: ``"available"``, or why it is not."""
    why_not = cpu_ops.why_unsupported()
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
            levels=(_ON_CPU,),
            heads=(
                cpu_head.linear_head,
                plain_torch.channels_last_head,
            ),
            scores=(cpu_scores.scores,),
            norms=(cpu_norm.CpuNorm(),),
        )
    if backend == "triton":
        # a net may stay on the CPU or move later, so the CPU's operations stand behind
        return operations("cpp" if cpu_ops.supported() else "torch").after(
            Operations(
                levels=_ON_GPU if torch.cuda.is_available() else _WITHOUT_DEVICE,
                heads=(triton_linear_head.triton_head,),
                heads_twice=(triton_linear_head.triton_head_twice,),
                scored_heads=(triton_linear_head.triton_scored_head,),
                scores=(triton_scores.scores,),
            )
        )
    return Operations()


def evaluator(
    backend: str, configs: Sequence[Configuration], max_memory: float | None = None
) -> Evaluator:
    """What evaluates these configurations with a backend that can run.

    Args:
        backend: its name.
        configs: as bits.
        max_memory: what a step may hold (see :func:`lasem_fast.tree.budget.bytes_of`); None:
            anything. The naive loop holds one configuration at a time for the E-step,
            whatever it is.
    """
    if backend == "reference":
        return NaiveLoop(configs)
    plan = Plan.of_configs(configs)
    if max_memory is None:
        # kernels for GPUs take neighbouring rows of a branch for one
        return Tree(plan.by_branch() if backend == "triton" else plan, operations(backend))
    return BoundedTree(plan, operations(backend), max_memory)
