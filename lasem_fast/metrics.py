"""Measures of a lifelong run, from one accuracy matrix.

``R[i, j]`` is the test accuracy (a fraction in [0, 1]) on task ``j`` after the training of task
``i`` has ended; the lower triangle with the diagonal must be finite. What lies above the diagonal
is NaN in a multi-head run: a task has no head before it begins. Only `forward_transfer` reads it.

Everything here is NumPy (or what `numpy.asarray` takes) in, ``float`` or ``float64`` array out.
What is not as described is a ``ValueError`` that names the argument.
"""

from __future__ import annotations

from numbers import Real
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

Floats = NDArray[np.float64]


def average_accuracy(R: ArrayLike) -> float:
    """Mean of the last row: accuracy over all tasks once all are learnt (GEM, 2017, "ACC")."""
    return float(_matrix(R)[-1].mean())


def backward_transfer(R: ArrayLike) -> float:
    """Mean over the tasks before the last of ``R[T-1, j] - R[j, j]`` (GEM, 2017, "BWT").

    Negative where later tasks harmed earlier ones. NaN for a single task.
    """
    R = _matrix(R)
    change = R[-1] - R.diagonal()
    return float(change[:-1].mean()) if len(R) > 1 else float("nan")


def forgetting(R: ArrayLike) -> float:
    """Mean over the tasks before the last of the best accuracy there was minus the last one.

    ``max_{j <= i < T-1} R[i, j] - R[T-1, j]`` (Chaudhry et al., 2018). Negative where a task is
    better at the end than ever before. NaN for a single task.
    """
    R = _matrix(R)
    n = len(R)
    lost = [R[j:-1, j].max() - R[-1, j] for j in range(n - 1)]
    return float(np.mean(lost)) if lost else float("nan")


def forward_transfer(R: ArrayLike, untrained: ArrayLike) -> float:
    """Mean over the tasks after the first of ``R[j-1, j] - untrained[j]`` (GEM, 2017, "FWT").

    ``untrained``: ``[T]``, accuracy of the network before any training. Needs ``R[j-1, j]``, the
    accuracy on a task that has not begun: a ``ValueError`` in a multi-head run, where `gain` is
    the measure to take. NaN for a single task.
    """
    R = _matrix(R)
    untrained = _vector(untrained, len(R), "untrained", read_from=1)
    ahead = R.diagonal(offset=1)
    if not np.isfinite(ahead).all():
        raise ValueError(
            "R: expected accuracies R[j-1, j] on tasks that have not begun, got NaN or infinity "
            "(a multi-head run has none of them: use gain(R, alone))"
        )
    return float((ahead - untrained[1:]).mean()) if len(R) > 1 else float("nan")


def gain(R: ArrayLike, alone: ArrayLike) -> float:
    """Forward transfer of a multi-head run: mean over j >= 1 of ``R[j, j] - alone[j]``.

    ``alone``: ``[T]``, accuracy of the same network trained on that task only, with nothing
    transferred. It is minus the intransigence of Chaudhry et al. (2018), with a single-task
    reference. NaN for a single task.
    """
    R = _matrix(R)
    alone = _vector(alone, len(R), "alone", read_from=1)
    return float((R.diagonal() - alone)[1:].mean()) if len(R) > 1 else float("nan")


def peak_epoch(valid: ArrayLike) -> int:
    """Epoch (0-based) of the first strictly best validation accuracy; ``valid``: ``[E]``."""
    return int(_per(valid, "valid").argmax())


def peak_accuracy(valid: ArrayLike, test: ArrayLike) -> float:
    """The paper's peak accuracy of one task: test accuracy where validation was best.

    ``valid``, ``test``: ``[E]``, after each epoch of the task's own training. Not the maximum of
    ``test``. The score of a run is the mean over its tasks.
    """
    epoch = peak_epoch(valid)
    return float(_vector(test, np.size(valid), "test")[epoch])


def learning_curve_area(test: ArrayLike) -> float:
    """How fast one task was learnt: mean of its test accuracy ``[E]`` over its own epochs.

    The learning curve area of A-GEM (Chaudhry et al., 2019), per epoch in place of per mini-batch.
    """
    return float(_per(test, "test").mean())


def retention(final: ArrayLike, reference: ArrayLike) -> Floats:
    """``[T]`` final accuracy of each task divided by a reference accuracy of that task.

    The paper's catastrophic forgetting ratio is the mean of this (near 1: little forgotten). It
    leaves the reference open: the accuracy at the end of the task's own training, or the peak.
    """
    reference = _per(reference, "reference", "tasks")
    final = _vector(final, reference.size, "final")
    if not (reference > 0).all():
        raise ValueError(f"reference: expected accuracies above 0, got {reference.tolist()}")
    return final / reference


def forgetting_ratio(final: ArrayLike, reference: ArrayLike) -> float:
    """Mean over all tasks of `retention`."""
    return float(retention(final, reference).mean())


def share_frequency(configurations: ArrayLike) -> Floats:
    """``[d]`` fraction of the tasks that share each stage, from configurations ``[T, d]``."""
    bits = _floats(configurations, "configurations")
    if bits.ndim != 2 or bits.size == 0:
        raise ValueError(
            f"configurations: expected shape [tasks, stages], got shape {list(bits.shape)}"
        )
    if not ((bits == 0) | (bits == 1)).all():
        raise ValueError("configurations: expected bits (True where shared), got other numbers")
    return bits.mean(axis=0)


class Interval(NamedTuple):
    """A mean over runs, half the width of its confidence interval and the number of runs.

    ``half`` is NaN for a single run.
    """

    mean: float
    half: float
    n: int


def mean_interval(values: ArrayLike, level: float = 0.95) -> Interval:
    """Mean of ``values`` ``[n]``, one per run, with Student's t-interval of ``n - 1`` degrees.

    ``half = t s / sqrt(n)``, s the sample standard deviation (n - 1). Needs SciPy for n > 1.
    """
    values = _per(values, "values", "runs")
    if not isinstance(level, Real) or not 0 < level < 1:
        raise ValueError(f"level: expected a probability above 0 and below 1, got {level!r}")
    n = len(values)
    if n == 1:
        return Interval(float(values[0]), float("nan"), 1)
    from scipy.special import stdtrit  # the quantile, without the weight of scipy.stats

    t = float(stdtrit(n - 1, (1 + level) / 2))
    return Interval(float(values.mean()), float(t * values.std(ddof=1) / np.sqrt(n)), n)


def paired_difference(a: ArrayLike, b: ArrayLike, level: float = 0.95) -> Interval:
    """`mean_interval` of ``a - b``, ``[n]`` each; ``a[i]`` and ``b[i]`` belong to one seed."""
    a = _per(a, "a", "runs")
    return mean_interval(a - _vector(b, len(a), "b"), level)


def _floats(values: ArrayLike, name: str) -> Floats:
    try:
        array = np.asarray(values)
        if array.dtype.kind not in "biuf":  # a complex number would lose its imaginary part
            raise TypeError(f"dtype {array.dtype}")
        return array.astype(np.float64)
    except (TypeError, ValueError, RuntimeError) as error:
        reason = str(error).partition("\n")[0]
        raise ValueError(
            f"{name}: expected real numbers as an array, got {type(values).__name__} ({reason})"
        ) from error


def _matrix(R: ArrayLike) -> Floats:
    R = _floats(R, "R")
    if R.ndim != 2 or R.shape[0] != R.shape[1] or R.size == 0:
        raise ValueError(f"R: expected a square matrix [tasks, tasks], got shape {list(R.shape)}")
    if not np.isfinite(R[np.tril_indices(len(R))]).all():
        raise ValueError("R: expected finite values on and below the diagonal, got NaN or infinity")
    return R


def _per(values: ArrayLike, name: str, what: str = "epochs") -> Floats:
    """A non-empty vector, finite."""
    values = _floats(values, name)
    if values.ndim != 1 or values.size == 0:
        raise ValueError(
            f"{name}: expected a non-empty vector [{what}], got shape {list(values.shape)}"
        )
    return _finite(values, name)


def _vector(values: ArrayLike, n: int, name: str, read_from: int = 0) -> Floats:
    """``[n]``, finite from the first entry that is read."""
    values = _floats(values, name)
    if values.shape != (n,):
        raise ValueError(f"{name}: expected shape [{n}], got {list(values.shape)}")
    _finite(values[read_from:], name)
    return values


def _finite(values: Floats, name: str) -> Floats:
    if not np.isfinite(values).all():
        raise ValueError(f"{name}: expected finite values, got NaN or infinity")
    return values
