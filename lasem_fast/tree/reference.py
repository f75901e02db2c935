"""The naive loop over configurations, as published: the specification of what the tree computes.

Every configuration is a network of d stages and a head that is run on its own, once for the E-step
and once more for the M-step. Nothing is shared between configurations but the weights.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from lasem_fast.backends.operations import Targets
from lasem_fast.configs import Configuration
from lasem_fast.levels.plan import SHARED, SPECIFIC
from lasem_fast.networks import checks
from lasem_fast.networks.network import Network
from lasem_fast.tree.evaluation import Evaluation, Follow, Part, Whole


class NaiveLoop:
    """Evaluates configurations one after another.

    Args:
        configs: their bits.
        numbers: which configurations of a larger loop they are; None: all of this one.
    """

    def __init__(
        self, configs: Sequence[Configuration], numbers: Sequence[int] | None = None
    ) -> None:
        self.configs = configs
        self.numbers = range(len(configs)) if numbers is None else numbers

    def logits(self, network: Network, x: Tensor) -> Tensor:
        """The head's outputs ``[C, N, K]`` of all configurations, in the layers' present modes."""
        outputs = []
        for number, config in zip(self.numbers, self.configs, strict=True):
            own = partial(_own, number)
            h = x.clone()  # a stage may write to its input
            for i, (branches, shared) in enumerate(zip(network.stages, config, strict=True)):
                branch = branches[SHARED if shared else SPECIFIC]
                with network.rows_apart(branch.module, 1, len(x), own):
                    h = branch(h)
                checks.check_is_tensor(h, branch.module, f"stage {i + 1}")
            with network.rows_apart(network.head, 1, len(x), own):
                logits = network.head(h)
            checks.check_logits(logits, 1, x.shape[0], network.task)
            outputs.append(logits)
        return torch.stack(outputs)

    def evaluate(
        self,
        network: Network,
        x: Tensor,
        *,
        one_pass: bool,
        follow: Follow = "all",
        targets: Targets | None = None,
    ) -> Evaluation:
        """Every configuration for the E-step (dropout off, no gradient), and for the M-step."""
        if one_pass:
            logits = self.logits(network, x)
            return Whole(logits, logits)
        return _TwoForwards(self, network, x)


def _own(number: int, weights: Tensor, known: Any) -> Tensor:
    """The weight of one configuration, ``[1]``."""
    return weights[number : number + 1]


class _TwoForwards:
    """As published: the M-step has a forward of its own."""

    scores = whole = pair = None

    def __init__(self, loop: NaiveLoop, network: Network, x: Tensor) -> None:
        self.loop, self.network, self.x = loop, network, x
        with torch.no_grad(), network.random_layers_off():
            self.e_step = loop.logits(network.aside(), x)

    def m_step(self, weighs: Tensor | None) -> Part:
        if weighs is None:
            return Part(None, self.loop.logits(self.network, self.x))
        rows = weighs.nonzero().flatten().tolist()
        some = NaiveLoop([self.loop.configs[row] for row in rows], rows)
        return Part(tuple(rows), some.logits(self.network, self.x))

    def share_of(self, weighs: Tensor) -> float | None:
        return None
