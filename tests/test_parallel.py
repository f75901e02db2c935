"""Several processes, each with a part of the mini-batch: the posterior is that of the whole."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from nets import batch, small_net

import lasem_fast as lf
from lasem_fast.likelihoods import Gaussian, Joint, Likelihood, Mean, check_combines

ROOT = Path(__file__).parent.parent


def test_two_processes_against_one(tmp_path, request):
    script = request.path.parent / "parts_of_a_batch.py"
    command = [sys.executable, str(script), str(tmp_path / "store")]
    ranks = [
        subprocess.Popen([*command, str(r)], stderr=subprocess.PIPE, text=True) for r in (0, 1)
    ]
    errors = [rank.communicate(timeout=300)[1] for rank in ranks]
    assert [rank.returncode for rank in ranks] == [0, 0], errors


def test_the_example_trains_in_two_processes():
    pytest.importorskip("sklearn")
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    command += [ROOT / "examples" / "several_processes.py", "--epochs=2"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    found = [line.split(":")[0] for line in done.stdout.splitlines()]
    assert found == ["low", "high"], done.stdout


def test_replicas_of_data_parallel_are_refused():
    em = lf.LASEM(small_net(2))
    replica = em._replicate_for_data_parallel()  # as nn.DataParallel makes them on its devices
    with pytest.raises(RuntimeError, match=r"nn\.DataParallel.* use DistributedDataParallel"):
        replica(*batch(), "a")
    assert em(*batch(), "a").loss.requires_grad


@pytest.mark.parametrize("likelihood", [Joint(), Mean(), Gaussian()])
@pytest.mark.parametrize("sizes", [[5], [1, 4], [2, 1, 2]])
def test_parts_add_up_to_the_whole(likelihood, sizes):
    log_prob = torch.randn(7, 5, dtype=torch.float64) - 3
    parts = torch.stack([likelihood.reduce(part) for part in log_prob.split(sizes, dim=1)])
    whole = likelihood.combine(parts, torch.tensor(sizes, dtype=torch.float64))
    torch.testing.assert_close(whole, likelihood.reduce(log_prob))


class _Median(Joint):
    def reduce(self, log_prob):
        return log_prob.median(dim=1).values


class _Both(_Median):
    def combine(self, parts, sizes):
        return parts.sum(dim=0)


class _Above(_Both):
    def log_prob(self, output, y):
        return super().log_prob(output, y)


class _Again(_Both):
    def reduce(self, log_prob):
        return log_prob.amax(dim=1)


def _with_methods(**methods):
    likelihood = Joint()
    vars(likelihood).update(methods)
    return likelihood


@pytest.mark.parametrize(
    "likelihood", [Likelihood(), Joint(), Mean(), Gaussian(), _Both(), _Above(),
                   _with_methods(reduce=sum, combine=sum), _with_methods(combine=sum)]
)  # fmt: skip
def test_likelihoods_that_put_parts_together(likelihood):
    check_combines(likelihood)


@pytest.mark.parametrize("likelihood", [_Median(), _Again(), _with_methods(reduce=sum)])
def test_likelihoods_that_do_not(likelihood):
    with pytest.raises(TypeError, match="combine as well as reduce"):
        check_combines(likelihood)
