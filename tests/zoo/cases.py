"""Draws a net, what is searched, a mini-batch and a history of tasks.

Every draw goes through a :class:`random.Random`, which may be one of hypothesis.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from random import Random

import torch
from torch import Tensor, nn

import lasem_fast as lf
from lasem_fast.transfer import TensorFactorization

from . import layers
from .layers import Shape

_BATCH_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)
_LARGEST = 500  # numbers in one sample of an activation
TASKS = ("a", "b")


@dataclass
class Case:
    """A drawn problem; ``make()`` gives the same net with the same weights every time.

    Attributes:
        make: a net with its tasks.
        odd: what about the net need not be supported, only refused by name; "" for nothing.
        batches: mini-batches, one after another.
        events: the history: pairs of a kind and a task.
    """

    make: Callable[[], lf.TransferNet]
    space: lf.ConfigSpace
    batches: list[tuple[Tensor, Tensor]]
    likelihood: str
    prior: str
    events: list[tuple[str, str]]
    odd: str = ""
    notes: dict[str, object] = field(default_factory=dict)

    def likelihood_object(self) -> object:
        """What ``LASEM`` is given as likelihood."""
        return lf.likelihoods.Gaussian(0.7) if self.likelihood == "gaussian" else self.likelihood

    def describe(self) -> str:
        net = self.make()
        stages = "\n".join(f"    {i + 1}: {' '.join(str(s).split())}" for i, s in
                           enumerate(net.shared))  # fmt: skip
        x, y = self.batches[0]
        return (
            f"  {self.notes}, {self.likelihood}, {self.prior}, {self.space}, odd={self.odd!r}\n"
            f"  x {list(x.shape)} {x.dtype} strides {x.stride()}, y {list(y.shape)}\n"
            f"  {self.events}\n{stages}\n    head: {net.heads[net.tasks[0]]}"
        )


def _layout(pick: Random, tensor: Tensor) -> Tensor:
    """The same values with other strides."""
    kinds = ["contiguous", "contiguous", "batch innermost", "every second", "reversed"]
    if tensor.dim() == 4:
        kinds += ["channels last"] * 2
    if tensor.dim() == 5:
        kinds += ["channels last 3d"]
    kind = pick.choice(kinds)
    if kind == "channels last":
        return tensor.contiguous(memory_format=torch.channels_last)
    if kind == "channels last 3d":
        return tensor.contiguous(memory_format=torch.channels_last_3d)
    if kind == "batch innermost":
        return tensor.movedim(0, -1).contiguous().movedim(-1, 0)
    if kind == "every second":
        wrong = torch.full_like(tensor, -7)
        return torch.stack([tensor, wrong], dim=1)[:, 0]
    if kind == "reversed" and tensor.dim() > 1:
        return tensor.transpose(0, 1).contiguous().transpose(0, 1)
    return tensor


def _start(pick: Random) -> Shape:
    rank = pick.choice([1, 2, 2, 3, 3, 3, 3, 4])
    if rank == 1:
        return (pick.randint(2, 8),)
    if rank == 2:
        return (pick.randint(2, 5), pick.choice([2, 4, 6]))
    if rank == 3:
        return (pick.choice([1, 2, 3, 4]), pick.randint(3, 9), pick.randint(3, 9))
    return (pick.randint(1, 2), pick.randint(3, 4), pick.randint(2, 4), pick.randint(3, 4))


def frozen(module: nn.Module) -> nn.Module:
    """Puts layers with running statistics into evaluation mode."""
    for layer in module.modules():
        if getattr(layer, "running_mean", None) is not None:
            layer.eval()
    return module


def _with_statistics(module: nn.Module) -> nn.Module:
    for layer in module.modules():
        if getattr(layer, "running_mean", None) is not None:
            layer.running_mean.uniform_(-1, 1)
            layer.running_var.uniform_(0.5, 2)
    return module


def _out_shape(layer: nn.Module, shape: Shape) -> Shape | None:
    """The shape of a sample's output; None where the layer cannot take the sample."""
    try:
        with torch.no_grad():
            out = frozen(layer).double()(torch.zeros(3, *shape, dtype=torch.float64))
    except (RuntimeError, ValueError, TypeError, IndexError, NotImplementedError, AssertionError):
        return None
    fits = isinstance(out, Tensor) and out.dim() >= 2 and len(out) == 3
    if not fits or not 0 < out[0].numel() <= _LARGEST or out.dim() > 5:
        return None
    return tuple(out.shape[1:])


def _layer(pick: Random, shape: Shape) -> tuple[nn.Module, Shape]:
    for _ in range(12):
        try:
            layer = pick.choice(layers.MAKERS[len(shape)])(pick, shape)
        except (ValueError, RuntimeError, TypeError, AssertionError):
            continue
        out = _out_shape(layer, shape)
        if out is not None:
            return layer, out
    return nn.Tanh(), shape


def _stage(pick: Random, shape: Shape) -> tuple[nn.Module, Shape]:
    kind = pick.choice(["one", "several", "several", "several", "residual", "nested"])
    if kind == "one":
        return _layer(pick, shape)
    if kind == "residual":
        inner, out = _layer(pick, shape)
        around = layers.Residual(inner, pick.random() < 0.4)
        if out == shape and _out_shape(around, shape) == shape:
            return around, shape
    parts = []
    for _ in range(pick.randint(1, 3)):
        part, shape = _layer(pick, shape)
        parts.append(part)
    stage = nn.Sequential(*parts)
    return (nn.Sequential(stage, nn.Identity()) if kind == "nested" else stage), shape


def _conv_stage(pick: Random, shape: Shape) -> tuple[nn.Module, Shape]:
    """The plain stage that fast levels are made for, in all its forms."""
    side = pick.choice([1, 3, 3, 3, 5, 5, 7])
    conv = nn.Conv2d(
        shape[0], pick.choice([1, 3, 4, 8]), side, padding=pick.choice([side // 2, 0, 1]),
        bias=pick.random() < 0.8, stride=pick.choice([1, 1, 1, 2]),
    )  # fmt: skip
    parts: list[nn.Module] = [conv, nn.ReLU(inplace=pick.random() < 0.3)]
    if pick.random() < 0.5:
        parts.append(lf.nets.same_pool(shape[1], pick.choice([2, 3])))
    stage = nn.Sequential(*parts)
    out = _out_shape(stage, shape)
    return (nn.Tanh(), shape) if out is None else (stage, out)


def _odd_stage(pick: Random, shape: Shape) -> tuple[nn.Module, Shape, str]:
    """A stage that a fast backend may refuse by name, but not get wrong."""
    kind = pick.choice(["writes", "mixes", "folds", "spectral norm"])
    if kind == "writes":
        return nn.Sequential(nn.Identity(), layers.AddsInPlace(shape)), shape, kind
    if kind == "folds" and len(shape) == 2:
        return layers.FoldsSteps(), shape[1:], kind
    if kind == "spectral norm":
        layer = nn.Linear(shape[-1], shape[-1])
        return nn.utils.parametrizations.spectral_norm(layer), shape, kind
    return layers.MixesSamples(), shape, "mixes"


def _stages(
    pick: Random, depth: int, x: str, odd_at: int, plain: bool
) -> tuple[list[nn.Module], Shape, Shape, str]:
    """Stages, the shapes of a sample in and out, and what is odd about them."""
    stages: list[nn.Module] = []
    odd = ""
    if x == "tokens":
        shape: Shape = (pick.randint(2, 5),)
        bag = pick.random() < 0.3
        width = pick.choice([2, 4])
        start, shape = shape, (width,) if bag else (shape[0], width)
        stages.append(layers.Embed(7, width, bag))
    else:
        start = shape = _start(pick)
        if plain:
            start = shape = (pick.choice([1, 2, 3]), pick.randint(4, 9), pick.randint(4, 9))
    folded = 0
    while len(stages) < depth:
        if len(stages) == odd_at and not odd:
            stage, shape, odd = _odd_stage(pick, shape)
            if odd == "folds":
                folded = start[0]
        elif folded and pick.random() < 0.5:
            stage, shape, folded = layers.UnfoldsSteps(folded), (folded, *shape), 0
        elif plain and len(shape) == 3 and pick.random() < 0.85:
            stage, shape = _conv_stage(pick, shape)
        else:
            stage, shape = _stage(pick, shape)
        stages.append(stage)
    return stages, start, shape, odd


def _head(pick: Random, shape: Shape, outputs: int) -> nn.Module:
    features = math.prod(shape)
    kind = pick.choice(["flatten", "flatten", "hidden", "plain", "inplace"])
    if kind == "plain" and len(shape) == 1:
        return nn.Linear(features, outputs)
    if kind == "hidden":
        return nn.Sequential(nn.Flatten(), nn.Linear(features, 4), nn.ReLU(), nn.Linear(4, outputs))
    if kind == "inplace":
        return nn.Sequential(nn.LeakyReLU(inplace=True), nn.Flatten(), nn.Linear(features, outputs))
    return nn.Sequential(nn.Flatten(), nn.Linear(features, outputs))


def space_of(pick: Random, depth: int) -> lf.ConfigSpace:
    kind = pick.choice(["full", "full", "groups", "list"])
    if kind == "groups":
        sizes: list[int] = []
        while sum(sizes) < depth:
            sizes.append(pick.randint(1, depth - sum(sizes)))
        return lf.ConfigSpace(depth, groups=sizes)
    if kind == "list":
        rows = pick.sample(range(2**depth), pick.randint(1, min(2**depth, 9)))
        return lf.ConfigSpace.from_configs(rows, depth=depth)
    return lf.ConfigSpace(depth)


def _events(pick: Random) -> list[tuple[str, str]]:
    """Steps of two tasks that alternate, end and come back; always a step first."""
    events = [("step", pick.choice(TASKS))]
    ended: set[str] = set()
    kinds = ["step"] * 5 + ["frozen", "evaluate", "validate", "second order", "plain"]
    for _ in range(pick.randint(1, 9)):
        task = pick.choice(TASKS)
        stepped = ("step", task) in events
        if task not in ended and pick.random() < (0.3 if stepped else 0.03):
            ended.add(task)
            events.append((pick.choice(["end", "end with"]), task))
        else:
            kind = pick.choice(["step", "plain"] if task in ended else kinds)
            events.append((kind, task))
    # what is left open is mostly ended, sharing little: that takes back the most
    for task in TASKS:
        if task not in ended and pick.random() < 0.6:
            events.append(("end with", task))
    return events


def _overflows_in_the_head(net: lf.TransferNet, task: str) -> bool:
    """Whether huge weights of the last stage make the logits overflow, in any order of sums.

    Sums of infinities are NaN or infinite as the batch's size will have it, and what comes behind
    them may make either finite again.
    """
    stage, head = ([m for m in part.modules() if not list(m.children())]
                   for part in (net.specific[task][-1], net.heads[task]))  # fmt: skip
    simple = (nn.Conv2d, nn.Linear, nn.ReLU, nn.MaxPool2d, nn.Flatten, nn.Identity)
    weighted = [[m for m in part if list(m.parameters())] for part in (stage, head)]
    return all(type(m) in simple for m in stage) and list(map(len, weighted)) == [1, 1]


def _may_be_strided(net: nn.Module) -> list[nn.Parameter]:
    """Those of convolutions and linear layers.

    Behind a strided weight of a norm PyTorch 2.13 gets the input's gradient wrong, or crashes.
    """
    kinds = (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.Linear)
    return [p for m in net.modules() if type(m) in kinds for p in m.parameters(recurse=False)]


def _strided(parameter: nn.Parameter) -> None:
    wrong = torch.full_like(parameter, 3.0)
    parameter.data = torch.stack([parameter.detach(), wrong], dim=-1)[..., 0]


def draw(
    pick: Random,
    *,
    dtype: torch.dtype = torch.float64,
    tasks: tuple[str, ...] = TASKS,
    max_depth: int = 4,
    dropout: bool = False,
    odd: bool = True,
    mechanisms: tuple[str, ...] = ("hps", "hps", "hps", "hps", "tf", "dfcnn"),
) -> Case:
    """A case. With ``dropout`` one random layer is put somewhere; ``odd`` allows odd stages."""
    seed, depth = pick.randrange(2**20), pick.randint(1, max_depth)
    kind = pick.choice(["values"] * 6 + ["tokens"])
    odd_at = pick.randrange(depth) if odd and pick.random() < 0.12 else -1
    transfer: object = pick.choice(mechanisms)
    if transfer == "tf" and len(tasks) == 1:  # the gate's brute force knows no auxiliary loss
        transfer = TensorFactorization(aux_weight=0.0)
    plain = transfer != "hps" or pick.random() < 0.35
    plan = pick.randrange(2**30)
    likelihood = pick.choice(["joint", "joint", "mean", "gaussian"]) if len(tasks) > 1 else "joint"
    outputs, samples = pick.randint(1, 4), pick.randint(1, 4)
    overflow = odd and plain and pick.random() < 0.15
    strides, last = pick.random() < 0.2, pick.random() < 0.25
    norms_train = pick.random() < 0.5

    def make(mechanism: object = transfer) -> lf.TransferNet:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            inner = Random(plan)
            stages, _, shape, _ = _stages(inner, depth, kind, odd_at, plain)
            if dropout:
                at = inner.randrange(depth)
                stages[at] = nn.Sequential(stages[at], nn.Dropout(0.4))
            stages = [_with_statistics(s) for s in stages]
            net = lf.TransferNet([frozen(s) for s in stages], transfer=mechanism)
            for task in tasks:
                net.add_task(task, _head(inner, shape, outputs))
            net = net.to(dtype)
            if last and (plain or len(shape) == 3):
                for parameter in net.parameters():
                    if parameter.dim() == 4:
                        parameter.data = parameter.data.contiguous(
                            memory_format=torch.channels_last
                        )
            if strides:
                for parameter in _may_be_strided(net):
                    _strided(parameter)
            if overflow and _overflows_in_the_head(net, tasks[0]):
                with torch.no_grad():
                    for parameter in net.specific[tasks[0]][-1].parameters():
                        parameter.mul_(torch.finfo(dtype).max / 1e3)
                    for parameter in net.heads[tasks[0]].parameters():
                        parameter.mul_(1e4)
            for layer in net.modules():
                if type(layer) in _BATCH_NORMS and norms_train:
                    layer.train()
        return net

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        _, start, _, odd_kind = _stages(Random(plan), depth, kind, odd_at, plain)
        try:
            made = list(make().modules())
        except ValueError:  # a mechanism that does not take these stages
            transfer = "hps"
            make = _bound(make, "hps")
            made = [m for stage in _stages(Random(plan), depth, kind, odd_at, plain)[0]
                    for m in stage.modules()]  # fmt: skip
        # PyTorch 2.13 crashes in group norm's backward where channels-last input needs no gradient
        contiguous = any(isinstance(m, nn.GroupNorm) for m in made)
        batches = []
        for _ in range(3):
            if kind == "tokens":
                x = torch.randint(7, (samples, *start))
                x = x if dtype is torch.float64 else x.to(dtype)
            else:
                x = torch.randn(samples, *start).to(dtype)
            if likelihood == "gaussian":
                y = torch.randn(samples, outputs).to(dtype)
            else:
                y = torch.randint(outputs, (samples,))
            batches.append((x if contiguous else _layout(pick, x), _layout(pick, y)))
    return Case(
        make,
        space_of(pick, depth),
        batches,
        likelihood,
        pick.choice(["count", "mean_posterior", "uniform", "historic", "tensor"]),
        _events(pick),
        odd_kind,
        {
            "overflow": overflow,
            "seed": seed,
            "transfer": str(transfer),
            "strided": strides,
            "last": last,
            "norms_train": norms_train,
        },
    )


def _bound(make: Callable[[object], lf.TransferNet], mechanism: object) -> Callable:
    return lambda: make(mechanism)


def draw_plain(pick: Random) -> Case:
    """A case that brute force can check: no odd stages."""
    return draw(pick, odd=False, mechanisms=("hps",))


def draw_with_dropout(pick: Random) -> Case:
    """A case with a random layer in some stage."""
    return draw(pick, odd=False, dropout=True)


def draw_shallow(pick: Random) -> Case:
    """A case of at most two stages, quick to compile."""
    return draw(pick, max_depth=2)
