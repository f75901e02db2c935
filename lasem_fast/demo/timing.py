"""What one EM step costs, beside the naive loop and beside one plain training step."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from lasem_fast.em import LASEM
from lasem_fast.lifelong import Task
from lasem_fast.net import TransferNet

_WARM_UP = 3


def time_steps(
    make_net: Callable[[], TransferNet],
    make_head: Callable[[Task], nn.Module],
    task: Task,
    *,
    batch_size: int,
    backend: str = "auto",
    device: torch.device | str = "cpu",
    rounds: int = 20,
) -> dict[str, Any]:
    """Median wall-clock times in milliseconds of one optimisation step on one mini-batch.

    A step is zero_grad, forward, backward and an Adam step. ``em``: with ``backend``; ``naive``:
    with the reference backend, which runs every configuration on its own; ``plain``: one
    configuration by cross-entropy. The three take turns, so that a slow moment of the machine
    meets all of them.
    """
    task = task.to(device)
    x, y = (part[:batch_size] for part in task.train)

    def em_step(net: TransferNet, backend: str) -> tuple[str, Callable[[], None]]:
        em = LASEM(net, backend=backend)
        return em.backend, _step(net, task.name, lambda: em(x, y, task=task.name).loss)

    def plain_step(net: TransferNet) -> Callable[[], None]:
        config = (True,) * net.depth
        return _step(net, task.name, lambda: F.cross_entropy(net(x, task.name, config=config), y))

    with torch.random.fork_rng(devices=[x.device] if x.is_cuda else []):
        nets = []
        for _ in range(3):
            net = make_net().to(device)
            net.add_task(task.name, make_head(task).to(device))
            nets.append(net)
        used, em = em_step(nets[0], backend)
        _, naive = em_step(nets[1], "reference")
        steps = {"em": em, "naive": naive, "plain": plain_step(nets[2])}
        times: dict[str, list[float]] = {name: [] for name in steps}
        for _ in range(_WARM_UP + rounds):
            for name, step in steps.items():
                times[name].append(_milliseconds(step, x.device))
    medians = {name: statistics.median(values[_WARM_UP:]) for name, values in times.items()}
    return {"backend": used, "batch_size": len(x), "rounds": rounds, "milliseconds": medians}


def _step(net: TransferNet, task: str, loss: Callable[[], torch.Tensor]) -> Callable[[], None]:
    optimizer = torch.optim.Adam(net.task_parameters(task))

    def step() -> None:
        optimizer.zero_grad()
        loss().backward()
        optimizer.step()

    return step


def _milliseconds(step: Callable[[], None], device: torch.device) -> float:
    synchronize = torch.cuda.synchronize if device.type == "cuda" else lambda: None
    synchronize()
    start = time.perf_counter()
    step()
    synchronize()
    return 1e3 * (time.perf_counter() - start)
