"""Which way every stage of a net takes with a backend, and why."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from lasem_fast.backends.operations import Operations
from lasem_fast.lifelong.run_checks import evaluating
from lasem_fast.net import TransferNet
from lasem_fast.networks.network import Network
from lasem_fast.search import dispatch
from lasem_fast.tree import fused_stage


class StageWay(NamedTuple):
    """One stage.

    Attributes:
        stage: its number, from 1.
        way: ``"kernels"`` (all its layers), ``"PyTorch"``, or both; where a random layer makes the
            M-step's another one, that of each step.
        why: for what is left to PyTorch, the reason in words.
    """

    stage: int
    way: str
    why: str

    def __str__(self) -> str:
        return f"{self.way} ({self.why})" if self.why else self.way


def stage_ways(net: TransferNet, task: str, backend: str, x: Tensor) -> list[StageWay]:
    """How each stage runs when all configurations of a mini-batch are evaluated.

    Args:
        net: the net, in the modes that are meant.
        task: a task that has not ended.
        backend: name of a backend that can run.
        x: a mini-batch, of which one sample is looked at.
    """
    operations = dispatch.operations(backend)
    network = Network(net.branches(task), net.heads[task], task)
    inputs = _inputs(net, network, x)
    with network.random_layers_off():
        e_step = _ways(operations, network, inputs)
    return [
        noisy if calm.way == noisy.way
        else StageWay(calm.stage, f"E-step: {calm.way}, M-step: {noisy.way}", noisy.why)
        for calm, noisy in zip(e_step, _ways(operations, network, inputs), strict=True)
    ]  # fmt: skip


@torch.no_grad()
def _inputs(net: TransferNet, network: Network, x: Tensor) -> list[Tensor]:
    """What comes to each stage, of one sample."""
    inputs = [x[:1].clone()]
    with evaluating(net):
        for branches in network.stages[:-1]:
            branch = next(branch for branch in branches if branch is not None)
            inputs.append(branch(inputs[-1]))
    return inputs


def _ways(operations: Operations, network: Network, inputs: Sequence[Tensor]) -> list[StageWay]:
    ways = []
    for number, (branches, h) in enumerate(zip(network.stages, inputs, strict=True), start=1):
        there = [branch for branch in branches if branch is not None]
        found = fused_stage.why_not(operations.levels, there, h, operations.norms)
        ways.append(_way(number, found, bool(operations.levels)))
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
