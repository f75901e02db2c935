"""Measures of a lifelong run, from one accuracy matrix.

``R[i, j]`` is the test accuracy (a fraction in [0, 1]) on task ``j`` after the training of task
``i`` has ended; the lower triangle with the diagonal must be finite. What lies above the diagonal
is NaN in a multi-head run: a task has no head before it begins. Only `forward_transfer` reads it.

Everything here is NumPy in, ``float`` or ``float64`` array out.
"""

from __future__ import annotations

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
    untrained = _vector(untrained, len(R), "untrained")
    ahead = R.diagonal(offset=1)
    if not np.isfinite(ahead).all():
        raise ValueError(
            "R: expected R[j-1, j], accuracies on tasks that have not begun, for every j, got none "
            "(a multi-head run): use gain(R, alone)"
        )
    return float((ahead - untrained[1:]).mean()) if len(R) > 1 else float("nan")


def gain(R: ArrayLike, alone: ArrayLike) -> float:
    """Forward transfer of a multi-head run: mean over j >= 1 of ``R[j, j] - alone[j]``.

    ``alone``: ``[T]``, accuracy of the same network trained on that task only, with nothing
    transferred. It is minus the intransigence of Chaudhry et al. (2018), with a single-task
    reference. NaN for a single task.
    """
    R = _matrix(R)
    alone = _vector(alone, len(R), "alone")
    return float((R.diagonal() - alone)[1:].mean()) if len(R) > 1 else float("nan")


def peak_epoch(valid: ArrayLike) -> int:
    """Epoch (0-based) of the first strictly best validation accuracy; ``valid``: ``[E]``."""
    return int(_per_epoch(valid, "valid").argmax())


def peak_accuracy(valid: ArrayLike, test: ArrayLike) -> float:
    """The paper's peak accuracy of one task: test accuracy where validation was best.

    ``valid``, ``test``: ``[E]``, after each epoch of the task's own training. Not the maximum of
    ``test``. The score of a run is the mean over its tasks.
    """
    valid = _per_epoch(valid, "valid")
    return float(_vector(test, valid.size, "test")[valid.argmax()])


def learning_curve_area(test: ArrayLike) -> float:
    """How fast one task was learnt: mean of its test accuracy ``[E]`` over its own epochs.

    The learning curve area of A-GEM (Chaudhry et al., 2019), per epoch in place of per mini-batch.
    """
    return float(_per_epoch(test, "test").mean())


def retention(final: ArrayLike, reference: ArrayLike) -> Floats:
    """``[T]`` final accuracy of each task divided by a reference accuracy of that task.

    The paper's catastrophic forgetting ratio is the mean of this (near 1: little forgotten). It
    leaves the reference open: the accuracy at the end of the task's own training, or the peak.
    """
    reference = _per_task(reference, "reference")
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
    if bits.ndim != 2 or bits.size == 0 or not np.isin(bits, (0, 1)).all():
        raise ValueError(
            f"configurations: expected booleans of shape [tasks, stages], got shape "
            f"{list(bits.shape)} with the values {np.unique(bits).tolist()[:5]}"
        )
    return bits.mean(axis=0)


def _floats(values: ArrayLike, name: str) -> Floats:
    try:
        return np.asarray(values, dtype=np.float64)
    except (TypeError, ValueError, RuntimeError) as error:
        raise TypeError(
            f"{name}: expected an array of numbers, got {type(values).__name__} ({error})"
        ) from error


def _matrix(R: ArrayLike) -> Floats:
    R = _floats(R, "R")
    if R.ndim != 2 or R.shape[0] != R.shape[1] or R.size == 0:
        raise ValueError(f"R: expected a square matrix [tasks, tasks], got shape {list(R.shape)}")
    if not np.isfinite(R[np.tril_indices(len(R))]).all():
        raise ValueError("R: expected finite values on and below its diagonal, got NaN or infinity")
    return R


def _per_epoch(values: ArrayLike, name: str) -> Floats:
    return _some(values, name, "epochs")


def _per_task(values: ArrayLike, name: str) -> Floats:
    return _some(values, name, "tasks")


def _some(values: ArrayLike, name: str, of: str) -> Floats:
    values = _floats(values, name)
    if values.ndim != 1 or values.size == 0:
        raise ValueError(
            f"{name}: expected a vector [{of}] of at least one, got shape {list(values.shape)}"
        )
    return values


def _vector(values: ArrayLike, n: int, name: str) -> Floats:
    values = _floats(values, name)
    if values.shape != (n,):
        raise ValueError(f"{name}: expected shape [{n}], got {list(values.shape)}")
    return values
