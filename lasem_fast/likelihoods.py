"""Likelihoods: how well one configuration explains a mini-batch.

A likelihood scores every sample under every configuration (``log_prob``) and turns the scores of a
mini-batch into one log-likelihood per configuration (``reduce``).
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from lasem_fast._numbers import finite_number


class Likelihood:
    """Base class; subclass it for a likelihood of your own."""

    def check_target(self, y: Tensor, output: Tensor, *, values: bool) -> None:
        """Raises TypeError or ValueError for targets that do not fit ``output`` ``[C, N, ...]``.

        With ``values`` the values may be read, which waits for the device.
        """

    def log_prob(self, output: Tensor, y: Tensor) -> Tensor:
        """log P(y_i | x_i, c) as ``[C, N]``, from outputs ``[C, N, ...]``; NaN for a bad target."""
        raise NotImplementedError(f"{type(self).__name__} does not define log_prob")

    def reduce(self, log_prob: Tensor) -> Tensor:
        """The log-likelihood ``[C]`` of the mini-batch; the joint one, a sum, unless overridden."""
        return log_prob.sum(dim=1)

    def combine(self, parts: Tensor, sizes: Tensor) -> Tensor:
        """The log-likelihood ``[C]`` of a mini-batch from those of its parts.

        A likelihood that overrides :meth:`reduce` overrides this too, or cannot be used under
        ``DistributedDataParallel``, where every process has a part.

        Args:
            parts: ``[W, C]``, what :meth:`reduce` gives for each of W parts.
            sizes: ``[W]``, the samples in each of them, of ``parts``' dtype.
        """
        return parts.sum(dim=0)


class Joint(Likelihood):
    """Classification, log of the product of P(y_i | x_i, c) over the mini-batch (Eq. 2)."""

    def check_target(self, y: Tensor, output: Tensor, *, values: bool) -> None:
        if y.dtype != torch.int64:
            raise TypeError(f"y: expected class labels of dtype torch.int64, got {y.dtype}")
        if output.dim() != 3:
            raise ValueError(
                f"head: expected logits [N, K] for classification, got {output.dim() - 1} "
                f"dimensions, shape {list(output.shape[1:])}"
            )
        if y.shape != output.shape[1:2]:
            raise ValueError(
                f"y: expected class labels of shape [{output.shape[1]}], got {list(y.shape)}"
            )
        if values:
            low, high = (int(v) for v in torch.aminmax(y))
            if low < 0 or high >= output.shape[2]:
                raise ValueError(
                    f"y: expected class labels in 0..{output.shape[2] - 1} (the head has "
                    f"{output.shape[2]} outputs), got labels from {low} to {high}"
                )

    def log_prob(self, output: Tensor, y: Tensor) -> Tensor:
        classes = output.shape[-1]
        known = y.clamp(0, classes - 1)
        index = known.expand(output.shape[0], -1).unsqueeze(-1)
        picked = output.log_softmax(dim=-1).gather(-1, index).squeeze(-1)
        return picked.masked_fill(known != y, torch.nan)


class Mean(Joint):
    """Classification, log of the mean of P(y_i | x_i, c) over the mini-batch.

    What the authors' release computes; a much flatter posterior than :class:`Joint`.
    """

    def reduce(self, log_prob: Tensor) -> Tensor:
        return log_prob.logsumexp(dim=1) - math.log(log_prob.shape[1])

    def combine(self, parts: Tensor, sizes: Tensor) -> Tensor:
        return (parts + sizes.log()[:, None]).logsumexp(dim=0) - sizes.sum().log()


class Gaussian(Likelihood):
    """Regression with independent Gaussian noise: P(y_i | x_i, c) = N(y_i; f_c(x_i), sigma^2 I).

    Args:
        sigma: standard deviation of the noise, in the unit of y, above 0.
    """

    def __init__(self, sigma: float = 1.0) -> None:
        self.sigma = finite_number(sigma, "sigma")

    def check_target(self, y: Tensor, output: Tensor, *, values: bool) -> None:
        if not y.is_floating_point() or y.itemsize == 1:  # there is no arithmetic on float8
            raise TypeError(f"y: expected floating-point targets for regression, got {y.dtype}")
        if y.shape != output.shape[1:]:
            raise ValueError(
                f"y: expected targets of the head's output shape {list(output.shape[1:])}, got "
                f"{list(y.shape)}"
            )
        if values and not bool(torch.isfinite(y).all()):
            raise ValueError("y: expected finite targets, got NaN or infinity")

    def log_prob(self, output: Tensor, y: Tensor) -> Tensor:
        error = ((output - y) / self.sigma).flatten(2)
        constant = math.log(self.sigma) + 0.5 * math.log(2 * math.pi)
        return -0.5 * error.square().sum(dim=2) - error.shape[2] * constant


_METHODS = "check_target", "log_prob", "reduce"


def is_changed(likelihood: Likelihood) -> bool:
    """Whether a method of the object was put in the place of its class's."""
    return any(method in vars(likelihood) for method in _METHODS)


def check_combines(likelihood: Likelihood) -> None:
    """Raises where ``combine`` does not belong to ``reduce``: one is overridden without the other.

    Raises:
        TypeError: likewise.
    """
    places = [likelihood, *type(likelihood).__mro__]
    reduces, combined = (
        next(i for i, place in enumerate(places) if method in vars(place))
        for method in ("reduce", "combine")
    )
    if reduces < combined:
        raise TypeError(
            f"likelihood: expected one that defines combine as well as reduce, because every "
            f"process of DistributedDataParallel has a part of the mini-batch; got "
            f"{type(likelihood).__name__}, whose combine is that of {places[combined].__name__}"
        )


_BY_NAME = {"joint": Joint, "mean": Mean}


def as_likelihood(likelihood: Any) -> Likelihood:
    """A likelihood by name or as an object.

    Raises:
        TypeError, ValueError: neither a known name nor a :class:`Likelihood`.
    """
    if isinstance(likelihood, Likelihood):
        return likelihood
    if not isinstance(likelihood, str):
        raise TypeError(
            f"likelihood: expected one of {sorted(_BY_NAME)} or a Likelihood, got "
            f"{type(likelihood).__name__}"
        )
    if likelihood not in _BY_NAME:
        raise ValueError(f"likelihood: expected one of {sorted(_BY_NAME)}, got {likelihood!r}")
    return _BY_NAME[likelihood]()
