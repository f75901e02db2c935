"""The networks of the paper, ready to use, at full size or narrowed.

    arch = lf.nets.cifar100(layers=4, transfer="tf")
    net = arch.net()
    net.add_task("birds", arch.head(classes=10))
    em = lf.LASEM.reference(net, arch.space())

A layer is a convolution (stride 1, SAME) with bias, ReLU, the sum with a skip where one ends here,
and max-pooling (SAME). Every layer is one stage, so configurations carry the paper's layer numbers.
A stage is an ordinary ``nn.Sequential`` of convolution, ReLU and ``nn.MaxPool2d``: with the padding
given by :func:`same_pool` that is exactly the release's pooling. Only layers at which a skip
begins, passes or ends are a module of their own, :class:`SkipLayer`.

Source: LASEM, section 5 and appendix; the authors' release (github.com/Lifelong-ML/LASEM).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from torch import nn

from lasem_fast._numbers import finite_number, is_whole, whole_number
from lasem_fast.configs import ConfigSpace
from lasem_fast.initialisers import release_
from lasem_fast.net import TransferNet
from lasem_fast.networks.skip_layer import SkipLayer
from lasem_fast.transfer import (
    DeconvolutionalFactorization,
    DeconvSizes,
    HardParameterSharing,
    TensorFactorization,
    TransferMechanism,
)

_DROPOUT = 0.5


@dataclass(frozen=True)
class Architecture:
    """A network of the paper. Lists have one entry per layer.

    Attributes:
        transfer: ``"hps"``, ``"tf"``, ``"dfcnn"`` or a mechanism; by name, with the release's
            initial weights and sizes.
        input_shape: channels, height and width of an image; height and width are equal.
        kernels: sides of the kernels, odd.
        channels: output channels.
        pools: sides of the pooling windows, which are their strides too; 1 for none.
        hidden: widths of the head's hidden layers.
        batch_size: of the paper.
        groups: sizes of the groups that :meth:`space` searches; None for single layers.
        deconvolution: sizes for dfcnn; None where the release has none, for the derived ones of
            :class:`~lasem_fast.transfer.DeconvolutionalFactorization`.
        skips: pairs of 0-based layers (first, last): what enters ``first`` is added behind the
            ReLU of ``last``. They do not overlap.

    Raises:
        TypeError, ValueError: an attribute is not as described.
    """

    transfer: str | TransferMechanism
    input_shape: tuple[int, int, int]
    kernels: tuple[int, ...]
    channels: tuple[int, ...]
    pools: tuple[int, ...]
    hidden: tuple[int, ...]
    batch_size: int
    groups: tuple[int, ...] | None = None
    deconvolution: tuple[DeconvSizes, ...] | None = None
    skips: tuple[tuple[int, int], ...] = ()

    def __post_init__(self) -> None:
        self.mechanism()  # refuses what is none
        for name in ("input_shape", "kernels", "channels", "pools", "hidden"):
            sizes = getattr(self, name)
            if not isinstance(sizes, Sequence) or isinstance(sizes, (str, bytes)):
                raise TypeError(f"{name}: expected a sequence of sizes, got {sizes!r}")
            for size in sizes:
                whole_number(size, name)
        whole_number(self.batch_size, "batch_size")
        if len(self.input_shape) != 3 or self.input_shape[1] != self.input_shape[2]:
            raise ValueError(
                f"input_shape: expected channels, height and the same width, got "
                f"{self.input_shape!r}"
            )
        if not self.kernels or not all(kernel % 2 for kernel in self.kernels):
            raise ValueError(f"kernels: expected odd sides, at least one, got {self.kernels!r}")
        for name in ("channels", "pools"):
            if len(getattr(self, name)) != self.depth:
                raise ValueError(
                    f"{name}: expected one entry for each of the {self.depth} layers, got "
                    f"{getattr(self, name)!r}"
                )
        _check_skips(self.skips, self.depth)
        self.space()  # refuses groups that do not fit

    @property
    def depth(self) -> int:
        """Number of layers, which are the stages."""
        return len(self.kernels)

    @property
    def features(self) -> int:
        """Number of features that enter the head."""
        return self.channels[-1] * self._sides()[-1] ** 2

    def net(self) -> TransferNet:
        """A new net without tasks, with new weights."""
        stages = self.stages()
        for stage in stages:
            release_(stage)
        return TransferNet(stages, transfer=self.mechanism())

    def head(self, classes: int) -> nn.Sequential:
        """A new head ``-> [N, classes]``: flattening, dropout, hidden layers with ReLU, output.

        The release flattens channels last; the order of features is the first layer's matter only.
        """
        classes = whole_number(classes, "classes")
        widths = [self.features, *self.hidden]
        layers: list[nn.Module] = [nn.Flatten(), nn.Dropout(_DROPOUT)]
        for inputs, outputs in pairwise(widths):
            layers += [nn.Linear(inputs, outputs), nn.ReLU()]
        head = nn.Sequential(*layers, nn.Linear(widths[-1], classes))
        release_(head)
        return head

    def space(self, groups: Sequence[int] | None = None) -> ConfigSpace:
        """The space that the paper searches, or the one of other groups."""
        return ConfigSpace(self.depth, self.groups if groups is None else groups)

    def mechanism(self) -> TransferMechanism:
        """The transfer mechanism, with the release's initial weights for specific branches."""
        if isinstance(self.transfer, TransferMechanism):
            return self.transfer
        name = self.transfer if isinstance(self.transfer, str) else ""
        if name == "hps":
            return HardParameterSharing(init=release_)
        if name == "tf":
            return TensorFactorization(init=release_)
        if name == "dfcnn":
            return DeconvolutionalFactorization(self.deconvolution, init=release_)
        raise ValueError(
            f"transfer: expected 'hps', 'tf', 'dfcnn' or a TransferMechanism, got {self.transfer!r}"
        )

    def stages(self) -> list[nn.Module]:
        """The layers, with PyTorch's initial weights."""
        inputs = (self.input_shape[0], *self.channels[:-1])
        begins, ends = {first for first, _ in self.skips}, {last for _, last in self.skips}
        stages: list[nn.Module] = []
        for i, side in enumerate(self._sides()[:-1]):
            kernel = self.kernels[i]
            conv = nn.Conv2d(inputs[i], self.channels[i], kernel, padding=kernel // 2)
            pool = same_pool(side, self.pools[i])
            if any(first <= i <= last for first, last in self.skips):
                stages.append(SkipLayer(conv, pool, begins=i in begins, ends=i in ends))
            elif self.pools[i] > 1:
                stages.append(nn.Sequential(conv, nn.ReLU(), pool))
            else:
                stages.append(nn.Sequential(conv, nn.ReLU()))
        return stages

    def _sides(self) -> list[int]:
        """The side of the image that enters each layer, and of what leaves the last."""
        sides = [self.input_shape[1]]
        for pool in self.pools:
            sides.append(-(-sides[-1] // pool))
        return sides


def same_pool(side: int, window: int) -> nn.Module:
    """TensorFlow's SAME max-pooling of an image of ``side`` by ``side``, stride ``window``.

    There the output has ceil(side / window) entries and the smaller half of the padding, of -inf,
    comes first; ``nn.MaxPool2d`` pads that half on both sides and adds the odd one at the end by
    ``ceil_mode``. Equal exactly, for every side and window.
    """
    side, window = whole_number(side, "side"), whole_number(window, "window")
    if window == 1:
        return nn.Identity()
    missing = -side % window
    return nn.MaxPool2d(window, padding=missing // 2, ceil_mode=missing % 2 == 1)


def cifar100(
    layers: int = 4, transfer: str | TransferMechanism = "hps", width: float = 1.0
) -> Architecture:
    """CIFAR-100 with 4, 6 or 8 layers (images of 32 x 32 in 3 channels).

    Args:
        layers: number of layers.
        transfer: ``"hps"``, ``"tf"``, ``"dfcnn"`` or a mechanism.
        width: factor on the numbers of channels and hidden units (rounded, at least 1).
    """
    layers = _checked_layers(layers, (4, 6, 8))
    return _architecture(
        transfer,
        width,
        input_shape=(3, 32, 32),
        kernels=(3,) * layers,
        channels=(32, 32, 64, 64, 128, 128, 128, 128)[:layers],
        pools=(1, 2, 1, 2, 1, 2, 1, 2)[:layers],
        hidden=(64,),
        batch_size=10,
        deconvolution=_sizes(
            ((2, 16), (2, 24), (2, 32), (2, 36), (2, 64), (2, 72), (2, 72), (2, 72)),
            ((3, 24), (3, 48), (3, 64), (3, 72), (3, 128), (3, 144), (3, 144), (3, 144)),
        )[:layers],
    )


def office_home(
    layers: int = 4, transfer: str | TransferMechanism = "hps", width: float = 1.0
) -> Architecture:
    """Office-Home with 4, 6 or 8 layers (images of 128 x 128 in 3 channels); see cifar100."""
    layers = _checked_layers(layers, (4, 6, 8))
    kernels = {4: (11, 5, 3, 3), 6: (11, 5, 3, 3, 3, 3), 8: (7, 7, 5, 5, 3, 3, 3, 3)}
    channels = {
        4: (64, 256, 256, 256),
        6: (64, 256, 256, 256, 256, 256),
        8: (32, 32, 64, 64, 128, 128, 256, 256),
    }
    pools = {4: (3, 3, 2, 2), 6: (3, 3, 1, 2, 1, 2), 8: (1, 3, 1, 3, 1, 2, 1, 2)}
    deconvolution = {
        4: _sizes(((6, 24), (3, 64), (2, 64), (2, 64)), ((3, 48), (3, 128), (3, 128), (3, 128))),
        6: _sizes(((6, 24), (3, 64), *(((2, 72),) * 4)), ((5, 48), (3, 128), *(((3, 144),) * 4))),
        8: _sizes(
            ((4, 12), (4, 24), (3, 32), (3, 48), (2, 64), *(((2, 72),) * 3)),
            ((3, 24), (3, 48), (3, 64), (3, 96), (3, 128), *(((3, 144),) * 3)),
        ),
    }
    return _architecture(
        transfer,
        width,
        input_shape=(3, 128, 128),
        kernels=kernels[layers],
        channels=channels[layers],
        pools=pools[layers],
        hidden=(256, 64),
        batch_size=16,
        deconvolution=deconvolution[layers],
    )


def stl10(
    layers: int = 6, transfer: str | TransferMechanism = "hps", width: float = 1.0
) -> Architecture:
    """STL-10 with 6 or 9 layers (images of 96 x 96 in 3 channels); see cifar100.

    The 9 layers are searched in groups of three. Under tf the head has one hidden layer less.
    """
    layers = _checked_layers(layers, (6, 9))
    run = layers // 3
    pools = ((1,) * (run - 1) + (3,)) * 3
    deconvolution = {
        6: _sizes(
            ((2, 12), (2, 24), (2, 32), (2, 48), (2, 64), (2, 96)),
            ((3, 24), (3, 48), (3, 64), (3, 96), (3, 128), (3, 192)),
        ),
        9: _sizes(
            (
                (2, 12), (2, 24), (2, 24), (2, 32), (2, 48), (2, 48), (2, 64), (2, 96), (2, 96),
            ),
            (
                (3, 24), (3, 48), (3, 48), (3, 64), (3, 96), (3, 96), (3, 128), (3, 192), (3, 192),
            ),
        ),
    }  # fmt: skip
    by_name = isinstance(transfer, str) and transfer == "tf"
    factorised = by_name or isinstance(transfer, TensorFactorization)
    return _architecture(
        transfer,
        width,
        input_shape=(3, 96, 96),
        kernels=(3,) * layers,
        channels=(32,) * run + (64,) * run + (128,) * run,
        pools=pools,
        hidden=(128,) if factorised else (128, 16),
        batch_size=10,
        groups=(3, 3, 3) if layers == 9 else None,
        deconvolution=deconvolution[layers],
    )


_RESIDUAL_GROUPS = {
    4: (5, 4, 4, 4),
    5: (5, 4, 4, 2, 2),
    6: (5, 4, 2, 2, 2, 2),
    7: (5, 2, 2, 2, 2, 2, 2),
    8: (3, 2, 2, 2, 2, 2, 2, 2),
}


def residual17(
    groups: int = 4, transfer: str | TransferMechanism = "hps", width: float = 1.0
) -> Architecture:
    """The 17-layer residual net for CIFAR-100, searched in 4 to 8 groups; see cifar100.

    Every one of its five skips spans two layers of one group, but any space of 17 stages can be
    searched: the skip is what entered its first layer, whichever branches led there. The release
    has no dfcnn sizes for it; they are derived.
    """
    if not is_whole(groups) or int(groups) not in _RESIDUAL_GROUPS:
        raise ValueError(f"groups: expected one of {sorted(_RESIDUAL_GROUPS)}, got {groups!r}")
    return _architecture(
        transfer,
        width,
        input_shape=(3, 32, 32),
        kernels=(7,) + (3,) * 16,
        channels=(64,) * 5 + (128,) * 4 + (256,) * 4 + (512,) * 4,
        pools=tuple(2 if i in (0, 5, 9, 13) else 1 for i in range(17)),
        hidden=(1000,),
        batch_size=10,
        groups=_RESIDUAL_GROUPS[int(groups)],
        deconvolution=None,
        skips=((1, 2), (3, 4), (7, 8), (11, 12), (15, 16)),
    )


def _architecture(
    transfer: str | TransferMechanism,
    width: float,
    *,
    channels: tuple[int, ...],
    hidden: tuple[int, ...],
    deconvolution: tuple[DeconvSizes, ...] | None,
    **rest: object,
) -> Architecture:
    width = finite_number(width, "width")

    def scaled(n: int) -> int:
        return max(1, round(n * width))

    if deconvolution is not None:
        deconvolution = tuple(
            DeconvSizes(h, scaled(kc), t, scaled(tc)) for h, kc, t, tc in deconvolution
        )
    return Architecture(
        transfer=transfer,
        channels=tuple(map(scaled, channels)),
        hidden=tuple(map(scaled, hidden)),
        deconvolution=deconvolution,
        **rest,
    )


def _sizes(
    knowledge: Sequence[tuple[int, int]], task: Sequence[tuple[int, int]]
) -> tuple[DeconvSizes, ...]:
    """The release's tables: (h, C_k) and (t, C_t) per layer."""
    return tuple(DeconvSizes(*k, *t) for k, t in zip(knowledge, task, strict=True))


def _checked_layers(layers: Any, known: tuple[int, ...]) -> int:
    if not is_whole(layers) or int(layers) not in known:
        raise ValueError(f"layers: expected one of {known}, got {layers!r}")
    return int(layers)


def _check_skips(skips: Any, depth: int) -> None:
    pairs = (
        isinstance(skips, Sequence)
        and not isinstance(skips, (str, bytes))
        and all(
            isinstance(pair, Sequence) and len(pair) == 2 and all(map(is_whole, pair))
            for pair in skips
        )
    )
    ordered = sorted(tuple(pair) for pair in skips) if pairs else [(depth, depth)]
    apart = all(a[1] < b[0] for a, b in pairwise(ordered))
    if not apart or not all(0 <= first <= last < depth for first, last in ordered):
        raise ValueError(
            f"skips: expected pairs of layers first <= last in 0..{depth - 1} that do not overlap, "
            f"got {skips!r}"
        )
