"""Priors over configurations and how a mini-batch changes them.

A prior keeps, for every task, how often each configuration was the most probable one (`wins`).
That count is what the end of a task chooses by, unless the prior says otherwise.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from lasem_fast._numbers import finite_number, whole_number
from lasem_fast.networks.task_modules import UnlistedTaskModules


class Prior(nn.Module):
    """Base class: a prior that never changes, uniform unless ``log_prob`` is overridden.

    A subclass may keep more buffers per task (``start``), learn from posteriors (``update``) and
    choose by something else than wins (``score``). Everything stays on the device, and keeps its
    dtype when the module around it is cast. The buffers of the tasks are not among ``buffers()``
    (see :class:`~lasem_fast.networks.task_modules.Unlisted`).
    """

    def __init__(self) -> None:
        super().__init__()
        self.states = UnlistedTaskModules()

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Prior:
        def moved(tensor: Tensor) -> Tensor:
            found = fn(tensor)
            return found if found.dtype == tensor.dtype else tensor.to(found.device)

        return super()._apply(moved, recurse)

    def check(self, n_configs: int) -> None:
        """Raises ValueError if this prior cannot serve a space of ``n_configs`` configurations."""

    def start(self, task: str, n_configs: int, device: torch.device) -> None:
        """Makes the buffers of a task that is seen for the first time."""
        n_configs = whole_number(n_configs, "n_configs")
        if task in self.states:
            raise ValueError(f"task: expected one that was not started yet, got {task!r}")
        state = nn.Module()
        state.register_buffer("wins", torch.zeros(n_configs, dtype=torch.int64, device=device))
        self.states[task] = state

    def forget(self, task: str) -> None:
        """Removes the buffers of a task."""
        del self.states[task]

    def log_prob(self, task: str) -> Tensor:
        """log P(c) as float ``[C]``; it need not be normalised and may hold -inf."""
        return torch.zeros_like(self.states[task].wins, dtype=torch.float32)

    def update(self, task: str, posterior: Tensor, counted: Tensor) -> None:
        """Takes in the posterior ``[C]`` of one mini-batch, in place.

        ``counted`` is a bool scalar; where it is False the mini-batch had no usable configuration
        and nothing may change.
        """
        wins = self.states[task].wins
        if posterior.shape != wins.shape:
            raise ValueError(
                f"posterior: expected shape {list(wins.shape)}, one weight per configuration, got "
                f"{list(posterior.shape)}"
            )
        rows = torch.arange(wins.shape[0], device=wins.device)
        wins += (rows == posterior.argmax()) & counted

    def score(self, task: str) -> Tensor:
        """What the configuration kept for a task is the argmax of, ``[C]``."""
        return self.states[task].wins


class Uniform(Prior):
    """The same probability for every configuration, always."""


class Fixed(Prior):
    """Given probabilities that do not change.

    Args:
        probabilities: ``[C]``, at least 0, finite, not all 0; scaled to sum to 1.
    """

    def __init__(self, probabilities: Tensor) -> None:
        super().__init__()
        if not isinstance(probabilities, Tensor):
            raise TypeError(
                f"prior: expected a floating-point tensor [C], got {type(probabilities).__name__} "
                f"{probabilities!r}"
            )
        if probabilities.is_nested:
            raise TypeError("prior: expected a floating-point tensor [C], got a nested one")
        if probabilities.numel() == 0:
            raise ValueError("prior: expected a probability for each configuration, got none")
        p = probabilities.detach().clone()  # checked as given, kept in double precision
        if p.dim() != 1 or not p.is_floating_point() or p.is_meta or p.layout != torch.strided:
            raise ValueError(
                f"prior: expected a floating-point tensor [C], got {p.dtype} of shape "
                f"{list(p.shape)} ({p.layout}, on {p.device})"
            )
        if not bool(torch.isfinite(p).all()) or bool((p < 0).any()) or not bool(p.sum() > 0):
            raise ValueError(
                "prior: expected finite probabilities of at least 0 that are not all 0, got "
                f"minimum {float(p.min()):.6g} and sum {float(p.sum()):.6g}"
            )
        self.register_buffer("probabilities", p.double() / p.double().sum())

    def check(self, n_configs: int) -> None:
        if self.probabilities.shape != (n_configs,):
            raise ValueError(
                f"prior: expected {n_configs} probabilities, one per configuration, got "
                f"{self.probabilities.shape[0]}"
            )

    def log_prob(self, task: str) -> Tensor:
        return self.probabilities.log()


class Count(Prior):
    """Laplace-smoothed count of how often each configuration was the most probable (Eq. 1).

    Args:
        initial: what every count starts from, above 0.
    """

    def __init__(self, initial: float = 1.0) -> None:
        super().__init__()
        self.initial = finite_number(initial, "initial")

    def log_prob(self, task: str) -> Tensor:
        counts = self.states[task].wins.double() + self.initial
        return (counts / counts.sum()).log()


class Historic(Count):
    """Counts over all tasks: a new task starts from what earlier and other tasks preferred.

    A task's own wins alone decide what it keeps.
    """

    def log_prob(self, task: str) -> Tensor:
        wins = torch.stack([state.wins for state in self.states.values()]).sum(dim=0)
        counts = wins.double() + self.initial
        return (counts / counts.sum()).log()


class MeanPosterior(Prior):
    """Running mean of the posteriors since the task began, uniform at first.

    The default of the authors' release.
    """

    def start(self, task: str, n_configs: int, device: torch.device) -> None:
        super().start(task, n_configs, device)
        state = self.states[task]
        state.register_buffer("total", torch.zeros(n_configs, dtype=torch.float64, device=device))
        state.register_buffer("batches", torch.zeros((), dtype=torch.int64, device=device))

    def log_prob(self, task: str) -> Tensor:
        state = self.states[task]
        uniform = torch.full_like(state.total, 1 / state.total.shape[0])
        return torch.where(state.batches > 0, state.total / state.batches, uniform).log()

    def update(self, task: str, posterior: Tensor, counted: Tensor) -> None:
        super().update(task, posterior, counted)
        # not as attributes: torch.compile cannot trace that a new module's buffer is set
        total, batches = self.states[task].total, self.states[task].batches
        total += torch.where(counted, posterior, 0)
        batches += counted

    def score(self, task: str) -> Tensor:
        return self.states[task].total


_BY_NAME = {
    "count": Count,
    "mean_posterior": MeanPosterior,
    "uniform": Uniform,
    "historic": Historic,
}


def as_prior(prior: Any) -> Prior:
    """A prior by name, as a tensor of probabilities ``[C]`` or as an object, which is copied.

    Raises:
        TypeError, ValueError: none of these.
    """
    if isinstance(prior, Prior):
        return _copied(prior)
    if isinstance(prior, Tensor):
        return Fixed(prior)
    if not isinstance(prior, str):
        raise TypeError(
            f"prior: expected one of {sorted(_BY_NAME)}, a tensor [C] or a Prior, got "
            f"{type(prior).__name__}"
        )
    if prior not in _BY_NAME:
        raise ValueError(f"prior: expected one of {sorted(_BY_NAME)}, got {prior!r}")
    return _BY_NAME[prior]()


def _copied(prior: Prior) -> Prior:
    kind = type(prior).__name__
    if not hasattr(prior, "states"):
        raise TypeError(
            f"prior: expected __init__ of {kind} to call super().__init__(), got one without states"
        )
    try:
        return copy.deepcopy(prior)
    except (RuntimeError, TypeError) as error:
        raise TypeError(
            f"prior: expected one that copy.deepcopy can copy, got {kind} "
            f"({str(error).splitlines()[0]})"
        ) from error
