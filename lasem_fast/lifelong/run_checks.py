"""What a training run over a sequence checks of its arguments, data aside."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lasem_fast._numbers import finite_number
from lasem_fast.em import LASEM
from lasem_fast.lifelong.method import Method
from lasem_fast.lifelong.task_data import Task
from lasem_fast.likelihoods import Likelihood
from lasem_fast.net import TransferNet
from lasem_fast.priors import Prior


@contextmanager
def evaluating(net: nn.Module) -> Iterator[None]:
    """Evaluation mode for a while; then every module has its own mode again (frozen layers)."""
    training = [module for module in net.modules() if module.training]
    net.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True


def own_copies(em_options: dict[str, Any] | None) -> dict[str, Any]:
    """The options with copies of what a run would change."""
    if em_options is None:
        return {}
    if not isinstance(em_options, dict):
        raise TypeError(
            f"em_options: expected a dict of LASEM's arguments, got {type(em_options).__name__}"
        )
    known = list(inspect.signature(LASEM).parameters)[1:]  # without the net
    unknown = [name for name in em_options if name not in known]
    if unknown:
        raise TypeError(f"em_options: expected some of {known}, got {unknown}")
    learns = (Prior, Likelihood)
    return {
        name: copy.deepcopy(value) if isinstance(value, learns) else value
        for name, value in em_options.items()
    }


def checked_device(device: Any) -> torch.device:
    try:
        checked = torch.device(device)
        torch.ones((), device=checked).item()
    except Exception as error:  # what it is depends on the device's type and PyTorch's build
        reason = str(error).partition("\n")[0]
        raise RuntimeError(
            f"device: expected one that PyTorch can use here, got {str(device)!r} ({reason})"
        ) from error
    return checked


def checked_net(net: Any) -> TransferNet:
    if not isinstance(net, TransferNet):
        raise TypeError(
            f"make_net: expected a function that returns a TransferNet, got one that returns "
            f"{type(net).__name__}"
        )
    if net.tasks:
        raise ValueError(
            f"make_net: expected a new net without tasks at every call, got one with the tasks "
            f"{list(net.tasks)}"
        )
    return net if net.training else net.train()


def checked_head(head: Any) -> nn.Module:
    if not isinstance(head, nn.Module):
        raise TypeError(
            f"make_head: expected a function that returns an nn.Module, got one that returns "
            f"{type(head).__name__}"
        )
    return head


def check_fit(method: Method, task: Task) -> None:
    """The method takes a sample of every split, and the head has an output for every class."""
    for split, (x, _) in task.splits():
        with torch.no_grad(), evaluating(method.module):
            try:
                logits = method.logits(x[:1], task.name)
            except (RuntimeError, ValueError) as error:
                reason = str(error).partition("\n")[0]
                raise ValueError(
                    f"{split} of task {task.name!r}: expected samples that the network can take, "
                    f"got shape {list(x.shape[1:])} of {x.dtype} ({reason})"
                ) from error
        got = list(logits.shape) if isinstance(logits, Tensor) else type(logits).__name__
        if got != [1, task.n_classes]:
            raise ValueError(
                f"make_head: expected a head with outputs [N, {task.n_classes}] for task "
                f"{task.name!r}, got {got} for one sample"
            )


def checked_method(method: Any) -> Method:
    """An object with all that `Method` asks for."""
    wanted = [name for name in vars(Method) if not name.startswith("_")]
    missing = [name for name in ("module", "labels", *wanted) if not hasattr(method, name)]
    if missing:
        raise TypeError(
            f"method: expected a function that returns a lasem_fast.lifelong.Method, got one that "
            f"returns {type(method).__name__}, which lacks {', '.join(missing)}"
        )
    if not isinstance(method.module, nn.Module):
        raise TypeError(
            f"method: expected an nn.Module as its module, got {type(method.module).__name__}"
        )
    return method


def checked_folder(folder: Any, save_every: Any) -> Path | None:
    """A place for a run's state, made if it is not there, and how often it is written."""
    finite_number(save_every, "save_every", zero=True)
    if folder is None:
        return None
    try:
        place = Path(folder)
        place.mkdir(parents=True, exist_ok=True)
    except (TypeError, OSError) as error:
        raise type(error)(
            f"folder: expected a folder that can be written, or None, got {folder!r} ({error})"
        ) from error
    return place


def check_functions(**functions: tuple[Any, str]) -> None:
    """All of them can be called with what they are given, if anything.

    Raises:
        TypeError: one of them cannot; a module takes tensors, which none of them is given.
    """
    for name, (value, given) in functions.items():
        if not callable(value) or isinstance(value, nn.Module):
            raise TypeError(f"{name}: expected a function, got {type(value).__name__}")
        try:
            signature = inspect.signature(value)
        except (TypeError, ValueError):  # some of C have none
            continue
        try:
            signature.bind(*[given] * bool(given))
        except TypeError:
            called = getattr(value, "__name__", type(value).__name__)
            raise TypeError(
                f"{name}: expected a function that can be called as {name}({given}), got "
                f"{called}{signature}"
            ) from None


def check_epochs(method: Method, epochs: int, n_tasks: int) -> None:
    """Raises ValueError if the tasks after the first are too short for the method."""
    least = getattr(method, "least_epochs", 1)
    if n_tasks > 1 and epochs < least:
        raise ValueError(
            f"epochs: expected at least {least} for {type(method).__name__} and several tasks, got "
            f"{epochs}"
        )
