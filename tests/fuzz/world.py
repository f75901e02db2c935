"""Small nets with open and ended tasks on which calls are made, and a picture of their state."""

from __future__ import annotations

import hashlib
import pickle
from dataclasses import dataclass, field, replace
from random import Random
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

import lasem_fast as lf
from lasem_fast.lifelong import Task

BACKENDS = ("auto", "torch", "reference", "cpp")


@dataclass
class World:
    """Tasks: "a" has made a step, "b" none, "c" has ended."""

    em: lf.LASEM
    net: lf.TransferNet
    optimizer: torch.optim.Optimizer
    x: Tensor
    y: Tensor
    pick: Random
    # what a call's setup leaves for the call
    key: str = ""
    parts: list[Any] = field(default_factory=list)
    step: Any = None


def _stages(images: bool, dropout: bool) -> list[nn.Module]:
    noise = [nn.Dropout(0.3)] if dropout else []
    if images:
        return [
            nn.Sequential(nn.Conv2d(2, 3, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2)),
            nn.Sequential(nn.Conv2d(3, 2, 3, padding=1), nn.ReLU(), *noise),
        ]
    return [
        nn.Sequential(nn.Linear(4, 5), nn.ReLU(), *noise),
        nn.Sequential(nn.Linear(5, 3), nn.Tanh()),
    ]


def head(images: bool = False) -> nn.Module:
    return nn.Sequential(nn.Flatten(), nn.Linear(8 if images else 3, 3))


def batch(images: bool = False, samples: int = 4) -> tuple[Tensor, Tensor]:
    x = torch.randn(samples, 2, 4, 4) if images else torch.randn(samples, 4)
    return x, torch.randint(3, (samples,))


def make(pick: Random) -> World:
    """A new world; everything in it is drawn from ``pick``."""
    torch.manual_seed(pick.randrange(2**30))
    images, dropout = pick.random() < 0.3, pick.random() < 0.4
    transfer = pick.choice(["hps", "hps", "tf", "dfcnn" if images else "hps"])
    net = lf.TransferNet(_stages(images, dropout), transfer)
    for task in "abc":
        net.add_task(task, head(images))
    prior = pick.choice(["count", "mean_posterior", "uniform", "historic", torch.ones(4)])
    likelihood = pick.choice(["joint", "mean"])
    em = lf.LASEM(net, likelihood=likelihood, prior=prior, backend=pick.choice(BACKENDS))
    x, y = batch(images)
    parameters = list(dict.fromkeys(p for t in "abc" for p in net.task_parameters(t)))
    optimizer = torch.optim.SGD(parameters, lr=0.1, momentum=0.9)
    for task in pick.choice(["", "a", "aba"]):
        optimizer.zero_grad()
        em(x, y, task).loss.backward()
        optimizer.step()
    em.end_task("c", pick.choice([[True, False], 0, set()]))
    if pick.random() < 0.5:
        for parameter in net.parameters():
            parameter.grad = torch.randn_like(parameter)
    if pick.random() < 0.2:
        em.eval()
    return World(em, net, optimizer, x, y, pick)


class Worlds:
    """Worlds by number, made when first asked for and kept as long as nothing changes in them."""

    def __init__(self, count: int = 30) -> None:
        self._count = count
        self._made: dict[int, tuple[World, dict[str, Any]]] = {}

    def draw(self, pick: Random) -> tuple[int, World]:
        """A number, and the world that it stands for."""
        number = pick.randrange(self._count)
        if number not in self._made:
            there = make(Random(number))
            self._made[number] = there, picture(there)
        return number, replace(self._made[number][0], pick=pick)

    def leave(self, number: int) -> None:
        """Forgets a world in which something has changed since it was made."""
        there, before = self._made[number]
        if differences(before, picture(there)):
            del self._made[number]


def sequence() -> list[Task]:
    """Two tiny tasks for ``train_sequence``."""

    def split() -> tuple[Tensor, Tensor]:
        return batch(samples=6)

    return [Task(name, split(), split(), split(), 3) for name in ("p", "q")]


def picture(world: World) -> dict[str, Any]:
    """Everything that a refused call must leave alone, by name."""
    em = world.em
    seen: dict[str, Any] = {
        "gradients enabled": torch.is_grad_enabled(),
        "default dtype": torch.get_default_dtype(),
        "x": _digest(world.x),
        "y": _digest(world.y),
        "optimizer": _digest(world.optimizer.state_dict()),
        "extra state": _digest((em.get_extra_state(), em.net.get_extra_state())),
        "structure": [(name, type(m).__name__) for name, m in em.named_modules()],
        "training mode": [m.training for m in em.modules()],
        "tasks": em.net.tasks,
    }
    # not em.named_buffers(): some buffers are in the state alone
    for name, tensor in em.state_dict(keep_vars=True).items():
        seen[name] = _digest(tensor)
    for name, parameter in em.named_parameters():
        # an optimiser holds on to the very parameters
        seen[name] = (id(parameter), parameter.requires_grad, _digest(parameter))
        seen[f"gradient of {name}"] = None if parameter.grad is None else _digest(parameter.grad)
    return seen


def _digest(value: Any) -> Any:
    if isinstance(value, Tensor):
        if is_lazy(value) or value.is_meta:
            return type(value).__name__
        plain = torch.empty(value.shape, dtype=value.dtype).copy_(value.detach()).flatten()
        return tuple(value.shape), value.dtype, plain.view(torch.uint8).numpy().tobytes()
    if isinstance(value, dict):
        return {key: _digest(v) for key, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [_digest(v) for v in value]
    try:
        return hashlib.sha1(pickle.dumps(value)).hexdigest()
    except Exception:
        return repr(value)


def differences(before: dict[str, Any], after: dict[str, Any]) -> list[str]:
    """Names of what is not as it was."""
    return sorted(n for n in {*before, *after} if before.get(n, ...) != after.get(n, ...))
