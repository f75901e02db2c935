"""Whether a training step can be captured, found out without a capture that would fail."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from lasem_fast._copied import memo_of_computed
from lasem_fast.em import LASEM

if TYPE_CHECKING:
    from lasem_fast.capture import CapturedStep


def obstacles(em: LASEM, optimizer: Optimizer, x: Tensor) -> list[str]:
    """What is known to stand in the way of a capture without trying it."""
    reasons = []
    if x.device.type != "cuda":
        reasons.append(f"the mini-batch is on {x.device}, and only CUDA devices have graphs")
    for name, plain in (("max_memory", None), ("prune", 0), ("m_step_draws", None)):
        if getattr(em, name) != plain:
            reasons.append(
                f"em has {name}={getattr(em, name)!r}, which decides on the host what runs"
            )
    if em.e_step_every > 1:
        reasons.append(f"em has e_step_every={em.e_step_every}, which counts on the host")
    if em.validate:
        reasons.append("em has validate=True, which waits for the device in every step")
    if not all(group.get("capturable", True) for group in optimizer.param_groups):
        reasons.append(f"{type(optimizer).__name__} has capturable=False")
    return reasons


def trial(step: CapturedStep) -> str:
    """Takes the step on copies; says why it cannot be captured, or returns ""."""
    try:
        with torch.cuda.device(step._x.device), _copied(step) as copied:
            copied._warm_up()
            why = state_on_host(copied.optimizer)
            if why:
                return why
            with nothing_waits():
                copied._warm_up()
            copied._record()
        step._rehearsed = True
        return ""
    except Exception as error:
        return first_line(error)


def rehearse(step: CapturedStep) -> None:
    """Takes the step on copies, where waiting for the device is an error.

    A capture that fails leaves the process without captures on torch 2.11 (pytorch PR#180395), so
    none is begun that would.
    """
    with _copied(step) as copied:
        copied._warm_up()
        with nothing_waits():
            copied._warm_up()


@contextmanager
def _copied(step: CapturedStep) -> Iterator[CapturedStep]:
    """A step on copies of the learner and optimiser; the random state is put back."""
    with torch.random.fork_rng(devices=[step._x.device]):
        # together, so that the copied optimiser trains the copied net
        together = step.em, step.optimizer
        em, optimizer = copy.deepcopy(together, memo_of_computed(step.em))
        copied = type(step)(em, optimizer, step._x, step._y, step.task, strict=True)
        copied._autocast = step._autocast
        yield copied


@contextmanager
def nothing_waits() -> Iterator[None]:
    """Makes waiting for a CUDA device an error, which it is inside a capture.

    PyTorch's own debug mode sees what its operators wait for; calls that are for waiting are
    refused here.
    """
    before = torch.cuda.get_sync_debug_mode()
    with ExitStack() as stack:
        for owner, where, name in _WAITING:
            stack.callback(setattr, owner, name, getattr(owner, name))
            setattr(owner, name, _refused(f"{where}.{name}"))
        stack.callback(torch.cuda.set_sync_debug_mode, before)
        torch.cuda.set_sync_debug_mode("error")
        yield


_WAITING = (
    (torch.cuda, "torch.cuda", "synchronize"),
    (torch.cuda.Stream, "torch.cuda.Stream", "synchronize"),
    (torch.cuda.Stream, "torch.cuda.Stream", "query"),
    (torch.cuda.Event, "torch.cuda.Event", "synchronize"),
    (torch.cuda.Event, "torch.cuda.Event", "query"),
)


def _refused(name: str) -> Callable[..., Any]:
    def refuse(*args: Any, **kwargs: Any) -> Any:
        raise RuntimeError(f"it calls {name}, which a capture does not allow")

    return refuse


def state_on_host(optimizer: Optimizer) -> str:
    """Names a part of the optimiser's state that a replay would not advance, or ""."""
    for parameter, state in optimizer.state.items():
        for name, value in state.items():
            number = isinstance(value, (int, float)) and not isinstance(value, bool)
            if number or (isinstance(value, Tensor) and value.device != parameter.device):
                return f"{type(optimizer).__name__} keeps {name!r} on the host"
    return ""


def first_line(error: Exception) -> str:
    lines = str(error).splitlines()
    return f"{type(error).__name__}: {lines[0] if lines else ''}"
