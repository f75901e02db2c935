"""What a backend may do in its own way; everything that it leaves is done in plain PyTorch."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, NamedTuple, Protocol

from torch import Tensor, nn

from lasem_fast.levels.fold import Fold
from lasem_fast.levels.plan import Level
from lasem_fast.levels.relu_and_pool import Pool
from lasem_fast.levels.row_liveness import Liveness

if TYPE_CHECKING:
    from lasem_fast.likelihoods import Likelihood
    from lasem_fast.priors import Prior


class Scores(NamedTuple):
    """The posterior head's outputs for C configurations.

    Attributes:
        log_likelihood: L_c ``[C]``; -inf where a configuration overflowed.
        posterior: P(c | X, y) ``[C]``; 0 where it overflowed.
        nll: mean of -log P(y_i | x_i, c) ``[C]``; inf where it overflowed. Has a gradient where
            that is asked for.
        loss: scalar, the sum of ``posterior * nll`` with the posterior held constant, with its
            gradient. NaN if a configuration overflowed.
        counted: whether the operation has updated the prior itself.
    """

    log_likelihood: Tensor
    posterior: Tensor
    nll: Tensor
    loss: Tensor
    counted: bool = False


class Targets(NamedTuple):
    """What outputs of all configurations are scored by.

    Attributes:
        y: the mini-batch's.
        likelihood: how outputs are scored.
        prior: of the configurations.
        task: whose prior it is.
        count: whether the prior may be updated.
        check: raises for outputs ``[C, N, K]`` to which ``y`` does not fit; reads no values.
    """

    y: Tensor
    likelihood: Likelihood
    prior: Prior
    task: str
    count: bool
    check: Callable[[Tensor], None]


class Norm(NamedTuple):
    """A batch norm or a group norm behind a layer's core.

    Attributes:
        layers: the module of each branch.
        weights: one per branch ``[C]``, or none.
        biases: likewise.
        eps: added to the variance.
        frozen: whether it uses running statistics; else those of every row's mini-batch by itself.
        groups: of a group norm, whose statistics are each sample's own; 0 for a batch norm.
    """

    layers: list[nn.Module]
    weights: list[Tensor]
    biases: list[Tensor]
    eps: float
    frozen: bool
    groups: int = 0


class Layer(NamedTuple):
    """One weighted layer in all its branches, with its epilogue.

    ``pool(relu_after(relu(norm(core(x))) + skip))``, where everything but the core may be missing;
    an activation may stand in the place of the first ReLU.

    Attributes:
        core: the convolution or linear layer of one branch; the others have the same settings.
        weights: one per branch, of one shape.
        biases: one per branch, or none.
        flatten: whether every sample is flattened first.
        relu: whether a ReLU follows the core.
        relu_after: whether a ReLU follows the sum with the skip.
        pool: the max-pool at the end.
        norm: the batch or group norm, or None. Level operations run the core of a layer with one
            alone, or with a frozen one as part of its weights.
        activation: another function of one value than the ReLU, or None. Level operations run the
            core of a layer with one alone.
    """

    core: nn.Module
    weights: list[Tensor]
    biases: list[Tensor]
    flatten: bool
    relu: bool
    relu_after: bool
    pool: Pool
    norm: Norm | None = None
    activation: nn.Module | None = None

    def core_alone(self) -> Layer:
        """The layer without what follows its core."""
        return self.up_to_norm()._replace(norm=None)

    def up_to_norm(self) -> Layer:
        """The layer without what follows its norm."""
        return self._replace(relu=False, relu_after=False, pool=Pool(), activation=None)

    def with_norm_folded_in(self) -> Layer:
        """The layer with its frozen batch norm as part of the weights."""
        scales, shifts, weights, biases = self.norm.weights, self.norm.biases, [], []
        for i, norm in enumerate(self.norm.layers):
            factor = (norm.running_var + norm.eps).rsqrt()
            bias = -norm.running_mean
            if self.biases:
                bias = self.biases[i] + bias
            if scales:
                factor = factor * scales[i]
            bias = bias * factor
            weights.append(self.weights[i] * factor[:, None, None, None])
            biases.append(bias + shifts[i] if shifts else bias)
        return self._replace(weights=weights, biases=biases, norm=None)


class Skip(NamedTuple):
    """What is added to a layer's output.

    Attributes:
        data: ``[S, N, H, W, C]``, rows outermost.
        rows: for each row of the level, the row of ``data`` that it reads; None: its own.
    """

    data: Tensor
    rows: tuple[int, ...] | None


class LevelOperation(Protocol):
    """A backend's way to run one layer on all rows of a level, forward and backward.

    Attributes:
        carries: whether it can pass on ``x`` for a skip further on, whose gradient it then adds
            where it makes its own of ``x``.
    """

    carries: bool

    def why_not(self, layer: Layer, x: Tensor) -> str:
        """Why it cannot take the layer on inputs like ``x`` (dtype, device), in words; or ""."""

    def __call__(
        self,
        layer: Layer,
        x: Tensor,
        level: Level,
        skip: Skip | None,
        liveness: Liveness | None,
        carry: bool = False,
    ) -> Tensor | tuple[Tensor, Tensor] | None:
        """The output ``[R, N, H, W, C]`` or ``[R, N, F]`` of the level's R rows.

        Args:
            layer: one that it takes.
            x: the parents ``[P, N, H, W, C]`` or ``[P, N, F]``, with any strides.
            level: the rows.
            skip: what the layer adds, of the size of its output before the pool.
            liveness: which rows the backward has to look at; the others' gradients are 0.
            carry: ``x`` is a skip further on; asked only of an operation that ``carries``.

        Returns:
            With ``carry`` the output and ``x``, or the output alone where it cannot; None where
            sizes forbid what :meth:`why_not` could not know.
        """


class Normed(NamedTuple):
    """What a batch norm of R rows gives.

    Attributes:
        output: ``[R, N, H', W', C]``.
        statistics: of each row's mini-batch, mean and unbiased variance ``[R, 2 * C]``, without a
            gradient.
    """

    output: Tensor
    statistics: Tensor


NormOperation = Callable[[Layer, Tensor, Level, "Skip | None", "Liveness | None"], "Normed | None"]
"""``(layer, y, level, skip, liveness)``: what follows the core of a layer with a norm, whose output
is ``y [R, N, H, W, C]``; None for what it cannot take."""

HeadOperation = Callable[[nn.Module, Fold, int, "Sequence[int] | None"], "Tensor | None"]
"""``(head, h, rows, order) -> logits [rows * N, K]``, rows outermost, row ``order[i]`` at place i
(None: as they are)."""

ScoredHeadOperation = Callable[
    [nn.Module, Fold, Sequence[int], "Sequence[int] | None", Targets, bool], "Scores | None"
]
"""``(head, h, leaves, order, targets, pair) -> scores``: a head whose outputs nobody sees but the
posterior head. ``leaves``: for each configuration, the row of ``h`` that is its leaf; ``order``: as
for a head. ``pair``: the outputs without the head's random layers are the E-step's, those with them
the M-step's."""

ScoreOperation = Callable[
    [Tensor, Tensor, "Likelihood", "Prior", str, bool, bool, bool], "Scores | None"
]
"""``(logits [C, N, K], y, likelihood, prior, task, count, paired, nll_grad) -> scores``: the
posterior head of one mini-batch; without ``count`` the prior stays as it is. ``paired``: logits
``[2, C, N, K]``, the E-step's, which have no gradient, before the M-step's, of which the loss is.
``nll_grad``: an M-step may weigh configurations by something else than the posterior, so that the
nll of a single set of logits has a gradient."""


class Operations(NamedTuple):
    """A backend's operations of each kind, best first; each returns None for what it cannot take.

    Attributes:
        levels: layers on all rows of a level. A stage of which they take nothing runs in PyTorch.
        heads: heads that can read a level's rows as they are.
        heads_twice: the same with their random layers off and on at once: ``[2 * rows * N, K]``,
            first those without, which have no gradient.
        scored_heads: heads together with the posterior head.
        scores: the posterior head.
        norms: batch norm in training mode.
    """

    levels: tuple[LevelOperation, ...] = ()
    heads: tuple[HeadOperation, ...] = ()
    heads_twice: tuple[HeadOperation, ...] = ()
    scored_heads: tuple[ScoredHeadOperation, ...] = ()
    scores: tuple[ScoreOperation, ...] = ()
    norms: tuple[NormOperation, ...] = ()

    def after(self, others: Operations) -> Operations:
        """These operations behind ``others``, for what those do not take."""
        return Operations(*(theirs + ours for ours, theirs in zip(self, others, strict=True)))
