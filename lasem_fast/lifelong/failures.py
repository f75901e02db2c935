"""A task that fails does not take the tasks before it along."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from lasem_fast.lifelong.records import RunRecord, TaskRecord
from lasem_fast.lifelong.training import Progress, Run


class SequenceError(RuntimeError):
    """A task of a sequence failed; what was found until then is not lost with it.

    Raised from the error itself, which is its ``__cause__``.

    Attributes:
        record: the :class:`RunRecord` of the tasks that had ended before.
        unfinished: the :class:`TaskRecord` of the task that failed, with the epochs that it had
            finished; configuration and prior are empty.
    """

    def __init__(self, message: str, record: RunRecord, unfinished: TaskRecord) -> None:
        super().__init__(message)
        self.record = record
        self.unfinished = unfinished

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (str(self), self.record, self.unfinished)  # so that it can be pickled


def guarded(
    steps: Iterator[Progress], run: Run, record: RunRecord, entry: TaskRecord
) -> Iterator[Progress]:
    """The same steps, with a failure of the training, not of what is done between, told."""
    while True:
        with failure_told(run, record, entry):
            progress = next(steps, None)
        if progress is None:
            return
        yield progress


@contextmanager
def failure_told(run: Run, record: RunRecord, entry: TaskRecord) -> Iterator[None]:
    """Turns an error into a `SequenceError` with the record so far."""
    try:
        yield
    except Exception as error:
        ended = ", ".join(repr(task.name) for task in record.tasks) or "none"
        number = [task.name for task in run.tasks].index(entry.name) + 1
        raise SequenceError(
            f"task {entry.name!r} ({number} of {len(run.tasks)}) failed after {len(entry.loss)} of "
            f"{record.epochs} epochs: {type(error).__name__}: {error} (ended before: {ended}; see "
            f"this error's .record)",
            record,
            entry,
        ) from error
