"""LASEM inside PyTorch's own machinery: compile, autocast, GradScaler, DDP, no_grad, imports."""

from __future__ import annotations

import copy
import subprocess
import sys

import pytest
import torch
from nets import Residual, batch, small_net
from oracle import assert_equals, assert_step_equals, brute_force
from torch import nn

import lasem_fast as lf
from lasem_fast.backends import cpu_ops


@pytest.mark.parametrize("groups", [None, [1, 2]])
@pytest.mark.parametrize("kind", ["plain", "dropout", "block"])
def test_compiles_without_graph_breaks(groups, kind):
    torch._dynamo.reset()
    extra = (lambda: nn.Dropout(0.0),) if kind == "dropout" else ()
    net = small_net(3, extra=extra, tasks=("a", "b"))
    if kind == "block":
        net.shared[1], net.specific["a"][1] = Residual(3).double(), Residual(3).double()
    em = lf.LASEM(net, lf.ConfigSpace(3, groups), backend="torch")
    compiled = torch.compile(em, fullgraph=True, backend="aot_eager")
    for i in range(3):
        x, y = batch(seed=i)
        log_prior = em.prior("a").log()
        truth = brute_force(net, em.space.bits, x, y, "a", log_prior=log_prior)
        assert_step_equals(net, compiled(x, y, "a"), truth)
    assert int(em._prior.states["a"].wins.sum()) == 3
    frozen = compiled(x, y, "a", posterior=truth.posterior)
    assert_equals(
        frozen.loss.detach(), (truth.posterior * truth.nll).sum(), "loss of a further M-step"
    )
    before = [p.detach().clone() for p in net.shared.parameters()]
    with torch.no_grad():
        for p in net.shared.parameters():
            p += 1
    em.end_task("a", set())
    assert all(torch.equal(p, q) for p, q in zip(net.shared.parameters(), before, strict=True))
    compiled(x, y, "a").loss.backward()


@pytest.mark.parametrize("prior", ["mean_posterior", "historic", "uniform"])
def test_priors_compile_without_graph_breaks(prior):
    torch._dynamo.reset()
    em = lf.LASEM(small_net(2), prior=prior, backend="torch")
    twin = copy.deepcopy(em)
    compiled = torch.compile(em, fullgraph=True, backend="aot_eager")
    for i in range(2):
        x, y = batch(seed=i)
        assert_equals(compiled(x, y, "a").loss.detach(), twin(x, y, "a").loss.detach(), "loss")
        assert_equals(em.prior("a"), twin.prior("a"), "prior")


def test_rehearsal_compiles_without_graph_breaks():
    torch._dynamo.reset()
    net = small_net(1, tasks=("old", "new"))
    em = lf.LASEM(net, backend="torch")
    em(*batch(), "old")
    em.end_task("old", {1})
    before = [p.detach().clone() for p in net.shared.parameters()]
    compiled = torch.compile(em, fullgraph=True, backend="aot_eager")
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    for i in range(2):
        optimizer.zero_grad()
        (compiled(*batch(seed=i), "new").loss + compiled(*batch(), "old").loss).backward()
        optimizer.step()
    em.end_task("new", set())
    assert all(torch.equal(p, q) for p, q in zip(net.shared.parameters(), before, strict=True))


def test_compiles_with_inductor():
    torch._dynamo.reset()
    net = small_net(2)
    em = lf.LASEM(net, backend="torch")
    x, y = batch()
    truth = brute_force(net, em.space.bits, x, y, "a")
    assert_step_equals(net, torch.compile(em, fullgraph=True)(x, y, task="a"), truth)


@pytest.mark.skipif(not cpu_ops.supported(), reason=cpu_ops.why_unsupported())
@pytest.mark.parametrize("side", [8, 9])
def test_the_cpp_kernels_compile_without_graph_breaks(side):
    torch._dynamo.reset()
    torch.manual_seed(0)
    net = lf.TransferNet(
        [
            nn.Sequential(nn.Conv2d(3, 6, 3, padding=1), nn.ReLU()),
            nn.Sequential(nn.Conv2d(6, 5, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2)),
        ]
    )
    classes = nn.Linear(5 * (side // 2) ** 2, 4)
    net.add_task("a", nn.Sequential(nn.Flatten(), nn.Dropout(0.3), classes))
    em = lf.LASEM(net, backend="cpp")
    compiled = torch.compile(em, fullgraph=True, backend="aot_eager")
    x, y = torch.randn(7, 3, side, side), torch.randint(4, (7,))
    found = []
    for step in (em, compiled):
        torch.manual_seed(1)
        net.zero_grad()
        result = step(x, y, "a", posterior=torch.tensor([0.1, 0.2, 0.3, 0.4]))
        result.loss.backward()
        found.append([result.loss, *(p.grad.clone() for p in net.parameters())])
        em.eval()
        found[-1] += step(x, y, "a")[1:4]
        em.train()
    for eager, traced in zip(*found, strict=True):
        torch.testing.assert_close(traced, eager)


@pytest.mark.parametrize("backend", ["torch", "reference"])
def test_autocast_keeps_likelihood_and_posterior_in_float32(backend):
    net = small_net(2, dtype=torch.float32)
    em = lf.LASEM(net, backend=backend)
    x, y = batch(dtype=torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert em.evaluate(x, "a").dtype == torch.bfloat16
        step = em(x, y, "a")
    assert {t.dtype for t in step} == {torch.float32}
    step.loss.backward()
    assert all(p.grad.dtype == torch.float32 for p in net.parameters())


def test_grad_scaler_scales_and_steps():
    net = small_net(2, dtype=torch.float32)
    em = lf.LASEM(net)
    twin = copy.deepcopy(em)
    optimizer = torch.optim.SGD(net.task_parameters("a"), lr=0.1)
    scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
    x, y = batch(dtype=torch.float32)
    scaler.scale(em(x, y, "a").loss).backward()
    scaler.step(optimizer)
    scaler.update()
    plain = torch.optim.SGD(twin.net.task_parameters("a"), lr=0.1)
    twin(x, y, "a").loss.backward()
    plain.step()
    for p, q in zip(net.parameters(), twin.net.parameters(), strict=True):
        assert torch.equal(p, q)  # a scale that is a power of two leaves the digits alone


def test_without_gradients():
    em = lf.LASEM(small_net(2), backend="torch")
    with torch.no_grad():
        step = em(*batch(), "a")
    assert not step.loss.requires_grad


def test_frozen_parameters_get_no_gradient():
    net = small_net(2)
    net.shared[0].requires_grad_(False)
    lf.LASEM(net)(*batch(), "a").loss.backward()
    assert net.shared[0][0].weight.grad is None and net.shared[1][0].weight.grad is not None


_DDP = """
import os, sys, torch, torch.distributed as dist, lasem_fast as lf
sys.path.insert(0, sys.argv[1])
from nets import batch, small_net
torch.set_num_threads(1)
store = "file://" + sys.argv[2]
dist.init_process_group("gloo", init_method=store, rank=int(sys.argv[3]), world_size=2)
torch.manual_seed(0)
net = small_net(2)
em = lf.LASEM(net)
ddp = torch.nn.parallel.DistributedDataParallel(em, find_unused_parameters=True)
x, y = batch(seed=dist.get_rank())
ddp(x, y, task="a").loss.backward()
twin = lf.LASEM(small_net(2))
twin.net.load_state_dict(net.state_dict())
whole = [torch.cat(both) for both in zip(batch(seed=0), batch(seed=1))]
twin(*whole, "a").loss.backward()
for p, q in zip(net.parameters(), twin.net.parameters()):
    assert torch.allclose(p.grad, q.grad), (p.grad, q.grad)
dist.barrier()  # nobody leaves while the other still listens
dist.destroy_process_group()
os._exit(0)  # see examples/several_processes.py
"""


_DDP_START = """
import os, sys, torch, torch.distributed as dist, lasem_fast as lf
from torch.nn.parallel import DistributedDataParallel as DDP
sys.path.insert(0, sys.argv[1])
from nets import batch, small_net
torch.set_num_threads(1)
store, rank = "file://" + sys.argv[2], int(sys.argv[3])
dist.init_process_group("gloo", init_method=store, rank=rank, world_size=2)

def gathered(value):
    found = [None, None]
    dist.all_gather_object(found, value)
    return found

def digits(state):
    return {k: t.tolist() for k, t in state.items()}
"""

# Each process has samples, initial weights and random numbers of its own.
_DDP_CHOICES = (
    _DDP_START
    + """
def run(steps, saved=None, start=0):
    torch.manual_seed(rank)
    em = lf.LASEM(small_net(2, tasks=("a", "b")), prior="historic", redraw_unclaimed=True)
    if saved is not None:
        em.load_state_dict(saved)
    ddp = DDP(em, find_unused_parameters=True)
    for i in range(start, steps):
        optimizer = torch.optim.SGD(em.net.parameters(), lr=0.1)
        ddp(*batch(seed=2 * i + rank), task="ab"[i % 2]).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return em, ddp

em, ddp = run(6)
states = gathered(digits(em.state_dict()))
assert states[0] == states[1]
wins = em._prior.states["a"].wins
wins.zero_()
wins[rank] = 5
assert em.best_config("a") == em.space[rank]
assert gathered(em.end_task("a")) == [em.space[0]] * 2
assert gathered(em.end_task("b", rank)) == [em.space[0]] * 2
states = gathered(digits(em.net.state_dict()))
assert states[0] == states[1]

em, ddp = run(6)
assert em.end_task("b", {1}) and ddp is not None
whole = digits(em.state_dict())
half = run(3)[0].state_dict()
dist.broadcast_object_list(half := [half], 0)
em, ddp = run(6, half[0], 3)
em.end_task("b", {1})
assert digits(em.state_dict()) == whole

em.net.add_task("c", torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(108, 3)).double())
before = digits(em.state_dict())
try:
    ddp(*batch(), task="c")
    raise SystemExit("no error")
except RuntimeError as error:
    assert "wrap the LASEM anew" in str(error), error
assert digits(em.state_dict()) == before
ddp = DDP(em, find_unused_parameters=True)
ddp(*batch(seed=rank), task="c").loss.backward()
states = gathered(digits(em.state_dict()))
assert states[0] == states[1]
grads = gathered([None if p.grad is None else p.grad.tolist() for p in em.net.parameters()])
assert grads[0] == grads[1]

em, ddp = run(2)
before = digits(em.state_dict())
posterior = torch.ones(4).double() / 4 if rank else None
for task, frozen in (("ab"[rank], None), ("a", posterior)):
    try:
        ddp(*batch(seed=rank), task=task, posterior=frozen)
        raise SystemExit("no error")
    except RuntimeError as error:
        assert "mini-batch of the same task in all processes" in str(error), error
assert digits(em.state_dict()) == before

other = lf.LASEM(small_net(2))
if rank:
    other(*batch(), "a")
try:
    DDP(other, find_unused_parameters=True)(*batch(), task="a")
    raise SystemExit("no error")
except RuntimeError as error:
    assert "the same tasks under way in all processes" in str(error), error
dist.barrier()
dist.destroy_process_group()
other.end_task("a")
os._exit(0)
"""
)


@pytest.mark.parametrize("script", [_DDP, _DDP_CHOICES], ids=["gradients", "choices"])
def test_distributed_data_parallel(script, tmp_path, request):
    """Gradients are the whole mini-batch's; prior, choice and roll-back the first process's."""
    command = [sys.executable, "-c", script, str(request.path.parent), str(tmp_path / "store")]
    ranks = [
        subprocess.Popen([*command, str(r)], stderr=subprocess.PIPE, text=True) for r in (0, 1)
    ]
    errors = [rank.communicate(timeout=120)[1] for rank in ranks]
    assert [rank.returncode for rank in ranks] == [0, 0], errors


@pytest.mark.parametrize("absent", ["triton", "matplotlib", "sklearn", "rich", "numpy"])
def test_import_needs_torch_alone(absent):
    code = f"import sys; sys.modules[{absent!r}] = None; import lasem_fast; lasem_fast.backends()"
    subprocess.run([sys.executable, "-W", "ignore", "-c", code], check=True)


def test_modules_that_need_numpy_are_there_when_asked_for():
    code = (
        "import sys, lasem_fast as lf; assert 'lasem_fast.lifelong' not in sys.modules; "
        "print(lf.lifelong.Task, lf.metrics.gain, lf.comparators.DEN, lf.datasets.load); "
        "from lasem_fast import *; comparators.DARTS, lifelong.Task, metrics.gain"
    )
    subprocess.run([sys.executable, "-W", "ignore", "-c", code], check=True)
    with pytest.raises(AttributeError, match=r"module 'lasem_fast' has no attribute 'metric'"):
        _ = lf.metric


def test_import_does_not_import_triton():
    code = (
        "import sys, torch; before = set(sys.modules); import lasem_fast; "
        "print(*(set(sys.modules) - before))"
    )
    done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    assert not [
        name for name in done.stdout.split() if name.split(".")[0] in ("triton", "matplotlib")
    ]


@pytest.mark.parametrize("backend", ["auto", "torch", "reference"])
def test_function_transforms(backend):
    net = small_net(2, dtype=torch.float32)
    em = lf.LASEM(net, backend=backend, prior="uniform")
    x, y = batch(dtype=torch.float32)
    leaf = x.clone().requires_grad_()
    (expected,) = torch.autograd.grad(em(leaf, y, "a").loss, leaf)
    state = copy.deepcopy(em._prior.states["a"].wins)
    torch.testing.assert_close(torch.func.grad(lambda z: em(z, y, "a").loss)(x).detach(), expected)
    many = torch.vmap(lambda z: em.evaluate(z, "a"))(torch.stack([x, 2 * x]))
    torch.testing.assert_close(many[1], em.evaluate(2 * x, "a"))
    jacobian = torch.func.jacrev(lambda z: em.evaluate(z, "a").sum((0, 1)))(x)
    torch.testing.assert_close(
        jacobian[0].detach(), torch.autograd.grad(em.evaluate(leaf, "a").sum((0, 1))[0], leaf)[0]
    )
    assert torch.equal(em._prior.states["a"].wins, state)


@pytest.mark.parametrize("backend", ["auto", "torch"])
def test_an_overflow_inside_compile_shows_as_a_nan_loss(backend):
    torch._dynamo.reset()
    net = small_net(2, dtype=torch.float32)
    with torch.no_grad():
        for stage in net.specific["a"]:
            for p in stage.parameters():
                p *= 1e30
    em = lf.LASEM(net, backend=backend)
    x, y = batch(dtype=torch.float32)
    assert bool(torch.isfinite(em(x, y, "a").loss))
    step = torch.compile(em, backend="aot_eager")(x, y, "a")
    assert bool(step.loss.isnan()) and float(step.posterior[3]) == 0
