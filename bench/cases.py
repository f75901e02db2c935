"""The rows of the benchmark: a net, a mini-batch, a dtype and a device."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from lasem_fast.configs import ConfigSpace
from lasem_fast.net import TransferNet
from lasem_fast.tools.builtin import NETS

TASK = "task"
CLASSES = 10

# Columns that take minutes on two cores: the quick suite has them on its smallest row.
COMPILED = ("compiled loop", "compiled tree")
VMAP = ("vmap",)
_AUTOCAST = {"bf16": torch.bfloat16, "fp16": torch.float16}

NAIVE = ("naive loop, two forwards", "naive loop, one forward")


@dataclass(frozen=True)
class Case:
    """One row.

    Attributes:
        net: a name in :data:`lasem_fast.tools.builtin.NETS`.
        batch: samples in the mini-batch.
        dtype: ``"fp32"``; ``"tf32"`` (fp32 tensors, CUDA only); ``"bf16"`` or ``"fp16"``
            (autocast).
        device: ``"cpu"`` or ``"cuda"``.
        groups: sizes of groups of stages that are shared together, None for none.
        without: columns that this row does not have.
        favours: how many configurations the columns with pruned M-steps follow; 0: the row has
            no such columns.
    """

    net: str
    batch: int
    dtype: str = "fp32"
    device: str = "cpu"
    groups: tuple[int, ...] | None = None
    without: tuple[str, ...] = ()
    favours: int = 0

    @property
    def id(self) -> str:
        groups = f" {len(self.groups)} groups" if self.groups else ""
        return f"{self.net}{groups} b{self.batch} {self.dtype} {self.device}"

    @property
    def unit_roundoff(self) -> float:
        """Half the distance from 1 to the next number of the precision computed in."""
        # tf32 keeps 10 bits of the fraction, as fp16 does.
        eps = {"fp32": 2**-23, "tf32": 2**-10, "fp16": 2**-10, "bf16": 2**-7}[self.dtype]
        return eps / 2

    def precision(self) -> AbstractContextManager:
        """Autocast where the row asks for it."""
        if self.dtype in _AUTOCAST:
            return torch.autocast(self.device, dtype=_AUTOCAST[self.dtype])
        return nullcontext()

    def problem(self) -> Problem:
        """New weights and a new mini-batch, always the same ones."""
        spec = NETS[self.net]
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            net = TransferNet(spec.stages())
            net.add_task(TASK, spec.head(CLASSES))
            _scale(net, self.batch)
        generator = torch.Generator().manual_seed(1)
        x = torch.randn(self.batch, *spec.sample, generator=generator)
        y = torch.randint(CLASSES, (self.batch,), generator=generator)
        space = ConfigSpace(net.depth, groups=self.groups)
        return Problem(self, net.to(self.device), space, x.to(self.device), y.to(self.device))


@dataclass(frozen=True)
class Problem:
    """A case with its weights and mini-batch, in fp32."""

    case: Case
    net: TransferNet
    space: ConfigSpace
    x: Tensor
    y: Tensor

    def favoured(self) -> list[int]:
        """The configurations that pruned M-steps follow: evenly spread over the space."""
        count = len(self.space)
        return [i * count // self.case.favours for i in range(self.case.favours)]


def _scale(net: TransferNet, batch: int) -> None:
    """Weights that keep activations of size 1, and logits so small that no configuration wins.

    A mini-batch of n samples tells configurations apart by about sqrt(n) times the spread of their
    logits; with all of the posterior on one configuration the others' gradients would be 0.
    """
    layers = [m for m in net.modules() if isinstance(m, (nn.Conv2d, nn.Linear))]
    for layer in layers:
        nn.init.kaiming_normal_(layer.weight, nonlinearity="relu")
        if layer.bias is not None:
            nn.init.normal_(layer.bias, std=0.1)
    with torch.no_grad():
        layers[-1].weight /= batch**0.5


def quick() -> list[Case]:
    """The rows of ``make bench``: minutes on two cores."""
    slow = (*COMPILED, *VMAP)
    return [
        Case("cifar-4", 10),
        Case("cifar-4", 10, dtype="bf16", without=slow),
        Case("cifar-4", 64, without=COMPILED),
        Case("cifar-6", 10, without=slow),
        Case("stl-6", 10, without=slow),
        Case("residual-17", 10, groups=NETS["residual-17"].groups, without=slow),
        Case("office-home-4", 16, without=(*slow, *NAIVE)),
    ]


def gpu(device: str) -> list[Case]:
    """The rows of ``bench/on_gpu.sh``, the most important first: minutes on one GPU."""
    eight, four = (1,) * 8, (2,) * 4
    rows = [
        ("cifar-4", 10, None, 0),
        ("stl-6", 10, None, 0),
        ("office-home-4", 16, None, 0),
        ("residual-17", 10, eight, 16),
        ("residual-17", 128, eight, 16),
        ("residual-17", 10, four, 2),
        ("residual-17", 128, four, 2),
    ]
    # one row has the loop and the compiled tree: each takes minutes on larger ones
    once, slow = (NAIVE[1], *COMPILED[:1], *VMAP), (*NAIVE, *COMPILED, *VMAP)
    first = [
        Case(net, batch, "bf16", device, groups, slow if i else once, favours)
        for i, (net, batch, groups, favours) in enumerate(rows)
    ]
    others = [
        Case(net, batch, dtype, device, groups, slow)
        for dtype in ("tf32", "fp32")
        for net, batch, groups, _ in rows[:4]
    ]
    return [*first, *others]


def steps(device: str) -> list[Case]:
    """Whole steps of the paper's nets beside the naive loop as published and the compiled tree."""
    rows = [("cifar-4", 10), ("cifar-4", 64), ("stl-6", 10), ("office-home-4", 16)]
    without = (NAIVE[1], COMPILED[0], *VMAP)
    return [Case(net, batch, "fp32", device, without=without) for net, batch in rows]


def grouped(device: str) -> list[Case]:
    """Deep nets searched in groups, beside the naive loop as published."""
    rows = [
        ("residual-17", (2, 2, 2, 2)),
        ("residual-17", (2, 2, 1, 1, 1, 1)),
        ("stl-9", (3, 3, 3)),
        ("cifar-8", (2, 2, 2, 2)),
    ]
    without = (NAIVE[1], *COMPILED, *VMAP, "plain tree, channels last")
    return [
        Case(net, 10, "fp32", device, groups, without, favours=2 ** len(groups) // 8)
        for net, groups in rows
    ]


def normed(device: str) -> list[Case]:
    """Nets with batch norm in training mode, which no other column but the naive loop can fold."""
    rows = [("cifar-4-norm", None), ("residual-17-norm", (2, 2, 2, 2))]
    without = (*COMPILED, *VMAP, "plain tree", "plain tree, channels last")
    return [Case(net, 10, "fp32", device, groups, without) for net, groups in rows]


def activations(device: str) -> list[Case]:
    """Nets whose kernels' epilogue is not all that stands behind a convolution."""
    nets = "cifar-4", "cifar-4-gelu", "cifar-4-group-norm"
    without = (NAIVE[1], *COMPILED, *VMAP, "plain tree, channels last")
    return [Case(net, 10, "fp32", device, without=without) for net in nets]


def smoke(device: str) -> list[Case]:
    """One small row with the columns that are quick: whether the suite runs at all."""
    without = (*COMPILED, *VMAP, *NAIVE)
    return [Case("cifar-4", 2, "fp32", device, without=without, favours=2)]


def full(device: str) -> list[Case]:
    """The rows of ``make bench-full``: every net at the paper's batch and at larger ones."""
    dtypes = ("fp32", "bf16") if device == "cpu" else ("fp32", "tf32", "bf16")
    larger = (64,) if device == "cpu" else (64, 256)
    rows = []
    for name in ("cifar-4", "cifar-6", "stl-6", "office-home-4"):
        for batch in (NETS[name].batch, *larger):
            rows += [Case(name, batch, dtype, device) for dtype in dtypes]
    residual = [(2, 2, 2, 2)] if device == "cpu" else [(2, 2, 2, 2), (1,) * 8]
    rows += [Case("residual-17", 10, dtype, device, groups) for groups in residual
             for dtype in dtypes]  # fmt: skip
    return rows
