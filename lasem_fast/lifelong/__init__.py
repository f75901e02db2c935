"""Sequences of tasks: the training loop, its tasks, its records."""

from lasem_fast.lifelong.records import RunRecord, TaskRecord
from lasem_fast.lifelong.sequence import METHODS, Progress, SequenceError, train_sequence
from lasem_fast.lifelong.task_data import Task

__all__ = [
    "METHODS",
    "Progress",
    "RunRecord",
    "SequenceError",
    "Task",
    "TaskRecord",
    "train_sequence",
]
