"""A run that is interrupted and started again equals the uninterrupted one bit for bit."""

from __future__ import annotations

import json

import experiment_cases as cases
import pytest
import torch

from lasem_fast.lifelong import SequenceError
from lasem_fast.lifelong.methods import Search


class Stopped(Exception):
    pass


def stopping(after: int):
    """Stops a run after so many epochs."""
    left = [after]

    def on_epoch(progress) -> None:
        left[0] -= 1
        if not left[0]:
            raise Stopped

    return on_epoch


@pytest.mark.parametrize("method", ["lasem", "release", "all", "single", "brute"])
def test_at_every_epoch_boundary(method, tmp_path):
    whole, told = cases.run(method), []
    cases.run(method, on_epoch=told.append)
    # always in the same folder: it goes on from wherever the one before has stopped
    for _ in range(len(told)):
        torch.rand(5)  # nothing of the caller's random state comes in
        with pytest.raises(Stopped):
            cases.run(method, on_epoch=stopping(1), folder=tmp_path)
    again = []
    found = cases.run(method, on_epoch=again.append, folder=tmp_path)
    assert cases.without_times(found) == cases.without_times(whole)
    assert again == []  # nothing was left to train


@pytest.mark.parametrize("method", ["lasem", "all", "brute"])
def test_from_every_single_boundary_on(method, tmp_path):
    whole, told = cases.without_times(cases.run(method)), []
    cases.run(method, on_epoch=told.append)
    for epochs in range(1, len(told), 2 if len(told) < 10 else 6):
        folder = tmp_path / str(epochs)
        with pytest.raises(Stopped):
            cases.run(method, on_epoch=stopping(epochs), folder=folder)
        assert cases.without_times(cases.run(method, folder=folder)) == whole


@pytest.mark.parametrize("save_every", [0.0, 1e9])
def test_in_the_middle_of_an_epoch(save_every, tmp_path):
    whole = cases.without_times(cases.run("release"))
    steps = [0]

    class Failing(Search):
        def step(self, x, y, task, optimizer):
            steps[0] += 1
            if steps[0] in (2, 7, 20, 26):
                raise Stopped
            return super().step(x, y, task, optimizer)

    def release(make_net):
        return Failing(cases.release(make_net).module)

    options = {"method": release, "folder": tmp_path, "save_every": save_every}
    for _ in range(4):
        with pytest.raises(SequenceError) as failure:
            cases.run(**options)
        assert isinstance(failure.value.__cause__, Stopped)
    assert cases.without_times(cases.run(**options)) == whole


def test_callbacks_see_the_tasks_that_are_left(tmp_path):
    with pytest.raises(Stopped):
        cases.run(on_epoch=stopping(4), folder=tmp_path)
    ended, epochs = [], []
    cases.run(
        on_epoch=epochs.append, folder=tmp_path,
        on_task=lambda record: ended.append(len(record.tasks)),
    )  # fmt: skip
    assert ended == [2, 3]
    assert [(p.task_number, p.epoch) for p in epochs] == [(2, 2), (2, 3), (3, 1), (3, 2), (3, 3)]


def test_the_state_of_another_run_is_refused(tmp_path):
    with pytest.raises(Stopped):
        cases.run(on_epoch=stopping(1), folder=tmp_path)
    for change, message in (
        ({"seed": 1}, "seed 0 where it is now 1"),
        ({"epochs": 5}, "epochs 3 where it is now 5"),
        ({"tasks": cases.make_tasks(2)}, "tasks .* where it is now"),
        ({"tasks": cases.make_tasks(dtype=torch.float64)}, "data .* where it is now"),
        ({"method": "all"}, "method 'lasem' where it is now 'all'"),
    ):
        with pytest.raises(ValueError, match=f"folder: expected the state of a run .* {message}"):
            cases.run(**change, folder=tmp_path)


def test_a_damaged_state_is_named(tmp_path):
    with pytest.raises(Stopped):
        cases.run(on_epoch=stopping(1), folder=tmp_path)
    (tmp_path / "state.pt").write_bytes(b"no state")
    with pytest.raises(ValueError, match=r"folder: expected a saved state .*state\.pt, got a da"):
        cases.run(folder=tmp_path)


def test_times_go_on_from_those_before(tmp_path):
    with pytest.raises(Stopped):
        cases.run(on_epoch=stopping(8), folder=tmp_path)
    before = torch.load(tmp_path / "state.pt", weights_only=True)["plain"]
    record = cases.run(folder=tmp_path)
    spent = json.loads(before)["seconds"]
    assert all(record.seconds[phase] >= spent[phase] > 0 for phase in ("train", "evaluate"))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"folder": 3}, r"folder: expected a folder that can be written, or None, got 3"),
        ({"folder": __file__}, r"folder: expected a folder that can be written"),
        ({"folder": f"{__file__}/below"}, r"folder: expected a folder that can be written"),
        ({"save_every": -1.0}, r"save_every: expected a finite number of at least 0, got -1"),
        ({"drop_last": 1}, r"drop_last: expected True or False, got 1"),
        ({"evaluate_every": 0}, r"evaluate_every: expected a whole number of at least 1, got 0"),
        ({"schedule": 0.1}, r"schedule: expected a function, got float"),
    ],
)
def test_wrong_arguments_are_named_before_anything_is_made(change, message):
    built = []
    with pytest.raises((TypeError, ValueError, OSError), match=message):
        cases.run(**change, make_net=lambda: built.append(0))
    assert not built
