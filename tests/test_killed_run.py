"""A run that is killed (SIGKILL) at any moment and started again equals one that never was."""

from __future__ import annotations

import multiprocessing
import random
import time

import killed_run
import pytest
import torch
from torch.utils._pytree import keystr, tree_flatten_with_path


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
        leaves, _ = tree_flatten_with_path(_run_and_kill(context, tmp_path / name, kind, kills))
        states.append({keystr(path): leaf for path, leaf in leaves})  # in any order
    whole, killed = states
    assert whole.keys() == killed.keys()
    for name, value in whole.items():
        same = torch.equal if isinstance(value, torch.Tensor) else lambda a, b: a == b
        assert same(value, killed[name]), name
