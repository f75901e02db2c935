"""A run that is killed (SIGKILL) at any moment and started again equals one that never was."""

from __future__ import annotations

import multiprocessing
import random
import time

import killed_run
import pytest
import torch
from torch.utils._pytree import tree_flatten


def _run_and_kill(context, folder, kind, kills):
    """Runs to the end, killed after a step more and some milliseconds, ``kills`` times."""
    saved = folder / "run.pt"
    for left in range(kills, -1, -1):
        before = saved.stat().st_mtime_ns if saved.exists() else 0
        process = context.Process(target=killed_run.run, args=(str(folder), kind))
        process.start()
        while left and process.is_alive():
            if saved.exists() and saved.stat().st_mtime_ns != before:
                time.sleep(random.uniform(0, 0.03))
                process.kill()
                break
            time.sleep(0.001)
        process.join(timeout=120)
        assert process.exitcode in ((0, -9) if left else (0,)), process.exitcode
    return torch.load(saved, weights_only=True)


@pytest.mark.parametrize("kind", killed_run.KINDS)
def test_killed_and_resumed_run_equals_the_uninterrupted_one_bit_for_bit(kind, tmp_path):
    # a fork needs no new import; behind a CUDA build's autograd threads it may not train
    method = "forkserver" if torch.cuda.is_available() else "fork"
    context = multiprocessing.get_context(method)
    states = []
    for name, kills in (("whole", 0), ("killed", 4)):
        (tmp_path / name).mkdir()
        states.append(tree_flatten(_run_and_kill(context, tmp_path / name, kind, kills)))
    (whole, structure), (killed, other) = states
    assert structure == other
    for a, b in zip(whole, killed, strict=True):
        assert torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b
