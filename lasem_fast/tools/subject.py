"""Which net a tool looks at: a built-in one, or a user's own from ``module:function``."""

from __future__ import annotations

import argparse
import importlib
import inspect
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from lasem_fast.configs import ConfigSpace
from lasem_fast.lifelong.run_checks import evaluating
from lasem_fast.net import TransferNet
from lasem_fast.networks import checks
from lasem_fast.tools import arguments
from lasem_fast.tools.builtin import NETS
from lasem_fast.tools.costs import MOST_CONFIGURATIONS

TASK = "task"
CLASSES = 10

HOW_TO_NAME_A_NET = f"""
NET is a built-in net ({", ".join(NETS)}) or your own, as module:function or file.py:function. The
module is looked for in the current directory first; the function takes no argument and returns one
of
  (stages, head, sample)   a sequence of nn.Module, an nn.Module, and a sample
  (net, sample)            a lasem_fast.TransferNet with one task that has not ended, and a sample
where a sample is the shape of one input without the batch dimension, for example (3, 32, 32), or a
tensor of that shape (for inputs that are not float32).
"""


class Subject(NamedTuple):
    """A net with what is needed to run it.

    Attributes:
        name: as the user gave it.
        net: holds the task ``task``.
        task: name of the task that is looked at.
        sample: one input, without the batch dimension.
        batch: the mini-batch that is meant unless another one is asked for.
        groups: sizes of groups of stages, None for none.
    """

    name: str
    net: TransferNet
    task: str
    sample: Tensor
    batch: int
    groups: tuple[int, ...] | None

    def space(self, groups: tuple[int, ...] | None = None) -> ConfigSpace:
        """The configurations to search, bound into ``groups`` or into the net's own."""
        return ConfigSpace(self.net.depth, groups=groups or self.groups)

    def batch_of(self, samples: int, device: torch.device | str) -> tuple[Tensor, Tensor]:
        """A mini-batch ``[samples, ...]`` of noise and random labels."""
        generator = torch.Generator().manual_seed(1)
        shape = (samples, *self.sample.shape)
        if self.sample.is_floating_point():
            x = torch.randn(shape, generator=generator).to(self.sample.dtype)
        else:
            x = self.sample.expand(shape).clone()
        y = torch.randint(n_classes(self.net, self.task, self.sample), (samples,),
                          generator=generator)  # fmt: skip
        return x.to(device), y.to(device)


def add_net_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments that say which net, mini-batch and groups are meant."""
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.epilog = HOW_TO_NAME_A_NET
    parser.add_argument("net", metavar="NET", help="a built-in net or module:function (see below)")
    parser.add_argument(
        "--batch", type=arguments.positive, help="mini-batch (default: the paper's, or 16)"
    )
    parser.add_argument(
        "--groups",
        type=arguments.sizes,
        metavar="SIZES",
        help="sizes of groups of consecutive stages shared together, as in 2,2,2,2; 'none': every "
        "stage alone (default: the paper's, or none)",
    )


def load(args: argparse.Namespace) -> Subject:
    """The subject that parsed arguments name.

    Raises:
        ValueError: no such net, or not what :data:`HOW_TO_NAME_A_NET` asks for.
    """
    torch.manual_seed(0)
    subject = _builtin(args.net) if args.net in NETS else _users(args.net)
    if args.batch is not None:
        subject = subject._replace(batch=args.batch)
    if args.groups is not None:
        subject = subject._replace(groups=args.groups or None)
    if len(subject.space()) > MOST_CONFIGURATIONS:
        raise ValueError(
            f"--groups: expected at most {MOST_CONFIGURATIONS} configurations, got "
            f"{len(subject.space())} of {subject.net.depth} stages; bind stages into groups"
        )
    return subject


def _builtin(name: str) -> Subject:
    spec = NETS[name]
    net = TransferNet(spec.stages())
    net.add_task(TASK, spec.head(CLASSES))
    return Subject(name, net, TASK, torch.empty(spec.sample), spec.batch, spec.groups)


def _users(name: str) -> Subject:
    module_name, _, function_name = name.rpartition(":")
    if not module_name or not function_name:
        raise ValueError(f"NET: expected one of {sorted(NETS)} or module:function, got {name!r}")
    module = _module(module_name)
    make = getattr(module, function_name, None)
    where = getattr(module, "__file__", None) or module_name
    if not callable(make):
        there = [
            name
            for name, value in vars(module).items()
            if callable(value)
            and getattr(value, "__module__", "") == module.__name__
            and not name.startswith("_")
        ]
        got = "no such name" if make is None else f"an object of type {type(make).__name__}"
        raise ValueError(
            f"NET: expected a function {function_name!r} in {where}, got {got} (functions and "
            f"classes there: {', '.join(there[:8] + ['...'] * (len(there) > 8)) or 'none'})"
        )
    if needed := _needed_arguments(make):
        raise ValueError(
            f"NET: expected {name} to be a function without arguments, got one that needs "
            f"{', '.join(needed)}"
        )
    net, task, sample = _unpacked(make(), name)
    _check_parameters(net, task, name)
    n_classes(net, task, sample)
    return Subject(name, net, task, sample, 16, None)


def _module(name: str) -> ModuleType:
    """A module by its dotted name, or by the path of its file."""
    file = Path(name)
    if file.suffix == ".py" or len(file.parts) > 1:
        if not file.is_file():
            raise ValueError(f"NET: expected a Python file or module, got {name!r}: no such file")
        sys.path.insert(0, str(file.resolve().parent))  # as for `python FILE`
        name = file.stem
    elif str(Path.cwd()) not in sys.path:
        sys.path.insert(0, str(Path.cwd()))
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        # what the user's own module imports in vain is an error in the user's file
        if error.name is None or not (name + ".").startswith(error.name + "."):
            raise
        raise ValueError(
            f"NET: expected a module that can be imported from the current directory, got {name!r}"
        ) from None
    except SystemExit:
        raise ValueError(
            f"NET: expected a module that can be imported, got {name!r}, which ends Python when it "
            f'is (what runs a program belongs under `if __name__ == "__main__":`)'
        ) from None


def _needed_arguments(make: Callable[..., Any]) -> list[str]:
    try:
        parameters = inspect.signature(make).parameters.values()
    except (TypeError, ValueError):  # no signature to be had
        return []
    anything = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
    return [p.name for p in parameters if p.default is p.empty and p.kind not in anything]


def _unpacked(made: Any, name: str) -> tuple[TransferNet, str, Tensor]:
    if not isinstance(made, tuple) or len(made) not in (2, 3):
        got = f"a tuple of {len(made)}" if isinstance(made, tuple) else type(made).__name__
        raise ValueError(f"{name}: expected (stages, head, sample) or (net, sample), got {got}")
    sample = _sample(made[-1], name)
    if len(made) == 3:
        stages, head, _ = made
        if not isinstance(head, nn.Module):
            raise ValueError(f"{name}: expected head to be an nn.Module, got {type(head).__name__}")
        net = TransferNet(stages)
        net.add_task(TASK, head)
        return net, TASK, sample
    net = made[0]
    if not isinstance(net, TransferNet):
        raise ValueError(f"{name}: expected a TransferNet, got {type(net).__name__}")
    open_tasks = [task for task in net.tasks if net.config(task) is None]
    if len(open_tasks) != 1:
        raise ValueError(f"{name}: expected one task that has not ended, got {open_tasks}")
    return net, open_tasks[0], sample


def _sample(given: Any, name: str) -> Tensor:
    if isinstance(given, Tensor):
        return given
    sizes = tuple(given) if isinstance(given, (tuple, list)) else None
    if sizes is None or not all(type(size) is int and size > 0 for size in sizes):
        raise ValueError(
            f"{name}: expected sample to be the shape of one input, such as (3, 32, 32), or a "
            f"tensor, got {given!r}"
        )
    return torch.empty(sizes)


@torch.no_grad()
def n_classes(net: TransferNet, task: str, sample: Tensor) -> int:
    """Number of outputs of the head, from one sample.

    Raises:
        ValueError: a stage or the head cannot take what comes to it, or gives no tensor.
    """
    h = torch.zeros_like(sample, device=next(net.parameters()).device).unsqueeze(0)
    names = [*(f"stage {i + 1}" for i in range(net.depth)), "the head"]
    with evaluating(net):
        for name, branch in zip(
            names, [*net.path(task, (True,) * net.depth), net.heads[task]], strict=True
        ):
            module = getattr(branch, "module", branch)
            what = f"{name} ({checks.name_of(module)})"
            given = f"{list(h.shape)} of {h.dtype}"
            try:
                h = branch(h)
            except RuntimeError as error:
                reason = str(error).partition("\n")[0]
                raise ValueError(
                    f"NET: expected a net that takes its sample (a shape without the batch "
                    f"dimension, or a tensor where inputs are not float32), got {what}, which "
                    f"cannot take {given} ({reason})"
                ) from error
            except TypeError as error:
                reason = checks.why_not_one_tensor(module)
                if reason is None:
                    raise
                raise ValueError(
                    f"NET: expected stages and a head that are called with one tensor, got {what}, "
                    f"whose forward cannot be ({reason})"
                ) from error
            if not isinstance(h, Tensor):
                raise ValueError(f"NET: expected {what} to return a tensor, got {type(h).__name__}")
    if h.dim() < 2 or h.shape[0] != 1 or h.shape[-1] == 0:
        raise ValueError(
            f"NET: expected a head with outputs [N, K], got {list(h.shape)} for one sample"
        )
    return h.shape[-1]


def _check_parameters(net: TransferNet, task: str, name: str) -> None:
    parameters = dict(net.named_task_parameters(task))
    without_values = [n for n, p in parameters.items() if p.is_meta]
    if not parameters or without_values:
        got = f"ones without values (meta): {without_values}" if without_values else "none"
        raise ValueError(f"{name}: expected a net with parameters to train, got {got}")
