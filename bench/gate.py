"""The correctness gate: a column is timed only if it computes the right thing on that very case.

The truth is brute force in float64: every configuration on its own, by autograd, weighted by the
posterior. The yardstick is the error of the same brute force at the case's precision: a column may
be ``slack`` times as far off. ReLU and max-pool make gradients jump where an activation is within
rounding of a tie, by far more than rounding; so a column may also be as far off as brute force at
weights and inputs that are ``slack`` roundings away, where some ties fall the other way.
"""

from __future__ import annotations

import copy
from contextlib import nullcontext
from dataclasses import dataclass
from itertools import islice

import torch
import torch.nn.functional as F
from torch import Tensor

from bench.cases import TASK, Case, Problem
from bench.peers import Column, Outcome, Runner

# Ties that fall the other way are few and their jumps differ much, so that a few neighbours say
# little: before a column is refused, more of them are looked at.
_NEIGHBOURS = 2
_MOST_NEIGHBOURS = 24


class WrongResult(Exception):
    """A column's result is further off than its slack allows."""


@dataclass(frozen=True)
class Answer:
    """What a step computes, as tensors by name, in float64 on the CPU.

    Attributes:
        values: "loss", "posterior" ``[C]`` and the gradient of every parameter by its name.
        largest: largest |L_c|; 0 for the base learner.
    """

    values: dict[str, Tensor]
    largest: float


def brute_force(problem: Problem, configs: list[tuple[bool, ...]], dtype: torch.dtype) -> Answer:
    """Algorithm 1 as it is written, with the net and the mini-batch in ``dtype``.

    One configuration at a time, so that the memory is that of one: each gradient is weighted
    relative to the most probable configuration so far. float32 runs under the case's autocast.
    """
    net = copy.deepcopy(problem.net).to(dtype)
    x = problem.x.to(dtype)
    named = dict(net.named_parameters())
    totals = {name: torch.zeros_like(parameter) for name, parameter in named.items()}
    nlls, top = [], torch.full((), -torch.inf, dtype=dtype, device=x.device)
    for config in configs:
        with problem.case.precision() if dtype is torch.float32 else nullcontext():
            logits = net(x, TASK, config)
        nll = F.cross_entropy(logits.to(dtype), problem.y)
        grads = torch.autograd.grad(nll, list(named.values()), allow_unused=True)
        nlls.append(nll.detach())
        before, value = top, -len(x) * nll.detach()
        top = torch.maximum(before, value)
        for total, grad in zip(totals.values(), grads, strict=True):
            total *= (before - top).exp()
            if grad is not None:
                total += (value - top).exp() * grad
    nll = torch.stack(nlls)
    log_likelihood = -len(x) * nll
    posterior = log_likelihood.softmax(0)
    values = {"loss": (posterior * nll).sum(), "posterior": posterior}
    for name, total in totals.items():
        values[name] = total / (log_likelihood - top).exp().sum()
    return _answer(values, float(log_likelihood.abs().max()))


def answer_of(runner: Runner, outcome: Outcome) -> Answer:
    """What a column computed."""
    values = {"loss": outcome.loss, "posterior": outcome.posterior}
    for name, parameter in runner.net.named_parameters():
        grad = parameter.grad
        values[name] = torch.zeros_like(parameter) if grad is None else grad
    return _answer(values, 0.0)


def _answer(values: dict[str, Tensor], largest: float) -> Answer:
    return Answer({name: v.detach().double().cpu() for name, v in values.items()}, largest)


class Gate:
    """The truth of a case and how far a result may be off.

    Args:
        problem: weights and mini-batch.
        only: the configurations to weigh; None: all of the case's space.
        largest_slack: of the columns that are to be checked.
    """

    def __init__(
        self,
        problem: Problem,
        only: list[tuple[bool, ...]] | None = None,
        largest_slack: float = 1.0,
    ) -> None:
        configs = problem.space.configs if only is None else only
        self.truth = brute_force(problem, configs, torch.float64)
        rounded = self.errors(brute_force(problem, configs, torch.float32))
        floor = self._floor(problem.case)
        self.error = {kind: max(error, floor[kind]) for kind, error in rounded.items()}
        self.jump = dict.fromkeys(floor, 0.0)
        self._configs = configs
        self._neighbours = (
            _neighbour(problem, seed, largest_slack) for seed in range(_MOST_NEIGHBOURS)
        )
        for near in islice(self._neighbours, _NEIGHBOURS):
            self._look_at(near)

    def _look_at(self, near: Problem) -> None:
        """Takes in how far off brute force is on a neighbouring problem."""
        for kind, error in self.errors(brute_force(near, self._configs, torch.float32)).items():
            self.jump[kind] = max(self.jump[kind], error)

    def _floor(self, case: Case) -> dict[str, float]:
        """What no method at this precision can promise: to be closer than one rounding.

        The posterior is a softmax of log-likelihoods, each of them rounded.
        """
        u = case.unit_roundoff
        evidence = u * max(1.0, self.truth.largest)
        return {"loss": evidence, "posterior": evidence, "gradients": u}

    def errors(self, answer: Answer) -> dict[str, float]:
        """Relative errors in the Euclidean norm: loss, posterior, and the worst gradient's.

        Infinite where a value is missing or not finite; absolute where the truth is 0.
        """
        errors = dict.fromkeys(("loss", "posterior", "gradients"), 0.0)
        for name, truth in self.truth.values.items():
            kind = name if name in errors else "gradients"
            got = answer.values.get(name)
            if got is None or got.shape != truth.shape or not bool(torch.isfinite(got).all()):
                errors[kind] = float("inf")
            else:
                norm = float(truth.norm()) or 1.0
                errors[kind] = max(errors[kind], float((got - truth).norm()) / norm)
        return errors

    def check(self, column: Column, answer: Answer) -> dict[str, float]:
        """The errors of a column's answer.

        Raises:
            WrongResult: one is above what the column's slack allows.
        """
        errors = self.errors(answer)
        for kind, error in errors.items():
            while not error <= (allowed := max(column.slack * self.error[kind], self.jump[kind])):
                near = next(self._neighbours, None)
                if near is not None:
                    self._look_at(near)
                    continue
                raise WrongResult(
                    f"{column.name}: {kind} off by {error:.3g} (relative); right is up to "
                    f"{allowed:.3g}, from the naive loop's own {self.error[kind]:.3g} at this "
                    f"precision and slack {column.slack:g}"
                )
        return errors


def _neighbour(problem: Problem, seed: int, roundings: float) -> Problem:
    """The problem with every weight and input moved by up to that many roundings."""
    generator = torch.Generator(problem.x.device).manual_seed(seed)
    size = roundings * problem.case.unit_roundoff

    def moved(tensor: Tensor) -> Tensor:
        noise = torch.rand(tensor.shape, generator=generator, device=tensor.device)
        return tensor * (1 + size * (2 * noise - 1))

    net = copy.deepcopy(problem.net)
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.copy_(moved(parameter))
    return Problem(problem.case, net, problem.space, moved(problem.x), problem.y)
