"""What a backend may do in its own way; everything that it leaves is done in plain PyTorch."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, NamedTuple

from torch import Tensor, nn

from lasem_fast.fold import Fold

if TYPE_CHECKING:
    from lasem_fast.likelihoods import Likelihood
    from lasem_fast.priors import Prior
    from lasem_fast.transfer import Branch


class Scores(NamedTuple):
    """The posterior head's outputs for C configurations.

    Attributes:
        log_likelihood: L_c ``[C]``; -inf where a configuration overflowed.
        posterior: P(c | X, y) ``[C]``; 0 where it overflowed.
        nll: mean of -log P(y_i | x_i, c) ``[C]``; inf where it overflowed.
        loss: scalar, the sum of ``posterior * nll`` with the posterior held constant; the only
            output with a gradient. NaN if a configuration overflowed.
        counted: whether the operation has updated the prior itself.
    """

    log_likelihood: Tensor
    posterior: Tensor
    nll: Tensor
    loss: Tensor
    counted: bool = False


LevelOperation = Callable[["Sequence[Branch]", Fold, int], "Fold | None"]
"""``(branches, h, rows) -> output``: a level on which each of the ``rows`` prefixes in ``h`` goes
through every branch."""

HeadOperation = Callable[[nn.Module, Fold, int], "Tensor | None"]
"""``(head, h, rows) -> logits [rows * N, K]``, rows outermost."""

ScoreOperation = Callable[[Tensor, Tensor, "Likelihood", "Prior", str, bool], "Scores | None"]
"""``(logits [C, N, K], y, likelihood, prior, task, count) -> scores``: the posterior head of one
mini-batch; without ``count`` the prior stays as it is."""


class Operations(NamedTuple):
    """A backend's operations of each kind, best first; each returns None for what it cannot take.

    Attributes:
        levels: stages whose branches are evaluated together. A stage that none takes has each of
            its branches called once on the folded batch.
        heads: heads that can read a level's rows as they are.
        scores: the posterior head.
    """

    levels: tuple[LevelOperation, ...] = ()
    heads: tuple[HeadOperation, ...] = ()
    scores: tuple[ScoreOperation, ...] = ()

    def after(self, others: Operations) -> Operations:
        """These operations behind ``others``, for what those do not take."""
        return Operations(*(theirs + ours for ours, theirs in zip(self, others, strict=True)))
