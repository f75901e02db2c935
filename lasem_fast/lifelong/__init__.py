"""Sequences of tasks: the training loop, its tasks, its methods, its records."""

from lasem_fast.lifelong.method import Method, MethodFactory, Phase, StepResult, TryingMethod
from lasem_fast.lifelong.records import RunRecord, TaskRecord
from lasem_fast.lifelong.sequence import METHODS, SequenceError, train_sequence
from lasem_fast.lifelong.task_data import Task
from lasem_fast.lifelong.training import Progress

__all__ = [
    "METHODS",
    "Method",
    "MethodFactory",
    "Phase",
    "Progress",
    "RunRecord",
    "SequenceError",
    "StepResult",
    "Task",
    "TaskRecord",
    "TryingMethod",
    "train_sequence",
]
