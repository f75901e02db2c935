"""The columns of the benchmark: what a user would run, from one configuration to the library.

A column takes a :class:`~bench.cases.Problem` and returns its step: a function of no argument that
clears the gradients, computes the posterior of the mini-batch (Algorithm 1, prior of Eq. 1) and
leaves the gradients of the M-step in the net's parameters. No optimiser: it is the same for all.
Every column makes a copy of the net, so that none sees another's gradients.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call, vmap

import lasem_fast as lf
from bench.cases import TASK, Case, Problem
from lasem_fast.net import TransferNet


class Outcome(NamedTuple):
    """What a step gave; the gradients are in ``net``.

    Attributes:
        loss: scalar, sum over configurations of posterior times mean cross-entropy.
        posterior: ``[C]``.
    """

    loss: Tensor
    posterior: Tensor


@dataclass(frozen=True)
class Column:
    """One way of computing a training step.

    Attributes:
        name: heading in the tables.
        build: makes the runner of a problem.
        slack: how many times the naive loop's error the column may be off. 4: a fold of P
            prefixes sums P times as many terms of a gradient in one go.
        weighs: which configurations its gradients are of: "all", "one" (the base learner, which
            infers nothing) or "favoured" (a pruned M-step, see :meth:`bench.cases.Case.favoured`).
        device: the only kind of device it runs on, "" for any.
    """

    name: str
    build: Callable[[Problem], Runner]
    slack: float = 4.0
    weighs: Literal["all", "one", "favoured"] = "all"
    device: str = ""


class Count:
    """The prior of Eq. 1, as every column has to keep it."""

    def __init__(self, problem: Problem) -> None:
        self.wins = torch.ones(len(problem.space), device=problem.x.device)

    def posterior(self, log_likelihood: Tensor) -> Tensor:
        """softmax_c(log prior_c + L_c); counts the winner."""
        posterior = ((self.wins / self.wins.sum()).log() + log_likelihood.detach()).softmax(0)
        # Not wins[argmax] += 1, which would wait for the device.
        self.wins += torch.arange(len(posterior), device=posterior.device) == posterior.argmax()
        return posterior


@dataclass
class Runner:
    """A column made ready for one problem.

    Attributes:
        net: whose parameters the gradients are in.
        step: one training step.
        count: the prior, where the column keeps one itself.
    """

    net: TransferNet
    step: Callable[[], Outcome]
    count: Count | None = None


def _copied(problem: Problem) -> TransferNet:
    net = copy.deepcopy(problem.net)
    net.zero_grad()
    return net


def _stages_of(net: TransferNet, config: tuple[bool, ...]) -> list[nn.Module]:
    own = net.specific[TASK]
    return [net.shared[i] if shared else own[i] for i, shared in enumerate(config)]


def _forward(net: TransferNet, config: tuple[bool, ...], x: Tensor) -> Tensor:
    for stage in _stages_of(net, config):
        x = stage(x)
    return net.heads[TASK](x)


def _nll(logits: Tensor, y: Tensor) -> Tensor:
    """Mean cross-entropy of each configuration ``[C]``, from ``[C, N, K]``."""
    configs, samples, _ = logits.shape
    flat = F.cross_entropy(logits.float().flatten(0, 1), y.repeat(configs), reduction="none")
    return flat.view(configs, samples).mean(1)


def _finish(nll: Tensor, count: Count, samples: int) -> Outcome:
    """Posterior, loss and backward, from the mean cross-entropy of each configuration."""
    posterior = count.posterior(-samples * nll)
    loss = (posterior * nll).sum()
    loss.backward()
    return Outcome(loss.detach(), posterior)


def base_learner(problem: Problem) -> Runner:
    """One configuration, everything shared: ordinary training."""
    net = _copied(problem)
    config = problem.space.all
    one = torch.ones(1, device=problem.x.device)

    def step() -> Outcome:
        net.zero_grad()
        with problem.case.precision():
            logits = _forward(net, config, problem.x)
        loss = F.cross_entropy(logits.float(), problem.y)
        loss.backward()
        return Outcome(loss.detach(), one)

    return Runner(net, step)


def naive_two_forwards(problem: Problem) -> Runner:
    """As published: every configuration forward, then every one forward and backward."""
    net, count = _copied(problem), Count(problem)
    configs = problem.space.configs

    def nll_of(config: tuple[bool, ...]) -> Tensor:
        with problem.case.precision():
            logits = _forward(net, config, problem.x)
        return F.cross_entropy(logits.float(), problem.y)

    def step() -> Outcome:
        net.zero_grad()
        with torch.no_grad():
            nll = torch.stack([nll_of(config) for config in configs])
        posterior = count.posterior(-len(problem.x) * nll)
        for weight, config in zip(posterior, configs, strict=True):
            (weight * nll_of(config)).backward()
        return Outcome((posterior * nll).sum(), posterior)

    return Runner(net, step)


def _from_logits(problem: Problem, net: TransferNet, logits: Callable[[Tensor], Tensor],
                 x: Tensor) -> Runner:  # fmt: skip
    """The step of a column that has the logits ``[C, N, K]`` of all configurations at once."""
    count = Count(problem)

    def step() -> Outcome:
        net.zero_grad()
        with problem.case.precision():
            out = logits(x)
        return _finish(_nll(out, problem.y), count, len(problem.x))

    return Runner(net, step, count)


def _loop(net: TransferNet, configs: list[tuple[bool, ...]], x: Tensor) -> Tensor:
    return torch.stack([_forward(net, config, x) for config in configs])


def naive_one_forward(problem: Problem) -> Runner:
    """Every configuration forward once; one backward through all of them."""
    net = _copied(problem)
    return _from_logits(problem, net, partial(_loop, net, problem.space.configs), problem.x)


def compiled_loop(problem: Problem) -> Runner:
    """The loop with one forward, its stages compiled once for the weights of any configuration.

    The head stays outside, and the whole loop is not one graph: PyTorch 2.13 on the CPU then gives
    wrong gradients (max-pool, flatten and linear layer compiled together), which the gate refuses.
    """
    net = _copied(problem)
    head, depth = net.heads[TASK], net.depth
    paths = [
        {name: tensor for name, tensor in path.items() if int(name.split(".")[0]) < depth}
        for path in _paths(net, problem)
    ]
    # A form without weights of its own: Dynamo compiles anew for weights that it has seen there.
    form = nn.Sequential(*_stages_of(net, problem.space.configs[0]))
    form = copy.deepcopy(form).to("meta")
    body = torch.compile(lambda weights, x: functional_call(form, weights, (x,)))
    return _from_logits(
        problem, net, lambda x: torch.stack([head(body(path, x)) for path in paths]), problem.x
    )


def _paths(net: TransferNet, problem: Problem) -> list[dict[str, Tensor]]:
    """The weights of each configuration and of the head, by their names in a plain Sequential."""
    return [
        dict(nn.Sequential(*_stages_of(net, config), net.heads[TASK]).named_parameters())
        for config in problem.space.configs
    ]


def stacked_vmap(problem: Problem) -> Runner:
    """``torch.func.vmap`` over the configurations' weights, stacked in every step."""
    net = _copied(problem)
    paths = _paths(net, problem)
    form = nn.Sequential(*_stages_of(net, problem.space.configs[0]), net.heads[TASK])

    def logits(x: Tensor) -> Tensor:
        weights = {name: torch.stack([path[name] for path in paths]) for name in paths[0]}
        return vmap(lambda w: functional_call(form, w, (x,)))(weights)

    return _from_logits(problem, net, logits, problem.x)


def _runs(problem: Problem) -> Iterator[range]:
    """The stages of each group."""
    first = 0
    for size in problem.case.groups or (1,) * problem.net.depth:
        yield range(first, first + size)
        first += size


def _tree(net: TransferNet, runs: list[range], x: Tensor) -> Tensor:
    """Logits ``[C, N, K]``: prefixes folded into the batch, both branches one wide convolution."""
    h = x
    for run in runs:
        pair = (net.shared[run[0]], net.specific[TASK][run[0]])
        if len(run) == 1 and type(pair[0]) is nn.Sequential and _is_conv_layer(pair[0]):
            convs = [stage[0] for stage in pair]
            weight = torch.cat([conv.weight for conv in convs])
            bias = torch.cat([conv.bias for conv in convs])
            wide = F.conv2d(h, weight, bias, padding=convs[0].padding)
            h = pair[0][1:](wide).unflatten(1, (2, -1)).flatten(0, 1)
        else:
            branches = (net.shared, net.specific[TASK])
            parts = [nn.Sequential(*(b[i] for i in run))(h) for b in branches]
            h = torch.stack(parts, 1).flatten(0, 1)
    return net.heads[TASK](h).unflatten(0, (len(x), -1)).transpose(0, 1)


def _is_conv_layer(stage: nn.Sequential) -> bool:
    return isinstance(stage[0], nn.Conv2d) and not any(True for _ in stage[1:].parameters())


def plain_tree(problem: Problem) -> Runner:
    """The tree in plain PyTorch, as a user would write it."""
    net = _copied(problem)
    return _from_logits(problem, net, partial(_tree, net, list(_runs(problem))), problem.x)


def channels_last_tree(problem: Problem) -> Runner:
    """The same with channels-last weights and input."""
    net = _copied(problem).to(memory_format=torch.channels_last)
    x = problem.x.contiguous(memory_format=torch.channels_last)
    return _from_logits(problem, net, partial(_tree, net, list(_runs(problem))), x)


def compiled_tree(problem: Problem) -> Runner:
    """``torch.compile`` of the tree."""
    net = _copied(problem)
    tree = torch.compile(partial(_tree, net, list(_runs(problem))))
    return _from_logits(problem, net, tree, problem.x)


def _graphed(runner: Runner) -> Runner:
    """A runner whose whole step is captured in a CUDA graph."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            runner.step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        outcome = runner.step()
    if runner.count is not None:
        runner.count.wins.fill_(1)  # as before the steps that warmed up

    def step() -> Outcome:
        graph.replay()
        return outcome

    return Runner(runner.net, step)


def graphed_base_learner(problem: Problem) -> Runner:
    """The base learner's step captured in a CUDA graph."""
    return _graphed(base_learner(problem))


def graphed_tree(problem: Problem) -> Runner:
    """The tree's whole step captured in a CUDA graph."""
    return _graphed(plain_tree(problem))


def _for_ours(problem: Problem) -> TransferNet:
    """On a GPU with the memory format that the README advises."""
    net = _copied(problem)
    return net.to(memory_format=torch.channels_last) if problem.x.is_cuda else net


def ours(problem: Problem, backend: str) -> Runner:
    """The library, with one of its backends."""
    net = _for_ours(problem)
    em = lf.LASEM(net, problem.space, backend=backend)

    def step() -> Outcome:
        net.zero_grad()
        with problem.case.precision():
            result = em(problem.x, problem.y, task=TASK)
        result.loss.backward()
        return Outcome(result.loss.detach(), result.posterior)

    return Runner(net, step)


# What is not favoured has none at all; of what is, however improbable, nothing is left out.
_PRUNE = 1e-30


def ours_pruned(problem: Problem, backend: str) -> Runner:
    """The library under a prior that allows some configurations, its M-step following only them.

    With the others' posterior 0, every backend and precision follows the same ones.
    """
    net = _for_ours(problem)
    favoured = problem.favoured()
    prior = torch.zeros(len(problem.space), dtype=torch.float64)
    prior[favoured] = 1
    em = lf.LASEM(net, problem.space, backend=backend, prior=prior, prune=_PRUNE)
    em = em.to(problem.x.device)

    def step() -> Outcome:
        net.zero_grad()
        with problem.case.precision():
            result = em(problem.x, problem.y, task=TASK)
        result.loss.backward()
        return Outcome(result.loss.detach(), result.posterior[favoured])

    return Runner(net, step)


class _NoUpdate(torch.optim.Optimizer):
    """Leaves the weights alone: no column's step has an optimiser."""

    def __init__(self, parameters: Iterable[nn.Parameter]) -> None:
        super().__init__(parameters, {})

    def step(self, closure: object = None) -> None:
        """Nothing."""


def ours_captured(problem: Problem, backend: str) -> Runner:
    """The library with one of its backends, its step captured by ``lf.capture``."""
    net = _for_ours(problem)
    em = lf.LASEM(net, problem.space, backend=backend)
    with problem.case.precision():
        captured = lf.capture(
            em, _NoUpdate(net.parameters()), problem.x, problem.y, TASK, strict=True
        )

    def step() -> Outcome:
        result = captured(problem.x, problem.y)
        return Outcome(result.loss, result.posterior)

    for _ in range(2):  # an eager step, and the one that records
        step()
    for buffer in em._prior.states.all_buffers():
        buffer.zero_()  # as before these two
    return Runner(net, step)


BASE = "base learner"

PEERS = [
    Column(BASE, base_learner, weighs="one"),
    Column("naive loop, two forwards", naive_two_forwards),
    Column("naive loop, one forward", naive_one_forward),
    Column("vmap", stacked_vmap),
    Column("compiled loop", compiled_loop),
    Column("plain tree", plain_tree),
    Column("plain tree, channels last", channels_last_tree),
    Column("compiled tree", compiled_tree),
    Column(f"{BASE}, CUDA graph", graphed_base_learner, weighs="one", device="cuda"),
    Column("plain tree, CUDA graph", graphed_tree, device="cuda"),
]

# Winograd F(4x4, 3x3) is off by up to 12 times as much as a direct convolution (DESIGN, section 5).
_SLACK = {"cpp": 12.0}


def library_column(backend: str) -> Column:
    """The library with one backend."""
    return Column(
        f"lasem_fast {backend}", partial(ours, backend=backend), slack=_SLACK.get(backend, 4.0)
    )


# "cpp" has nothing of its own on a GPU, and "triton" on a CPU only an interpreter.
_BACKENDS = {"cpu": ("torch", "cpp"), "cuda": ("torch", "triton")}


def library_columns(device: str) -> list[Column]:
    """The library with every backend that can run here; the naive reference is a peer above.

    With pruned M-steps too, which a row only has if it favours some configurations.
    """
    known = lf.backends()
    here = [name for name in _BACKENDS[device] if known[name] == "available"]
    whole = [library_column(name) for name in here]
    columns = list(whole)
    if device == "cuda":
        columns += [
            replace(column, name=f"{column.name}, captured",
                    build=partial(ours_captured, backend=name))
            for name, column in zip(here, whole, strict=True)
        ]  # fmt: skip
    columns += [
        replace(column, name=f"{column.name}, pruned", weighs="favoured",
                build=partial(ours_pruned, backend=name))
        for name, column in zip(here, whole, strict=True)
    ]  # fmt: skip
    return columns


def columns(case: Case) -> list[Column]:
    """The columns that a row has."""
    return [
        column
        for column in [*PEERS, *library_columns(case.device)]
        if column.name not in case.without
        and column.device in ("", case.device)
        and (case.favours or column.weighs != "favoured")
    ]
