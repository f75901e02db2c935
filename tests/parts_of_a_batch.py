"""Two processes of DistributedDataParallel against one that has the whole mini-batch.

Run by test_parallel.py, once in each process: python parts_of_a_batch.py STORE RANK.
"""

from __future__ import annotations

import copy
import os
import sys
from functools import partial

import pytest
import torch
import torch.distributed as dist
from nets import batch, small_net
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

import lasem_fast as lf
from lasem_fast.likelihoods import Gaussian, Mean

RANK = int(sys.argv[2])
STEPS = 3


class Harmonic(Mean):
    """A likelihood with a ``reduce`` and a ``combine`` of its own."""

    def reduce(self, log_prob):
        return -super().reduce(-log_prob)

    def combine(self, parts, sizes):
        return -super().combine(-parts, sizes)


class WithoutCombine(Mean):
    """One that cannot put parts together."""

    def reduce(self, log_prob):
        return log_prob.median(dim=1).values


def gathered(value):
    found = [None, None]
    dist.all_gather_object(found, value)
    return found


def digits(tensors):
    return [None if t is None else t.tolist() for t in tensors]


def part(tensor, sizes):
    return tensor.split(sizes)[RANK]


def wrapped(em):
    return DistributedDataParallel(em, find_unused_parameters=True)


def trained(em, call, batches, lr=0.1):
    """What each mini-batch gave, with the gradients; weights move meanwhile."""
    found = []
    parameters = em.net.task_parameters("a")
    optimizer = torch.optim.SGD(parameters, lr=lr)
    for x, y in batches:
        optimizer.zero_grad()
        step = call(x, y, task="a")
        step.loss.backward()
        grads = [torch.zeros_like(p) if p.grad is None else p.grad.clone() for p in parameters]
        found.append((step, grads))
        optimizer.step()
    return found


def compare(name, sizes=(3, 3), dtype=torch.float64, target=None, net=None, gradients=True, **kw):
    torch.manual_seed(0)
    net = small_net(2, dtype=dtype) if net is None else net()
    em = lf.LASEM(net, **kw)
    whole = copy.deepcopy(em)
    batches = [batch(sum(sizes), dtype=dtype, seed=i) for i in range(STEPS)]
    if target is not None:
        batches = [(x, target(y, dtype)) for x, y in batches]
    parts = [(part(x, sizes), part(y, sizes)) for x, y in batches]
    torch.manual_seed(1)
    got, want = trained(em, wrapped(em), parts), trained(whole, whole, batches)
    for (ours, our_grads), (theirs, their_grads) in zip(got, want, strict=True):
        for field in ("posterior", "log_likelihood"):
            torch.testing.assert_close(
                getattr(ours, field), getattr(theirs, field), equal_nan=True,
                msg=lambda text, field=field: f"{name}, {field}: {text}",
            )  # fmt: skip
        if not gradients:
            break  # weights differ from here on
        mean = sum(torch.tensor(gathered(ours.loss.item()))) / 2
        torch.testing.assert_close(mean, theirs.loss.detach(), check_dtype=False)
        for ours, theirs in zip(our_grads, their_grads, strict=True):
            torch.testing.assert_close(ours, theirs, msg=lambda text: f"{name}, gradient: {text}")
    states = gathered(digits(em.state_dict().values()))
    assert states[0] == states[1], name
    if gradients:
        for ours, theirs in zip(em._prior.states.all_buffers(), whole._prior.states.all_buffers(),
                                strict=True):  # fmt: skip
            torch.testing.assert_close(ours, theirs)
    return got


def overflowing(*, in_the_head=False):
    """One configuration overflows on samples that are not zero: the second part's."""
    net = small_net(2)
    with torch.no_grad():
        for stage in net.specific["a"]:
            stage[0].weight.fill_(1e200)
            stage[0].bias.zero_()
    if in_the_head:
        net.heads["a"].append(nn.Dropout(0.0))
    return net


def with_dropout():
    net = small_net(2, extra=(partial(nn.Dropout, 0.5),))
    return net


def targets(y, dtype):
    return nn.functional.one_hot(y, 3).to(dtype)


def main() -> None:
    torch.set_num_threads(1)
    store = "file://" + sys.argv[1]
    dist.init_process_group("gloo", init_method=store, rank=RANK, world_size=2)
    for backend in ("torch", "reference"):
        for likelihood in ("joint", "mean", Harmonic()):
            compare(f"{backend} {likelihood}", backend=backend, likelihood=likelihood)
    compare("gaussian", target=targets, likelihood=Gaussian(0.5), backend="torch")
    compare("default", dtype=torch.float32)
    compare("mean posterior", prior="mean_posterior", likelihood="mean")
    compare("bounded", max_memory=70_000)
    compare("pruned", prune=0.05, likelihood="mean")
    compare("pruned, default", prune=0.05, likelihood="mean", dtype=torch.float32)
    compare("reused", e_step_every=2)
    for likelihood in ("joint", "mean"):
        compare("uneven", sizes=(4, 2), gradients=False, likelihood=likelihood)
    compare("dropout", net=with_dropout, gradients=False)

    drawn = compare("drawn", gradients=False, m_step_draws=2, likelihood="mean")
    masses = gathered([float(step.dropped_mass) for step, _ in drawn])
    assert masses[0] == masses[1] and max(masses[0]) > 0, masses

    # what overflows on one part is left out of both
    x, y = batch(6)
    x[:3] = 0
    for build in (overflowing, partial(overflowing, in_the_head=True)):
        for kw in ({}, {"prune": 1e-3}, {"backend": "reference"}):
            em = lf.LASEM(build(), **kw)
            whole = copy.deepcopy(em)
            ddp = wrapped(em)
            for got, want in zip(
                trained(em, ddp, [(part(x, [3, 3]), part(y, [3, 3]))], lr=0.0),
                trained(whole, whole, [(x, y)], lr=0.0),
                strict=True,
            ):
                assert bool((want[0].log_likelihood == -torch.inf).any())
                torch.testing.assert_close(got[0].posterior, want[0].posterior)
                torch.testing.assert_close(got[0].log_likelihood, want[0].log_likelihood)
                torch.testing.assert_close(got[1], want[1])

    # a step that counts nothing asks nobody: one process may do it alone
    if RANK == 0:
        with torch.no_grad():
            em(x[:2], y[:2], "a")
        em.eval()(x[:2], y[:2], "a")
        em.train()
    dist.barrier()

    em = lf.LASEM(small_net(2), likelihood=WithoutCombine())
    before = digits(em.state_dict().values())
    with pytest.raises(TypeError, match=r"combine as well as reduce.* WithoutCombine"):
        wrapped(em)(*batch(), task="a")
    assert digits(em.state_dict().values()) == before

    em = lf.LASEM(small_net(2))
    ddp = wrapped(em)
    with pytest.raises(RuntimeError, match=r"every process.* leave join\(\) out"), ddp.join():
        ddp(*batch(), task="a")
    ddp = wrapped(em)
    ddp(*batch(), task="a").loss.backward()

    em = lf.LASEM(small_net(2))
    fully_shard(em, mesh=init_device_mesh("cpu", (2,)))
    with pytest.raises(RuntimeError, match="FSDP has sharded"):
        em(*batch(), task="a")
    dist.barrier()
    dist.destroy_process_group()
    os._exit(0)  # see examples/several_processes.py


if __name__ == "__main__":
    main()
