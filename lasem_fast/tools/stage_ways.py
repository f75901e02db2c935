"""Which way every stage of a net takes with a backend, and why."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from lasem_fast import _dispatch, fused_stage
from lasem_fast.net import TransferNet


class StageWay(NamedTuple):
    """One stage.

    Attributes:
        stage: its number, from 1.
        way: ``"kernels"`` (all its layers), ``"PyTorch"``, or both.
        why: for what is left to PyTorch, the reason in words.
    """

    stage: int
    way: str
    why: str


@torch.no_grad()
def stage_ways(net: TransferNet, task: str, backend: str, x: Tensor) -> list[StageWay]:
    """How each stage runs when all configurations of a mini-batch are evaluated.

    Args:
        net: the net.
        task: a task that has not ended.
        backend: name of a backend that can run.
        x: a mini-batch, of which one sample is looked at.
    """
    operations = _dispatch.operations(backend).levels
    h, ways = x[:1], []
    for number, branches in enumerate(net.branches(task), start=1):
        there = [branch for branch in branches if branch is not None]
        ways.append(_way(number, fused_stage.why_not(operations, there, h), bool(operations)))
        h = there[0](h)
    return ways


def _way(number: int, found: list[tuple[str, str]] | str, has_kernels: bool) -> StageWay:
    if not has_kernels:
        return StageWay(number, "PyTorch", "the backend has no kernels for levels")
    if isinstance(found, str):
        return StageWay(number, "PyTorch", found)
    left = [f"{name}: {why}" if name else why for name, why in found if why]
    if not left:
        return StageWay(number, "kernels", "")
    way = "PyTorch" if len(left) == len(found) else "kernels and PyTorch"
    return StageWay(number, way, "; ".join(left))
