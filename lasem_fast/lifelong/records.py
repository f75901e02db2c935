"""The plain record that a training run over a sequence of tasks leaves."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np

from lasem_fast import metrics
from lasem_fast.backends import choices

_MEASURES = (
    "peak_accuracy",
    "learning_curve_area",
    "average_accuracy",
    "backward_transfer",
    "forgetting",
    "forgetting_ratio_to_end",
    "forgetting_ratio_to_peak",
)


@dataclass
class TaskRecord:
    """One task of a run. Lists over epochs (E) belong to the task's own training.

    Losses and accuracies are of the configuration that was best at that moment, except ``loss``
    under the search, which is the posterior-weighted loss.
    """

    name: str
    note: str
    config: list[bool]  # [d], the one kept (search) or prescribed (static); [] for none
    label: str
    loss: list[float] = field(default_factory=list)  # [E], mean over mini-batches
    valid: list[float] = field(default_factory=list)  # [E], or of the epochs in ``evaluated``
    test: list[float] = field(default_factory=list)  # likewise
    peak: float = float("nan")  # `metrics.peak_accuracy`
    learning_curve_area: float = float("nan")  # `metrics.learning_curve_area`
    posterior: list[list[float]] = field(default_factory=list)  # [E][C], mean over mini-batches
    prior: list[float] = field(default_factory=list)  # [C], at the end of the task
    evaluated: list[int] = field(default_factory=list)  # epochs of valid and test; []: all of them
    # where several configurations were tried: label, config, best valid accuracy, peak of each
    trials: list[dict[str, Any]] = field(default_factory=list)


@dataclass
class RunRecord:
    """A run: JSON-able through `to_dict`, where what a run does not have is None, never NaN.

    Of a run that is under way, or that a failure has cut short, it is the record of the T tasks
    that have ended.

    ``matrix[i][j]``: test accuracy on task j after task i has ended, roll-back included; None
    above the diagonal. ``curves``: while task ``task`` (from 0) is trained, after ``epoch`` (from
    1), the accuracies on all tasks seen so far. Those of earlier tasks are measured with the
    shared weights of that moment, before any roll-back. ``seconds``: wall clock of training steps
    (``train``), of evaluation (``evaluate``) and of all else (``rest``), of all trials together.
    """

    method: str
    seed: int
    epochs: int
    batch_size: int
    configurations: list[str]  # [C] labels of the rows of posteriors and priors; [] if static
    tasks: list[TaskRecord] = field(default_factory=list)
    matrix: list[list[float | None]] = field(default_factory=list)
    curves: list[dict[str, Any]] = field(default_factory=list)
    share_frequency: list[float] = field(default_factory=list)  # [d]; [] without configurations
    choices: choices.Ways = field(default_factory=dict)  # in force at the end; {}: by the rule
    parameters: int = 0  # numbers that have to be kept for all tasks, heads included
    seconds: dict[str, float] = field(default_factory=dict)

    def add(self, task: TaskRecord, row: list[float], curves: list[dict[str, Any]]) -> None:
        """Takes in a task that has ended; ``row``: accuracies ``[T]`` on all tasks so far."""
        self.tasks.append(task)
        self.curves += curves
        self.matrix.append(list(row))
        self.matrix = [[*old, *[None] * (len(row) - len(old))] for old in self.matrix]
        configs = [task.config for task in self.tasks]
        self.share_frequency = metrics.share_frequency(configs).tolist() if all(configs) else []

    @classmethod
    def from_dict(cls, plain: dict[str, Any]) -> RunRecord:
        """The record that `to_dict` gave, measures aside: they follow from the rest."""
        tasks = [TaskRecord(**task) for task in plain["tasks"]]
        rest = {k: v for k, v in plain.items() if k not in ("tasks", "summary")}
        return cls(**rest, tasks=tasks)

    def accuracy_matrix(self) -> metrics.Floats:
        """``R`` of `lasem_fast.metrics`: ``[T, T]``, NaN above the diagonal."""
        return np.array(self.matrix, dtype=np.float64)

    def summary(self) -> dict[str, float | None]:
        """The run in one number per measure.

        None where a single task leaves it undefined, where it is a ratio to an accuracy of 0, and
        before the first task has ended.
        """
        if not self.tasks:
            return dict.fromkeys(_MEASURES)
        R = self.accuracy_matrix()
        peaks = np.array([task.peak for task in self.tasks])
        areas = [task.learning_curve_area for task in self.tasks]
        values = (
            float(np.mean(peaks)),
            float(np.mean(areas)),
            metrics.average_accuracy(R),
            metrics.backward_transfer(R),
            metrics.forgetting(R),
            _ratio(R[-1], R.diagonal()),
            _ratio(R[-1], peaks),
        )
        found = zip(_MEASURES, values, strict=True)
        return {name: None if np.isnan(value) else value for name, value in found}

    def to_dict(self) -> dict[str, Any]:
        return {**asdict(self), "summary": self.summary()}


def _ratio(final: metrics.Floats, reference: metrics.Floats) -> float:
    return metrics.forgetting_ratio(final, reference) if (reference > 0).all() else float("nan")
