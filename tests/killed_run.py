"""A training run that saves after every step and goes on from there when it is started again."""

from __future__ import annotations

import os
from pathlib import Path

import torch
from nets import batch, small_net
from torch import nn

import lasem_fast as lf

STEPS = 14
# by name: stages, and what the search is asked for
KINDS = {
    "whole": (2, {}),
    "bounded, pruned": (5, {"max_memory": 600_000, "prune": 0.2}),
    "bounded, drawn, reused": (5, {"max_memory": 600_000, "m_step_draws": 3, "e_step_every": 2}),
}
ORDER = "aabbabcc"  # a and b alternate, then end; c comes later


def _net(depth):
    net = small_net(
        depth, tasks=("a", "b", "c"), extra=(lambda: nn.Dropout(0.2),), dtype=torch.float32
    )
    net.shared[0].register_buffer("mask", torch.full((2, 2), -torch.inf).triu(1))
    net.shared[1].register_buffer("steps", torch.zeros((), dtype=torch.int64))
    return net


def run(folder: str, kind: str) -> None:
    """Trains to the end, from the last complete state in ``folder`` on."""
    torch.set_num_threads(1)
    torch.manual_seed(1)
    depth, options = KINDS[kind]
    em = lf.LASEM(_net(depth), prior="mean_posterior", **options)
    saved = Path(folder) / "run.pt"
    start, optimizers = 0, {}
    if saved.exists():
        state = torch.load(saved, weights_only=True)
        em.load_state_dict(state["em"])
        start = state["step"]
    for task in em.net.tasks:
        optimizers[task] = torch.optim.Adam(em.net.task_parameters(task), lr=0.01)
        if start:
            optimizers[task].load_state_dict(state[task])
    if start:
        torch.set_rng_state(state["rng"])
    for step in range(start, STEPS):
        task = ORDER[step % len(ORDER)]
        if step in (7, 11):
            ended = "a" if step == 7 else "b"
            em.end_task(ended, {2} if step == 7 else None)
            optimizers[ended] = torch.optim.Adam(em.net.task_parameters(ended), lr=0.01)
        optimizers[task].zero_grad()
        em(*batch(samples=16, seed=step, dtype=torch.float32), task).loss.backward()
        optimizers[task].step()
        em.net.shared[1].steps += 1
        state = {task: optimizer.state_dict() for task, optimizer in optimizers.items()}
        state |= {"em": em.state_dict(), "step": step + 1, "rng": torch.get_rng_state()}
        torch.save(state, saved.with_suffix(".new"))
        os.replace(saved.with_suffix(".new"), saved)
