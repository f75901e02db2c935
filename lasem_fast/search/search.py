"""One mini-batch of the search: evaluation, E-step, and the loss of one M-step."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from lasem_fast._host_values import is_transformed
from lasem_fast.backends.operations import Scores, Targets
from lasem_fast.configs import ConfigSpace, Configuration
from lasem_fast.levels.plan import SHARED, SPECIFIC
from lasem_fast.likelihoods import Likelihood
from lasem_fast.networks import checks
from lasem_fast.networks.network import Network
from lasem_fast.priors import Prior
from lasem_fast.search import dispatch
from lasem_fast.search.m_step import MStep
from lasem_fast.search.parts import Parts
from lasem_fast.search.posterior import Evidence, evidence, expected_nll, is_finite, posterior_of
from lasem_fast.search.zeros import with_zeros
from lasem_fast.tree.evaluation import Evaluation, Evaluator


class Found(NamedTuple):
    """What one mini-batch gave.

    Attributes:
        loss: scalar, with its graph; without the mechanisms' auxiliary terms.
        weights: ``[C]``, of the configurations in the loss.
        posterior: ``[C]``.
        log_likelihood: ``[C]``; -inf for a configuration that overflowed, NaN for one that was not
            evaluated.
        nll: ``[C]``; inf and NaN likewise.
        dropped_mass: scalar, or None where nothing was left out.
        counted: whether the prior has counted the posterior already.
        finite: bool, of the configurations that were evaluated: whether the nll is; None: unknown.
        few: whether the M-step followed so few configurations that a forward of its own is cheaper
            next time; None: nothing is known about it.
    """

    loss: Tensor
    weights: Tensor
    posterior: Tensor
    log_likelihood: Tensor
    nll: Tensor
    dropped_mass: Tensor | None
    counted: bool
    finite: Tensor | None
    few: bool | None = None


class NothingLeft(ValueError):
    """A posterior to follow has no weight on a configuration with a finite loss."""


class Search:
    """Looks at an open task's configurations, one mini-batch at a time.

    Args:
        space: the configurations.
        likelihood: how outputs are scored.
        prior: of the configurations; read here, counted by who calls.
        backend: name of a backend that can run.
        m_step: which configurations an M-step follows.
        max_memory: what a step may hold, see :func:`lasem_fast.tree.budget.bytes_of`; None:
            anything.
    """

    def __init__(
        self,
        space: ConfigSpace,
        likelihood: Likelihood,
        prior: Prior,
        backend: str,
        m_step: MStep,
        max_memory: float | None,
    ) -> None:
        self.space = space
        self.likelihood = likelihood
        self.prior = prior
        self.backend = backend
        self.m_step = m_step
        self.max_memory = max_memory
        self.everything = dispatch.evaluator(backend, space.configs, max_memory)
        operations = dispatch.operations(backend)
        self._scores = operations.scores
        self._gives_scores = bool(operations.scored_heads)
        # of each stage, whether its shared branch is used, and its own
        self._used = [frozenset(bits) for bits in zip(*space.configs, strict=True)]
        self._some: tuple[tuple[int, ...], Evaluator] | None = None
        # tasks whose last M-step followed so little that a forward of its own is cheaper
        self.few: set[str] = set()

    def step(
        self,
        network: Network,
        x: Tensor,
        y: Tensor,
        frozen: Tensor | None,
        reads_values: bool,
        counts: bool,
        parts: Parts | None = None,
    ) -> Found:
        """E-step and M-step.

        Args:
            network: the task's.
            x: the mini-batch.
            y: its targets.
            frozen: ``[C]``, a posterior to follow in place of this mini-batch's own; None: infer.
            reads_values: whether values may be looked at, which waits for a device.
            counts: whether the prior may count the posterior.
            parts: those of the mini-batch in all processes; None: this one has the whole.

        Raises:
            TypeError, ValueError: the targets do not fit, or no configuration has a finite loss.
        """
        bad: set[int] = set()  # configurations that overflow
        agree = None if parts is None else parts.as_first

        while True:
            rows = self._all_but(bad)
            if frozen is not None:
                posterior = _without(frozen, bad)
                weights = self.m_step.weights(posterior, agree)
                if weights.weighs is not None and reads_values:
                    rows = _numbers(weights.weighs)
            targets = None
            if frozen is None and rows is None and not reads_values and parts is None:
                targets = self._targets(y, network.task, counts)
            evaluation = self._evaluate(network, x, rows, frozen is not None, reads_values, targets)
            if evaluation.scores is not None:
                return _of_scores(evaluation.scores)
            e_output = evaluation.e_step
            checks.check_logits_device(e_output, y, network.task)
            self.likelihood.check_target(y, e_output, values=reads_values)
            scores = None
            if frozen is None and rows is None:
                exact = self.m_step.is_exact and parts is None
                scores = self._scored(evaluation, y, network.task, reads_values, counts, exact)
            alone = scores is not None and parts is None
            if alone and self._follows_all(scores.posterior, reads_values):
                return _of_scores(scores)
            if scores is not None:
                e_step = Evidence(scores.log_likelihood, scores.nll, is_finite(scores.nll))
            else:
                e_step = evidence(e_output, y, self.likelihood)
            known = scores is not None or not reads_values  # that all are finite, or not at all
            more = () if known else _numbers(~e_step.finite, rows)
            log_likelihood = self._spread(e_step.log_likelihood, rows, bad, -torch.inf)
            if parts is not None:
                left_out = bad.union(more) if reads_values else None
                log_likelihood, more = parts.together(log_likelihood, left_out)
            if not bad.issuperset(more):
                bad.update(more)
                continue
            if frozen is None:
                if alone:
                    posterior = scores.posterior
                else:
                    posterior = self._infer(network.task, log_likelihood, reads_values)
                weights = self.m_step.weights(posterior, agree)
            followed = weights.weighs
            part = evaluation.m_step(followed if rows is None else _picked(followed, rows))
            m_rows = part.configs if rows is None else _composed(rows, part.configs)
            m_step = e_step
            if part.logits is not e_output:
                m_step = evidence(part.logits, y, self.likelihood)
            if not reads_values or m_step is e_step:
                break
            more = _numbers(~m_step.finite, m_rows)
            if parts is not None:
                more = parts.left_out(bad.union(more))
            if bad.issuperset(more):
                break
            bad.update(more)
        few = None
        if reads_values and weights.weighs is not None and frozen is None and rows is None:
            share = evaluation.share_of(weights.weighs)
            few = None if share is None else share < _FEW
        loss = expected_nll(_picked(weights.weights, m_rows), m_step.nll)
        # transforms give zeros in any case
        if m_rows is not None and loss.requires_grad and not is_transformed():
            loss = with_zeros(loss, self._left_out(network, m_rows))
        nll = e_step.nll.detach()
        if not reads_values:
            # an overflowing configuration shows here and in the loss
            nll = nll.nan_to_num(torch.inf, torch.inf, torch.inf)
            if scores is not None:  # a mini-batch that no configuration explains shows there
                loss = torch.where(torch.isnan(scores.loss.detach()), torch.nan, loss)
        return Found(
            loss=loss,
            weights=weights.weights,
            posterior=posterior.to(log_likelihood),
            log_likelihood=log_likelihood,
            nll=self._spread(nll, rows, bad, torch.inf),
            dropped_mass=weights.dropped_mass,
            counted=False,
            finite=e_step.finite if parts is None else log_likelihood > -torch.inf,
            few=few,
        )

    def note(self, task: str, found: Found) -> None:
        """Decides how the next E-step of a task is run: whether it pays to keep its graph."""
        if found.few is not None:
            (self.few.add if found.few else self.few.discard)(task)

    def _follows_all(self, posterior: Tensor, reads_values: bool) -> bool:
        """Whether the M-step is seen to follow every configuration with its posterior."""
        return self.m_step.is_exact or (reads_values and self.m_step.follows_all(posterior))

    def _all_but(self, bad: set[int]) -> tuple[int, ...] | None:
        """The configurations that are left; None for all."""
        if not bad:
            return None
        left = tuple(row for row in range(len(self.space)) if row not in bad)
        if not left:
            raise ValueError(
                f"x: expected a mini-batch on which some configuration has a finite loss, got NaN "
                f"or infinity for all {len(self.space)}; the weights are finite, so the "
                f"activations overflow: use smaller inputs, weights or learning rate"
            )
        return left

    def _evaluate(
        self,
        network: Network,
        x: Tensor,
        rows: tuple[int, ...] | None,
        one_pass: bool,
        reads_values: bool,
        targets: Targets | None,
    ) -> Evaluation:
        evaluator = self.present_evaluator() if rows is None else self._evaluator_of(rows)
        if network.batch_norms is not None:
            network.batch_norms.begin(rows)
        follow = "all" if self.m_step.is_exact else "some"
        if reads_values and follow == "some" and not one_pass and network.task in self.few:
            follow = "few"
        return checks.or_misfit(
            lambda: evaluator.evaluate(
                network, x, one_pass=one_pass, follow=follow, targets=targets
            ),
            network,
            x,
        )

    def present_evaluator(self) -> Evaluator:
        """All configurations; in PyTorch's own operations inside torch.func transforms."""
        if self.backend != "reference" and is_transformed():
            return dispatch.evaluator("torch", self.space.configs)
        return self.everything

    def evaluator_of(self, configs: Sequence[Configuration]) -> Evaluator:
        """An evaluator of some configurations; inside torch.func transforms likewise."""
        transformed = self.backend != "reference" and is_transformed()
        backend = "torch" if transformed else self.backend
        return dispatch.evaluator(backend, configs, None if transformed else self.max_memory)

    def _evaluator_of(self, rows: tuple[int, ...]) -> Evaluator:
        """An evaluator of some configurations; the last one is kept."""
        if self._some is None or self._some[0] != rows:
            self._some = rows, self.evaluator_of([self.space[row] for row in rows])
        return self._some[1]

    def _targets(self, y: Tensor, task: str, counts: bool) -> Targets | None:
        """What outputs may be scored by where they are made, if nothing else is done with them."""
        if not (self.m_step.is_exact and self._gives_scores) or torch.compiler.is_compiling():
            return None
        if is_transformed():
            return None

        def check(output: Tensor) -> None:
            checks.check_logits_device(output, y, task)
            self.likelihood.check_target(y, output, values=False)

        return Targets(y, self.likelihood, self.prior, task, counts, check)

    def _left_out(self, network: Network, rows: Sequence[int]) -> list[Tensor]:
        """The weights of branches that the space uses, and these configurations do not."""
        left = []
        followed = map(set, zip(*(self.space[row] for row in rows), strict=True))
        for branches, used, kept in zip(network.stages, self._used, followed, strict=True):
            for shared in used - kept:
                left += branches[SHARED if shared else SPECIFIC].weights()
        return left

    def _scored(
        self,
        evaluation: Evaluation,
        y: Tensor,
        task: str,
        reads_values: bool,
        counts: bool,
        exact: bool,
    ) -> Scores | None:
        """What a backend's posterior head gives; its nll has a gradient for an M-step of its own.

        ``exact``: whether the M-step follows the posterior head's own posterior as it is.

        None where it has none, or where a configuration is to be left out.
        """
        output, paired = evaluation.whole, False
        if output is None:
            output, paired = evaluation.pair, True
        # what an operation on a device has counted could not be taken back after the checks
        if output is None or (reads_values and output.device.type != "cpu"):
            return None
        if is_transformed():
            return None
        for operation in self._scores:
            scores = operation(
                output, y, self.likelihood, self.prior, task,
                counts and exact,  # else more follows, which may fail: nothing is counted yet
                paired, not (exact or paired),
            )  # fmt: skip
            if scores is None:
                continue
            # one value that is not finite makes the sum so, and the loss alone may hide it
            if reads_values and not math.isfinite((scores.nll.sum() + scores.loss).item()):
                return None
            return scores
        return None

    def _infer(self, task: str, log_likelihood: Tensor, reads_values: bool) -> Tensor:
        """The E-step's posterior."""
        log_prior = self.prior.log_prob(task)
        posterior = posterior_of(log_prior, log_likelihood)
        if reads_values and not bool(torch.isfinite(posterior).all()):
            checks.check_log_prior_values(log_prior)
            method = f"{type(self.likelihood).__name__}.reduce"
            checks.check_log_likelihood_values(log_likelihood, method)
            finite = int(torch.isfinite(log_likelihood).sum())
            raise ValueError(
                f"prior: expected probability above 0 for a configuration with a finite loss on "
                f"this mini-batch, got 0 for all {finite} of them"
            )
        return posterior

    def _spread(
        self, values: Tensor, rows: tuple[int, ...] | None, bad: set[int], fill: float
    ) -> Tensor:
        """Values of all configurations: ``fill`` where one overflowed, NaN where none is known."""
        if rows is None:
            return values
        spread = values.new_full((len(self.space),), torch.nan)
        spread[list(bad)] = fill
        return spread.index_copy(0, torch.tensor(rows, device=values.device), values)


# A forward of its own for what is followed takes a third of its step; a backward that runs over
# everything takes two thirds of the whole one.
_FEW = 2 / 3


def _of_scores(scores: Scores) -> Found:
    return Found(
        loss=scores.loss,
        weights=scores.posterior,
        posterior=scores.posterior,
        log_likelihood=scores.log_likelihood,
        nll=scores.nll.detach(),
        dropped_mass=None,
        counted=scores.counted,
        finite=None,
    )


def _without(posterior: Tensor, bad: set[int]) -> Tensor:
    """A posterior that was passed, without the configurations that overflow now."""
    posterior = posterior.detach()
    if not bad:
        return posterior
    left = posterior.clone()
    left[list(bad)] = 0
    if not bool(left.sum() > 0):
        raise NothingLeft(
            "posterior: expected weight above 0 for a configuration with a finite loss on this "
            f"mini-batch, got 0 for all {left.numel() - len(bad)} of them"
        )
    return left / left.sum()


def _numbers(mask: Tensor, rows: Sequence[int] | None = None) -> tuple[int, ...]:
    """Where a mask is True, as configurations; waits for the device."""
    found = mask.nonzero().flatten().tolist()
    return tuple(found if rows is None else (rows[i] for i in found))


def _picked(values: Tensor | None, rows: Sequence[int] | None) -> Tensor | None:
    if values is None or rows is None:
        return values
    return values[torch.tensor(rows, device=values.device)]


def _composed(rows: tuple[int, ...], inner: tuple[int, ...] | None) -> tuple[int, ...]:
    return rows if inner is None else tuple(rows[i] for i in inner)
