"""What an evaluator gives for one mini-batch: outputs for the E-step, then for the M-step."""

from __future__ import annotations

from typing import Literal, NamedTuple, Protocol

from torch import Tensor

from lasem_fast.backends.operations import Scores, Targets
from lasem_fast.levels.liveness import TreeLiveness
from lasem_fast.networks.network import Network

Follow = Literal["all", "some", "few"]
"""How many configurations an M-step will ask for; "few": so few that a forward of their own costs
less than a backward over everything."""


class Part(NamedTuple):
    """Outputs of some configurations, with their gradients' graph.

    Attributes:
        configs: their rows in the space, ascending; None: all.
        logits: the head's outputs ``[c, N, K]``.
    """

    configs: tuple[int, ...] | None
    logits: Tensor


class Evaluation(Protocol):
    """One mini-batch under all configurations."""

    @property
    def scores(self) -> Scores | None:
        """The whole step's, where one operation gave them with the outputs, which are then not
        there; None anywhere else."""

    @property
    def whole(self) -> Tensor | None:
        """The outputs ``[C, N, K]`` that serve both steps, with their graph; None where the M-step
        has its own (random layers) or gives only what it is asked for (bounded memory)."""

    @property
    def pair(self) -> Tensor | None:
        """The E-step's outputs before the M-step's, ``[2, C, N, K]``, where one pass gave both; the
        first half has no gradient."""

    @property
    def e_step(self) -> Tensor:
        """The head's outputs ``[C, N, K]`` of all configurations with random layers off."""

    def m_step(self, weighs: Tensor | None) -> Part:
        """The outputs for the M-step, random layers as they are.

        Args:
            weighs: bool ``[C]``, the configurations whose gradient counts; the others may be left
                out, and no backward looks at rows that only they use. None: all.
        """

    def share_of(self, weighs: Tensor) -> float | None:
        """How much of the tree some configurations use, 0 to 1; None where a backward leaves the
        rest out anyway. Waits for the device."""


class Evaluator(Protocol):
    """Evaluates the configurations that it was made for."""

    def logits(self, network: Network, x: Tensor) -> Tensor:
        """The head's outputs ``[C, N, K]`` of all configurations, in the layers' present modes."""

    def evaluate(
        self,
        network: Network,
        x: Tensor,
        *,
        one_pass: bool,
        follow: Follow = "all",
        targets: Targets | None = None,
    ) -> Evaluation:
        """Starts on a mini-batch.

        Args:
            network: the task's network.
            x: the mini-batch.
            one_pass: there is no E-step of its own: both steps see the M-step's outputs.
            follow: how many configurations the M-step will ask for.
            targets: what an operation that gives scores together with outputs may score them by;
                None: only outputs are asked for.
        """


class Whole(NamedTuple):
    """All configurations at once.

    Attributes:
        calm: outputs for the E-step.
        noisy: outputs for the M-step; the same object where there are no random layers.
        liveness: told which rows matter once that is known; None where all do.
        pair: both at once, ``[2, C, N, K]``, where one pass gave them.
    """

    calm: Tensor
    noisy: Tensor
    liveness: TreeLiveness | None = None
    pair: Tensor | None = None

    @property
    def scores(self) -> None:
        return None

    @property
    def whole(self) -> Tensor | None:
        return self.noisy if self.calm is self.noisy else None

    @property
    def e_step(self) -> Tensor:
        return self.calm

    def m_step(self, weighs: Tensor | None) -> Part:
        if weighs is not None and self.liveness is not None:
            self.liveness.keep(weighs)
        return Part(None, self.noisy)

    def share_of(self, weighs: Tensor) -> float | None:
        return None if self.liveness is None else self.liveness.share_of(weighs)


class Scored:
    """Scores of all configurations, made with their outputs, which nobody holds."""

    whole = pair = None

    def __init__(self, scores: Scores) -> None:
        self.scores = scores

    @property
    def e_step(self) -> Tensor:
        raise RuntimeError("outputs were scored where they were made")

    def m_step(self, weighs: Tensor | None) -> Part:
        raise RuntimeError("outputs were scored where they were made")

    def share_of(self, weighs: Tensor) -> float | None:
        return None
