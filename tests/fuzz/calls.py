"""The public surface as calls with good arguments, one or two of which are then broken."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

import lasem_fast as lf
from lasem_fast import lifelong, metrics
from lasem_fast.transfer import (
    DeconvolutionalFactorization,
    HardParameterSharing,
    TensorFactorization,
    TransferMechanism,
)

from . import world as worlds
from .world import World


@dataclass
class Call:
    """One entry of the surface.

    Attributes:
        run: makes the call on a world with its arguments.
        good: makes the good arguments.
        setup: what has to be there before; given the arguments, broken ones included.
    """

    name: str
    run: Callable[..., Any]
    good: dict[str, Callable[[World], Any]]
    setup: Callable[..., None] | None = None


CALLS: dict[str, Call] = {}


def call(entry: str, /, setup: Any = None, **good: Any) -> Any:
    """Adds what it decorates to :data:`CALLS`."""

    def add(run: Callable[..., Any]) -> Callable[..., Any]:
        CALLS[entry] = Call(entry, run, good, setup)
        return run

    return add


def _x(w: World) -> Tensor:
    return w.x.clone()


def _y(w: World) -> Tensor:
    return w.y.clone()


def _is(value: Any) -> Callable[[World], Any]:
    return lambda w: copy.deepcopy(value)


# -- the step --


@call("em", x=_x, y=_y, task=_is("a"), posterior=_is(None))
def _(w: World, x: Any, y: Any, task: Any, posterior: Any) -> Any:
    return w.em(x, y, task, posterior)


@call("em, first call of a task", x=_x, y=_y, task=_is("b"))
def _(w: World, x: Any, y: Any, task: Any) -> Any:
    return w.em(x, y, task)


@call("em, frozen", x=_x, y=_y, task=_is("a"), posterior=_is(torch.full((4,), 0.25)))
def _(w: World, x: Any, y: Any, task: Any, posterior: Any) -> Any:
    return w.em(x, y, task, posterior=posterior)


@call("em, ended task", x=_x, y=_y, posterior=_is(None))
def _(w: World, x: Any, y: Any, posterior: Any) -> Any:
    return w.em(x, y, "c", posterior)


@call("em, wrong number of arguments", arguments=_is(()))
def _(w: World, arguments: Any) -> Any:
    return w.em(*([arguments] if not isinstance(arguments, tuple) else arguments))


@call("em.evaluate", x=_x, task=_is("a"))
def _(w: World, x: Any, task: Any) -> Any:
    return w.em.evaluate(x, task)


@call("em.prior", task=_is("a"))
def _(w: World, task: Any) -> Any:
    return w.em.prior(task)


@call("em.best_config", task=_is("a"))
def _(w: World, task: Any) -> Any:
    return w.em.best_config(task)


@call("em.end_task", task=_is("a"), config=_is(None))
def _(w: World, task: Any, config: Any) -> Any:
    return w.em.end_task(task, config)


@call("em.end_task twice", config=_is(None))
def _(w: World, config: Any) -> Any:
    return w.em.end_task("c", config)


@call("backward twice", x=_x)
def _(w: World, x: Any) -> Any:
    return w.em(x, w.y, "a")


def _gaussian(w: World, **_: Any) -> None:
    w.em = lf.LASEM(w.net, likelihood=lf.likelihoods.Gaussian(), backend=w.em.backend)


@call("em, regression", setup=_gaussian, x=_x, y=lambda w: torch.randn(4, 3))
def _(w: World, x: Any, y: Any) -> Any:
    return w.em(x, y, "a")


# -- what a user's modules and objects return --


class Returns(nn.Module):
    """Returns what it was told to, as many samples as it is given where that is a tensor."""

    def __init__(self, value: Any) -> None:
        super().__init__()
        self.value = lambda: value  # a copy of the module keeps it as it is

    def forward(self, h: Tensor) -> Any:
        value = self.value()
        if isinstance(value, Tensor) and value.dim() and len(value) == 4 and len(h) % 4 == 0:
            try:
                return value.repeat_interleave(len(h) // 4, 0)
            except RuntimeError:
                return value
        return value


def _stage_returns(w: World, out: Any) -> None:
    net = lf.TransferNet([nn.Flatten(), Returns(out)])
    net.add_task("a", nn.Linear(3, 3))
    w.net, w.em = net, lf.LASEM(net, backend=w.em.backend)


@call("a stage that returns", setup=_stage_returns, out=lambda w: torch.randn(4, 3))
def _(w: World, out: Any) -> Any:
    return w.em(w.x, w.y, "a")


@call("evaluate a stage that returns", setup=_stage_returns, out=lambda w: torch.randn(4, 3))
def _(w: World, out: Any) -> Any:
    return w.em.evaluate(w.x, "a")


def _head_returns(w: World, out: Any) -> None:
    net = lf.TransferNet([nn.Flatten(), nn.Tanh()])
    net.add_task("a", Returns(out))
    net.register_parameter("anchor", nn.Parameter(torch.zeros(1)))
    w.net, w.em = net, lf.LASEM(net, backend=w.em.backend)


@call("a head that returns", setup=_head_returns, out=lambda w: torch.randn(4, 3))
def _(w: World, out: Any) -> Any:
    return w.em(w.x, w.y, "a")


class _Likelihood(lf.likelihoods.Likelihood):
    def __init__(self, log_prob: Any, reduced: Any) -> None:
        self.value, self.reduced = log_prob, reduced

    def log_prob(self, output: Tensor, y: Tensor) -> Any:
        return output.sum(-1) if isinstance(self.value, str) else self.value

    def reduce(self, log_prob: Tensor) -> Any:
        return log_prob.sum(1) if isinstance(self.reduced, str) else self.reduced


def _with_likelihood(w: World, log_prob: Any, reduced: Any) -> None:
    log_prob = "good" if isinstance(log_prob, str) else log_prob
    reduced = "good" if isinstance(reduced, str) else reduced
    w.em = lf.LASEM(w.net, likelihood=_Likelihood(log_prob, reduced), backend=w.em.backend)


@call(
    "a likelihood that returns", setup=_with_likelihood,
    log_prob=lambda w: torch.randn(4, 4), reduced=lambda w: torch.randn(4),
)  # fmt: skip
def _(w: World, log_prob: Any, reduced: Any) -> Any:
    return w.em(w.x, w.y, "a")


class _Prior(lf.priors.Prior):
    def __init__(self, value: Any, score: Any) -> None:
        super().__init__()
        self.value, self.scores = lambda: value, lambda: score  # copied as they are

    def log_prob(self, task: str) -> Any:
        return self.value()

    def score(self, task: str) -> Any:
        return self.scores()


def _with_prior(w: World, log_prob: Any = None, score: Any = None) -> None:
    log_prob = torch.zeros(4) if score is not None else log_prob
    w.em = lf.LASEM(w.net, prior=_Prior(log_prob, score), backend=w.em.backend)
    if score is not None or w.pick.random() < 0.3:
        w.em._prior.start("a", 4, torch.device("cpu"))


@call("a prior that returns", setup=_with_prior, log_prob=lambda w: torch.zeros(4))
def _(w: World, log_prob: Any) -> Any:
    return w.em(w.x, w.y, "a")


@call("a prior whose probabilities are", setup=_with_prior, log_prob=lambda w: torch.zeros(4))
def _(w: World, log_prob: Any) -> Any:
    return w.em.prior("b")


@call("a prior that chooses by", setup=_with_prior, score=lambda w: torch.randn(4))
def _(w: World, score: Any) -> Any:
    return w.em.end_task("a")


class _Mechanism(TransferMechanism):
    def __init__(self, branch: Any, auxiliary: Any) -> None:
        super().__init__()
        self.branch, self.auxiliary = branch, auxiliary

    def shared_branch(self, shared: nn.Module, adapters: nn.Module | None) -> Any:
        return lf.transfer.Branch(shared) if isinstance(self.branch, str) else self.branch

    def auxiliary_loss(self, shared: nn.Module, adapters: nn.Module | None) -> Any:
        return self.auxiliary


def _with_mechanism(w: World, branch: Any, auxiliary: Any) -> None:
    net = lf.TransferNet([nn.Flatten(), nn.Tanh()], transfer=_Mechanism(branch, auxiliary))
    net.add_task("a", nn.Linear(w.x[0].numel(), 3))
    w.net, w.em = net, lf.LASEM(net, backend=w.em.backend)


@call(
    "a mechanism that returns", setup=_with_mechanism,
    branch=_is("good"), auxiliary=lambda w: torch.zeros(()),
)  # fmt: skip
def _(w: World, branch: Any, auxiliary: Any) -> Any:
    return w.em(w.x, w.y, "a")


def _embedding(w: World, x: Any, tokens: Any = None) -> None:
    net = lf.TransferNet([nn.Embedding(5, 3), nn.Flatten()])
    net.add_task("a", nn.Linear(6, 3))
    w.net, w.em = net, lf.LASEM(net, backend=w.em.backend)


@call("em, tokens", setup=_embedding, x=lambda w: torch.randint(5, (4, 2)))
def _(w: World, x: Any) -> Any:
    return w.em(x, w.y, "a")


# -- the net --


@call("TransferNet", stages=lambda w: [nn.Linear(4, 4), nn.ReLU()], transfer=_is("hps"))
def _(w: World, stages: Any, transfer: Any) -> Any:
    return lf.TransferNet(stages, transfer)


@call("TransferNet, tf", stage=lambda w: nn.Linear(4, 4), transfer=_is("tf"))
def _(w: World, stage: Any, transfer: Any) -> Any:
    return lf.TransferNet([stage], transfer)


@call("TransferNet, a stage twice", stage=lambda w: w.net.shared[0])
def _(w: World, stage: Any) -> Any:
    return lf.TransferNet([stage, stage])


@call("net.add_task", task=_is("new"), head=lambda w: worlds.head())
def _(w: World, task: Any, head: Any) -> Any:
    return w.net.add_task(task, head)


@call("net.add_task, a head twice", head=lambda w: w.net.heads["a"])
def _(w: World, head: Any) -> Any:
    return w.net.add_task("new", head)


@call("net", x=_x, task=_is("a"), config=_is([True, False]))
def _(w: World, x: Any, task: Any, config: Any) -> Any:
    return w.net(x, task, config)


@call("net, ended task", x=_x, config=_is(None))
def _(w: World, x: Any, config: Any) -> Any:
    return w.net(x, "c", config)


@call("net.path", task=_is("a"), config=_is({1}))
def _(w: World, task: Any, config: Any) -> Any:
    return w.net.path(task, config)


@call("net.branches", task=_is("a"))
def _(w: World, task: Any) -> Any:
    return w.net.branches(task)


@call("net.auxiliary_losses", task=_is("a"))
def _(w: World, task: Any) -> Any:
    return w.net.auxiliary_losses(task)


@call("net.config", task=_is("a"))
def _(w: World, task: Any) -> Any:
    return w.net.config(task)


@call("net.task_parameters", task=_is("a"))
def _(w: World, task: Any) -> Any:
    return w.net.task_parameters(task)


@call("net.named_task_parameters", task=_is("a"))
def _(w: World, task: Any) -> Any:
    return list(w.net.named_task_parameters(task))


@call("net.keep", task=_is("a"), config=_is([True, False]))
def _(w: World, task: Any, config: Any) -> Any:
    return w.net.keep(task, config)


@call("net.freeze", task=_is("c"))
def _(w: World, task: Any) -> Any:
    return w.net.freeze(task)


for _part in ("heads", "specific", "adapters"):

    @call(f"net.{_part}[]", task=_is("a"))
    def _(w: World, task: Any, part: str = _part) -> Any:
        return getattr(w.net, part)[task]


# -- LASEM -----------------------------------------------------------------------------------------


@call(
    "LASEM", net=lambda w: w.net, space=_is(None), likelihood=_is("joint"), prior=_is("count"),
    backend=_is("auto"), validate=_is(False), redraw_unclaimed=_is(False),
)  # fmt: skip
def _(w: World, net: Any, space: Any, likelihood: Any, prior: Any, backend: Any, validate: Any,
      redraw_unclaimed: Any) -> Any:  # fmt: skip
    return lf.LASEM(
        net, space, likelihood, prior, backend, validate=validate,
        redraw_unclaimed=redraw_unclaimed,
    )  # fmt: skip


@call("LASEM, probabilities", prior=lambda w: torch.rand(4))
def _(w: World, prior: Any) -> Any:
    return lf.LASEM(w.net, prior=prior)


@call("LASEM, approximations", max_memory=_is(None), prune=_is(0.0), m_step_draws=_is(None),
      e_step_every=_is(1))  # fmt: skip
def _(w: World, **options: Any) -> Any:
    return lf.LASEM(w.net, **options)


@call("LASEM.reference", net=lambda w: w.net, space=_is(None), backend=_is("torch"))
def _(w: World, net: Any, space: Any, backend: Any) -> Any:
    return lf.LASEM.reference(net, space, backend)


@call("LASEM, a space of another depth", space=lambda w: lf.ConfigSpace(3))
def _(w: World, space: Any) -> Any:
    return lf.LASEM(w.net, space)


def _state(w: World) -> dict[str, Any]:
    return copy.deepcopy(w.em.state_dict())


def _one(w: World) -> Any:
    """The key of the state dict whose value is broken."""
    keys = list(w.em.state_dict())
    return w.pick.choice(keys)


@call("em.load_state_dict", state=_state)
def _(w: World, state: Any) -> Any:
    return w.em.load_state_dict(state)


@call("net.load_state_dict", state=lambda w: copy.deepcopy(w.net.state_dict()))
def _(w: World, state: Any) -> Any:
    return w.net.load_state_dict(state)


def _value_setup(w: World, value: Any) -> None:
    w.key = _one(w)


@call("em.load_state_dict, one value", setup=_value_setup, value=lambda w: torch.ones(3, 2))
def _(w: World, value: Any) -> Any:
    nested = isinstance(value, Tensor) and value.is_nested  # PyTorch's own loading fails on it
    return w.em.load_state_dict({**w.em.state_dict(), w.key: None if nested else value})


@call("em.load_state_dict, extra state", value=lambda w: w.em.get_extra_state())
def _(w: World, value: Any) -> Any:
    return w.em.load_state_dict({**w.em.state_dict(), "_extra_state": value})


@call("em.load_state_dict, net's extra state", value=lambda w: w.net.get_extra_state())
def _(w: World, value: Any) -> Any:
    return w.em.load_state_dict({**w.em.state_dict(), "net._extra_state": value})


@call("em.load_state_dict, one key too many", key=_is("net.nothing"))
def _(w: World, key: Any) -> Any:
    state = w.em.state_dict()
    state[key if isinstance(key, str) else "nothing"] = torch.ones(1)
    return w.em.load_state_dict(state)


def _less(w: World) -> dict[str, Any]:
    state = dict(w.em.state_dict())
    del state[_one(w)]
    return state


@call("em.load_state_dict, one key less", state=_less)
def _(w: World, state: Any) -> Any:
    return w.em.load_state_dict(state)


def _another(w: World) -> dict[str, Any]:
    depth = w.pick.choice([1, 2, 3])
    other = lf.TransferNet([nn.Linear(4, 4) for _ in range(depth)])
    other.add_task(w.pick.choice("ab"), nn.Linear(4, 2))
    return lf.LASEM(other).state_dict()


@call("em.load_state_dict of another net", state=_another)
def _(w: World, state: Any) -> Any:
    return w.em.load_state_dict(state)


# -- what is searched --


@call("ConfigSpace", depth=_is(3), groups=_is([2, 1]))
def _(w: World, depth: Any, groups: Any) -> Any:
    return lf.ConfigSpace(depth, groups)


@call("ConfigSpace, full", depth=_is(3))
def _(w: World, depth: Any) -> Any:
    return lf.ConfigSpace(depth)


@call("ConfigSpace.from_configs", configs=_is([[True, False], [False, False]]), depth=_is(2))
def _(w: World, configs: Any, depth: Any) -> Any:
    return lf.ConfigSpace.from_configs(configs, depth)


@call("ConfigSpace.from_configs, one", config=_is([True, False]), depth=_is(None))
def _(w: World, config: Any, depth: Any) -> Any:
    return lf.ConfigSpace.from_configs([config], depth)


for _method in ("label", "index", "top", "bottom", "__getitem__"):

    @call(f"ConfigSpace.{_method}", value=_is(1))
    def _(w: World, value: Any, method: str = _method) -> Any:
        return getattr(lf.ConfigSpace(2), method)(value)


# -- likelihoods, priors, optimiser, initial weights, mechanisms --


@call("Gaussian", sigma=_is(1.0))
def _(w: World, sigma: Any) -> Any:
    return lf.likelihoods.Gaussian(sigma)


@call("as_likelihood", likelihood=_is("joint"))
def _(w: World, likelihood: Any) -> Any:
    return lf.likelihoods.as_likelihood(likelihood)


@call("Fixed", probabilities=lambda w: torch.rand(4))
def _(w: World, probabilities: Any) -> Any:
    return lf.priors.Fixed(probabilities)


@call("Count", initial=_is(1.0))
def _(w: World, initial: Any) -> Any:
    return lf.priors.Count(initial)


@call("Historic", initial=_is(1.0))
def _(w: World, initial: Any) -> Any:
    return lf.priors.Historic(initial)


@call("TFRMSprop", params=lambda w: list(w.net.parameters()), lr=_is(1e-3), decay=_is(0.9),
      eps=_is(1e-8))  # fmt: skip
def _(w: World, params: Any, lr: Any, decay: Any, eps: Any) -> Any:
    return lf.optim.TFRMSprop(params, lr, decay, eps)


def _rmsprop(w: World, **_: Any) -> None:
    w.optimizer = lf.optim.TFRMSprop(w.net.parameters())


@call("TFRMSprop.step", setup=_rmsprop, closure=_is(None))
def _(w: World, closure: Any) -> Any:
    return w.optimizer.step(closure)


@call("release_", module=lambda w: nn.Linear(2, 2))
def _(w: World, module: Any) -> Any:
    return lf.initialisers.release_(module)


@call("glorot_uniform_", tensor=lambda w: torch.zeros(3, 3), fan_in=_is(3), fan_out=_is(3))
def _(w: World, tensor: Any, fan_in: Any, fan_out: Any) -> Any:
    return lf.initialisers.glorot_uniform_(tensor, fan_in, fan_out)


@call("HardParameterSharing", init=_is(None))
def _(w: World, init: Any) -> Any:
    return HardParameterSharing(init)


@call("TensorFactorization", aux_weight=_is(0.1), init=_is(None))
def _(w: World, aux_weight: Any, init: Any) -> Any:
    return TensorFactorization(aux_weight, init)


@call("DeconvolutionalFactorization", sizes=_is([(2, 3, 3, 4)]), init=_is(None))
def _(w: World, sizes: Any, init: Any) -> Any:
    return DeconvolutionalFactorization(sizes, init)


@call("DeconvolutionalFactorization, one", sizes=_is((2, 3, 3, 4)),
      stage=lambda w: nn.Conv2d(2, 2, 3))  # fmt: skip
def _(w: World, sizes: Any, stage: Any) -> Any:
    return lf.TransferNet([stage], DeconvolutionalFactorization([sizes]))


# -- capture --


@call("capture", em=lambda w: w.em, optimizer=lambda w: w.optimizer, x=_x, y=_y, task=_is("a"),
      strict=_is(False))  # fmt: skip
def _(w: World, em: Any, optimizer: Any, x: Any, y: Any, task: Any, strict: Any) -> Any:
    return lf.capture(em, optimizer, x, y, task, strict=strict)


def _captured(w: World, **_: Any) -> None:
    w.step = lf.capture(w.em, w.optimizer, w.x, w.y, "a")


@call("a captured step", setup=_captured, x=_x, y=_y)
def _(w: World, x: Any, y: Any) -> Any:
    return w.step(x, y)


@call("a captured step, eager", setup=_captured, x=_x, y=_y)
def _(w: World, x: Any, y: Any) -> Any:
    return w.step.eager(x, y)


# -- the paper's networks --


for _name, _first in (("cifar100", 4), ("office_home", 4), ("stl10", 6), ("residual17", 4)):

    @call(f"nets.{_name}", layers=_is(_first), transfer=_is("hps"), width=_is(0.05))
    def _(w: World, layers: Any, transfer: Any, width: Any, name: str = _name) -> Any:
        return getattr(lf.nets, name)(layers, transfer, width)


@call("Architecture.head", classes=_is(3))
def _(w: World, classes: Any) -> Any:
    return lf.nets.cifar100(4, "hps", 0.05).head(classes)


@call("Architecture", transfer=_is("hps"), input_shape=_is((1, 6, 6)), kernels=_is((3,)),
      channels=_is((2,)), pools=_is((2,)), hidden=_is((4,)), batch_size=_is(2), groups=_is(None),
      skips=_is(()))  # fmt: skip
def _(w: World, **sizes: Any) -> Any:
    architecture = lf.nets.Architecture(**sizes)
    return architecture.net(), architecture.head(3), architecture.space()


@call("Architecture.space", groups=_is([2, 2]))
def _(w: World, groups: Any) -> Any:
    return lf.nets.cifar100(4, "hps", 0.05).space(groups)


@call("Architecture.net", transfer=_is("tf"))
def _(w: World, transfer: Any) -> Any:
    return lf.nets.cifar100(4, transfer, 0.05).net()


@call("same_pool", side=_is(7), window=_is(2))
def _(w: World, side: Any, window: Any) -> Any:
    return lf.nets.same_pool(side, window)


@call("SkipLayer", conv=lambda w: nn.Conv2d(2, 2, 3, padding=1), pool=lambda w: nn.Identity(),
      begins=_is(True), ends=_is(True))  # fmt: skip
def _(w: World, conv: Any, pool: Any, begins: Any, ends: Any) -> Any:
    return lf.nets.SkipLayer(conv, pool, begins=begins, ends=ends)


# -- runs and measures --


def _stages() -> lf.TransferNet:
    return lf.TransferNet([nn.Linear(4, 3), nn.Tanh()])


@call(
    "train_sequence",
    make_net=lambda w: _stages, make_head=lambda w: lambda task: nn.Linear(3, task.n_classes),
    tasks=lambda w: worlds.sequence(), method=_is("lasem"), epochs=_is(1), batch_size=_is(4),
    optimizer=lambda w: torch.optim.SGD, seed=_is(0), evaluate_earlier_every=_is(1),
    em_options=_is(None), device=_is("cpu"), on_epoch=_is(None),
)  # fmt: skip
def _(w: World, make_net: Any, make_head: Any, tasks: Any, **options: Any) -> Any:
    return lifelong.train_sequence(make_net, make_head, tasks, **options)


def _other_splits(w: World, **_: Any) -> None:
    w.parts = [worlds.batch(samples=6) for _ in range(3)]
    w.parts[w.pick.randrange(3)] = None


@call("train_sequence, data", x=lambda w: torch.randn(6, 4), y=lambda w: torch.randint(3, (6,)),
      n_classes=_is(3), method=lambda w: w.pick.choice(["lasem", "all", "none"]),
      setup=_other_splits)  # fmt: skip
def _(w: World, x: Any, y: Any, n_classes: Any, method: Any) -> Any:
    parts = [(x, y) if part is None else part for part in w.parts]
    return lifelong.train_sequence(
        _stages, lambda task: nn.Linear(3, task.n_classes),
        [lifelong.Task("p", *parts, n_classes)], method=method, epochs=1,
        optimizer=torch.optim.SGD,
    )  # fmt: skip


@call("train_sequence, splits", train=lambda w: worlds.batch(samples=6), name=_is("p"),
      valid=lambda w: worlds.batch(samples=2), test=lambda w: worlds.batch(samples=2))  # fmt: skip
def _(w: World, train: Any, valid: Any, test: Any, name: Any) -> Any:
    return lifelong.train_sequence(
        _stages, lambda task: nn.Linear(3, 3), [lifelong.Task(name, train, valid, test, 3)],
        epochs=1, optimizer=torch.optim.SGD,
    )  # fmt: skip


def _one_task(w: World, **_: Any) -> None:
    w.parts = worlds.sequence()[:1]


@call("train_sequence, what is made", net=lambda w: _stages(), head=lambda w: nn.Linear(3, 3),
      setup=_one_task)  # fmt: skip
def _(w: World, net: Any, head: Any) -> Any:
    return lifelong.train_sequence(
        lambda: net, lambda task: head, w.parts, epochs=1, optimizer=torch.optim.SGD
    )


_MATRIX = np.array([[0.5, np.nan], [0.4, 0.6]])

for _name in ("average_accuracy", "backward_transfer", "forgetting"):

    @call(f"metrics.{_name}", R=_is(_MATRIX))
    def _(w: World, R: Any, name: str = _name) -> Any:
        return getattr(metrics, name)(R)


for _name in ("forward_transfer", "gain"):

    @call(f"metrics.{_name}", R=_is(np.full((2, 2), 0.5)), other=_is([0.1, 0.2]))
    def _(w: World, R: Any, other: Any, name: str = _name) -> Any:
        return getattr(metrics, name)(R, other)


for _name in ("peak_epoch", "learning_curve_area"):

    @call(f"metrics.{_name}", values=_is([0.1, 0.2]))
    def _(w: World, values: Any, name: str = _name) -> Any:
        return getattr(metrics, name)(values)


for _name in ("peak_accuracy", "retention", "forgetting_ratio"):

    @call(f"metrics.{_name}", first=_is([0.1, 0.2]), second=_is([0.3, 0.2]))
    def _(w: World, first: Any, second: Any, name: str = _name) -> Any:
        return getattr(metrics, name)(first, second)


@call("metrics.share_frequency", configurations=_is([[True, False], [True, True]]))
def _(w: World, configurations: Any) -> Any:
    return metrics.share_frequency(configurations)
