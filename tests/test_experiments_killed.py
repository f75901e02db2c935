"""Workers that are killed (SIGKILL) at any moment: the finished folder is that of a quiet run."""

from __future__ import annotations

import multiprocessing
import random
import time

import drawn_experiment
import pytest
import torch

pytest.importorskip("pydantic")

import killed_experiment

RUN = """
[[methods]]
method = "lasem"
preset = "release"
"""
SEARCH = """
[[methods]]
method = "brute-force"
"""


def _start(context, text, out):
    process = context.Process(target=killed_experiment.run, args=(text, str(out)))
    process.start()
    return process


def _work(context, text, out, workers, kills):
    """Runs to the end; every time one worker after the other is killed within milliseconds."""
    for _ in range(kills):
        processes = [_start(context, text, out) for _ in range(workers)]
        before = _newest(out)
        while processes[0].is_alive() and _newest(out) == before:
            time.sleep(0.002)
        for process in processes:  # those that are left may take over what the first had
            time.sleep(random.uniform(0, 0.1))
            process.kill()
        for process in processes:
            process.join(timeout=120)
            assert process.exitcode in (0, -9), process.exitcode
    processes = [_start(context, text, out) for _ in range(workers)]
    for process in processes:
        process.join(timeout=120)
        assert process.exitcode == 0, process.exitcode


def _newest(out):
    """When a run's state was last written."""
    times = []
    for path in out.glob("*/seed*/state/*.*"):
        try:
            times.append(path.stat().st_mtime_ns)
        except FileNotFoundError:
            continue
    return max(times, default=0)


@pytest.mark.parametrize(("methods", "workers"), [(RUN, 1), (SEARCH, 2)])
def test_killed_workers_leave_the_folder_of_a_quiet_run(methods, workers, tmp_path):
    # a fork needs no new import; behind a CUDA build's autograd threads it may not train
    method = "forkserver" if torch.cuda.is_available() else "fork"
    context = multiprocessing.get_context(method)
    text = drawn_experiment.config(methods, seeds="[0]").replace("epochs = 3", "epochs = 8")
    weight = torch.zeros(1, requires_grad=True)
    torch.optim.SGD([weight], lr=0.0).step()  # what that imports is there then after a fork
    quiet, killed = tmp_path / "quiet", tmp_path / "killed"
    _work(context, text, quiet, 1, 0)
    _work(context, text, killed, workers, 5)
    whole = killed_experiment.contents(quiet)
    assert {path.rpartition("/")[2] for path in whole} == {"run.json"}
    assert killed_experiment.contents(killed) == whole


@pytest.mark.parametrize("methods", [RUN, SEARCH])
def test_what_a_worker_left_that_was_killed_behind_its_result_is_removed(methods, tmp_path):
    text = drawn_experiment.config(methods, seeds="[0]").replace("epochs = 3", "epochs = 1")
    killed_experiment.run(text, str(tmp_path))
    finished = killed_experiment.contents(tmp_path)
    for result in tmp_path.rglob("run.json"):
        left = result.parent / "state" / "task1-00.json"
        left.parent.mkdir()
        left.write_text("{}")
    killed_experiment.run(text, str(tmp_path))
    assert killed_experiment.contents(tmp_path) == finished
