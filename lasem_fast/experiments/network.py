"""The network of an experiment: one of the paper's by name, or the user's own."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

from torch import nn

from lasem_fast import nets
from lasem_fast.configs import ConfigSpace
from lasem_fast.experiments import schema, users_objects
from lasem_fast.experiments.config import ConfigError, suggestion
from lasem_fast.initialisers import release_
from lasem_fast.lifelong import Task
from lasem_fast.net import TransferNet
from lasem_fast.transfer import MECHANISMS, TransferMechanism

NETS: dict[str, Callable[..., nets.Architecture]] = {
    **{f"cifar-{n}": partial(nets.cifar100, n) for n in (4, 6, 8)},
    **{f"office-home-{n}": partial(nets.office_home, n) for n in (4, 6, 8)},
    **{f"stl-{n}": partial(nets.stl10, n) for n in (6, 9)},
    "residual-17": lambda **options: nets.residual17(**options),
    **{f"residual-17-{groups}g": partial(nets.residual17, groups) for groups in range(4, 9)},
}


class Network:
    """Makes nets, stages and heads, with the release's initial weights for the paper's nets.

    Args:
        spec: the table ``[net]``. A net of the user's own is a function of a number of classes that
            gives ``(stages, head)``, called for every net and every head.

    Raises:
        ConfigError: there is no such net, or it does not fit its groups.
    """

    def __init__(self, spec: schema.Net) -> None:
        self._spec = spec
        self._own: Callable[[int], tuple[Any, nn.Module]] | None = None
        if ":" in spec.name:
            self._own = users_objects.load(spec.name, "net.name")
            self.depth = len(list(self._own(2)[0]))
        elif spec.name in NETS:
            self.depth = self._architecture("hps").depth
        else:
            raise ConfigError(
                f"net.name: expected one of {', '.join(NETS)}, or a function of your own as "
                f"file.py:function, got {spec.name!r}{suggestion(spec.name, NETS)}"
            )
        groups = spec.groups
        if groups is None and self._own is None:
            groups = self._architecture("hps").groups
        try:
            self.space = ConfigSpace(self.depth, groups)
        except (TypeError, ValueError) as error:
            raise ConfigError(f"net.{error}") from error

    def _architecture(self, transfer: str) -> nets.Architecture:
        return NETS[self._spec.name](transfer=transfer, width=self._spec.width)

    @property
    def is_office_home_6(self) -> bool:
        """Whether the release has static configurations of its own for this net."""
        return self._spec.name == "office-home-6"

    @property
    def batch_size(self) -> int | None:
        """The paper's, where there is one."""
        return None if self._own is not None else self._architecture("hps").batch_size

    @property
    def init(self) -> Callable[[nn.Module], None] | None:
        """How new weights are drawn; None: by each layer's own rule."""
        return None if self._own is not None else release_

    def net(self, transfer: str) -> TransferNet:
        """A new net without tasks."""
        if self._own is not None:
            return TransferNet(self.stages(), transfer=transfer)
        return self._architecture(transfer).net()

    def stages(self) -> list[nn.Module]:
        """New stages."""
        if self._own is not None:
            return list(self._own(2)[0])
        stages = self._architecture("hps").stages()
        for stage in stages:
            release_(stage)
        return stages

    def mechanism(self, transfer: str) -> TransferMechanism:
        """The transfer mechanism by its name."""
        if self._own is not None:
            return MECHANISMS[transfer]()
        return self._architecture(transfer).mechanism()

    def head(self, task: Task, transfer: str) -> nn.Module:
        """A new head."""
        if self._own is not None:
            return self._own(task.n_classes)[1]
        return self._architecture(transfer).head(task.n_classes)
