"""Which net a tool looks at: a built-in one, or a user's own from ``module:function``."""

from __future__ import annotations

import argparse
import importlib
import sys
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from lasem_fast.configs import ConfigSpace
from lasem_fast.net import TransferNet
from lasem_fast.tools.builtin import NETS

TASK = "task"
CLASSES = 10

HOW_TO_NAME_A_NET = f"""
NET is a built-in net ({", ".join(NETS)}) or your own, as module:function. The module is looked for
in the current directory first; the function takes no argument and returns one of
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
    parser.add_argument("--batch", type=positive, help="mini-batch (default: the paper's, or 16)")
    parser.add_argument(
        "--groups",
        type=_sizes,
        metavar="SIZES",
        help="sizes of groups of consecutive stages shared together, as in 2,2,2,2; 'none': every "
        "stage alone (default: the paper's, or none)",
    )


def positive(text: str) -> int:
    """An argument that is a whole number of at least 1."""
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"expected at least 1, got {value}")
    return value


def _sizes(text: str) -> tuple[int, ...]:
    return () if text == "none" else tuple(positive(part) for part in text.split(","))


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
    subject.space()
    return subject


def _builtin(name: str) -> Subject:
    spec = NETS[name]
    net = TransferNet(spec.stages())
    net.add_task(TASK, spec.head(CLASSES))
    return Subject(name, net, TASK, torch.empty(spec.sample), spec.batch, spec.groups)


def _users(name: str) -> Subject:
    module_name, colon, function_name = name.partition(":")
    if not colon or not function_name:
        raise ValueError(f"NET: expected one of {sorted(NETS)} or module:function, got {name!r}")
    if str(Path.cwd()) not in sys.path:
        sys.path.insert(0, str(Path.cwd()))
    try:
        module = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        if error.name != module_name.partition(".")[0]:
            raise
        raise ValueError(
            f"NET: expected a module that can be imported from the current directory, got "
            f"{module_name!r}"
        ) from error
    make = getattr(module, function_name, None)
    if not callable(make):
        raise ValueError(f"NET: expected a function {function_name!r} in {module_name}, got {make}")
    net, task, sample = _unpacked(make(), name)
    return Subject(name, net, task, sample, 16, None)


def _unpacked(made: Any, name: str) -> tuple[TransferNet, str, Tensor]:
    if not isinstance(made, tuple) or len(made) not in (2, 3):
        raise ValueError(
            f"{name}: expected (stages, head, sample) or (net, sample), got {type(made).__name__}"
        )
    sample = made[-1] if isinstance(made[-1], Tensor) else torch.empty(tuple(made[-1]))
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


@torch.no_grad()
def n_classes(net: TransferNet, task: str, sample: Tensor) -> int:
    """Number of outputs of the head, from one sample."""
    device = next(net.parameters()).device
    x = torch.zeros_like(sample, device=device).unsqueeze(0)
    return net(x, task, config=(True,) * net.depth).shape[-1]
