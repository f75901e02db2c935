"""Stages whose forward is more than calls of layers: what runs is what their code says now."""

from __future__ import annotations

import threading

import pytest
import torch
import torch.nn.functional as F
from nets import small_net
from oracle import assert_step_equals, brute_force
from torch import nn
from torch.func import functional_call
from torch.nn.modules.module import register_module_forward_hook

import lasem_fast as lf
from lasem_fast.tree.lowering import Program, program_of

SWITCH = True


class _Stage(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.second = (nn.Conv2d(3, 3, 3, padding=1) for _ in range(2))
        self.relu, self.drop, self.same = nn.ReLU(), nn.Dropout(0.5).eval(), nn.Identity()
        self.register_buffer("gate", torch.ones(()))
        self.rows, self.setting, self._private = [True], True, True

    def both(self, h):
        return self.relu(self.second(self.relu(self.first(h))) + h)

    def one(self, h):
        return self.relu(self.first(h))

    def train(self, mode=True):
        super().train(mode)
        self.drop.eval()
        return self


class Frozen(_Stage):
    def forward(self, h):
        with torch.no_grad():
            h = self.first(h)
        return self.relu(self.second(h))


class Decorated(_Stage):
    @torch.no_grad()
    def forward(self, h):
        return self.both(h)


class Before(_Stage):
    """What is added is what stood before the ReLU."""

    def forward(self, h):
        h = self.first(h)
        return self.second(self.relu(self.drop(self.same(h)))) + h


class Replaced(_Stage):
    def forward(self, h):
        return self.relu(functional_call(self.first, {"weight": self.second.weight * 2}, (h,)))


class Padded(_Stage):
    def forward(self, h):
        before, self.first.padding, self.first.dilation = self.first.padding, (2, 2), (2, 2)
        out = self.first(h)
        self.first.padding, self.first.dilation = before, (1, 1)
        return self.relu(out)


class Called(_Stage):
    def __call__(self, h):
        return super().__call__(h) * 2

    def forward(self, h):
        return self.one(h)


class Kept(_Stage):
    def forward(self, h):
        self.rows.append(type(h))
        return self.one(h)


class InPlace(_Stage):
    """Changes what it reads again, under another name."""

    def forward(self, h):
        before, h = h, self.first(h)
        other = self.same(h)
        other += before
        return self.relu(other) + h


class Hidden(_Stage):
    """A class attribute comes before the layer of its name."""

    extra = None

    def __init__(self):
        super().__init__()
        self.extra = nn.Conv2d(3, 3, 1)

    def forward(self, h):
        return self.one(h) if self.extra is None else self.extra(h)


class Static(_Stage):
    @staticmethod
    def chosen(a, b=None):
        return a if b is None else b.relu()

    def forward(self, h):
        return self.chosen(self.first(h))


class Computed(_Stage):
    @property
    def setting(self):
        return False

    @setting.setter
    def setting(self, value):
        self.__dict__["setting"] = value

    def forward(self, h):
        return self.both(h) if self.setting else self.one(h)


class Swallowing(_Stage):
    def forward(self, h):
        try:
            return F.gelu(self.first(h))
        except BaseException:
            return self.one(h)


class Default(_Stage):
    def forward(self, h, twice=True, flags=(1, 2)):
        return self.both(h) if twice and len(flags) == 2 else self.one(h)


def _case(kind, layers=1):
    torch.manual_seed(0)
    first = nn.Sequential(nn.Conv2d(2, 3, 3, padding=1), nn.ReLU())
    net = lf.TransferNet([first, *(kind() for _ in range(layers))])
    net.add_task("a", nn.Sequential(nn.Flatten(), nn.Linear(3 * 36, 3)))
    net.double()
    return net, torch.randn(4, 2, 6, 6).double(), torch.tensor([0, 1, 2, 0])


def _assert_right(net, x, y, em):
    for parameter in net.parameters():
        parameter.grad = None
    step = em(x, y, "a")
    assert_step_equals(net, step, brute_force(net, em.space.bits, x, y, "a"))


KINDS = [
    Frozen, Decorated, Before, Replaced, Padded, Called, Kept, InPlace, Hidden, Static, Computed,
    Swallowing, Default,
]  # fmt: skip


@pytest.mark.parametrize("kind", KINDS)
def test_a_step_is_brute_forces(kind, backend):
    net, x, y = _case(kind)
    em = lf.LASEM(net, prior="uniform", backend=backend)
    _assert_right(net, x, y, em)
    assert not any(isinstance(t, torch.fx.Proxy) for t in getattr(net.shared[1], "rows", ()))


def _set(name, value):
    return lambda stage: setattr(stage, name, value)


class ReadsSetting(_Stage):
    def forward(self, h):
        return self.both(h) if self.setting else self.one(h)


class ReadsPrivate(_Stage):
    def forward(self, h):
        return self.both(h) if self._private else self.one(h)


class ReadsList(_Stage):
    def forward(self, h):
        return self.both(h) if self.rows[0] else self.one(h)


class ReadsBuffer(_Stage):
    def forward(self, h):
        return self.both(h) if self.gate > 0 else self.one(h)


class ReadsLayer(_Stage):
    def forward(self, h):
        return self.both(h) if getattr(self.first, "flag", True) else self.one(h)


class ReadsClass(_Stage):
    flag = True

    def forward(self, h):
        return self.both(h) if self.flag else self.one(h)


class ReadsGlobal(_Stage):
    def forward(self, h):
        return self.both(h) if SWITCH else self.one(h)


class ReadsGradMode(_Stage):
    def forward(self, h):
        return self.both(h) if torch.is_grad_enabled() else self.one(h)


class CallsMethod(_Stage):
    def forward(self, h):
        return self.both(h)


CHANGES = {
    ReadsSetting: _set("setting", False),
    ReadsPrivate: _set("_private", False),
    ReadsList: lambda stage: stage.rows.__setitem__(0, False),
    ReadsBuffer: lambda stage: stage.gate.fill_(-1),
    ReadsLayer: lambda stage: setattr(stage.first, "flag", False),
    CallsMethod: lambda stage: setattr(stage, "both", stage.one),
}


@pytest.mark.parametrize("kind", CHANGES)
def test_what_is_changed_between_two_steps_counts(kind, backend):
    net, x, y = _case(kind)
    em = lf.LASEM(net, prior="uniform", backend=backend)
    _assert_right(net, x, y, em)
    for stage in (net.shared[1], net.specific["a"][1]):
        CHANGES[kind](stage)
    _assert_right(net, x, y, em)


@pytest.mark.parametrize("kind", [ReadsClass, ReadsGlobal, CallsMethod])
def test_what_is_changed_outside_of_the_stage_counts(kind, backend, monkeypatch):
    net, x, y = _case(kind)
    em = lf.LASEM(net, prior="uniform", backend=backend)
    _assert_right(net, x, y, em)
    monkeypatch.setattr(ReadsClass, "flag", False)
    monkeypatch.setitem(globals(), "SWITCH", False)
    monkeypatch.setattr(_Stage, "both", _Stage.one)
    _assert_right(net, x, y, em)


def test_a_step_without_gradients_decides_nothing(backend):
    net, x, y = _case(ReadsGradMode)
    em = lf.LASEM(net, prior="uniform", backend=backend)
    with torch.no_grad():
        em(x, y, "a")
    _assert_right(net, x, y, em)


@pytest.mark.parametrize("kind", [ReadsSetting, ReadsPrivate, ReadsClass, ReadsGlobal, Default])
def test_plain_settings_are_read_and_the_stage_is_fused(kind):
    assert isinstance(program_of(kind()), Program)


class Children(nn.Sequential):
    """A subclass without a forward of its own, a list, and a dictionary."""

    def __init__(self):
        super().__init__(nn.Conv2d(3, 3, 1), nn.ReLU())
        self.more = nn.ModuleList([nn.Conv2d(3, 3, 1), nn.ReLU()])
        self.named = nn.ModuleDict({"last": nn.Conv2d(3, 3, 1)})

    def forward(self, h):
        for i, layer in enumerate(self.more):
            h = layer(h) if i < len(self.more) else h
        for layer in [self[0], self[1]]:
            h = layer(h)
        return self.named["last"](h)


def test_children_in_a_row_are_read(backend):
    class Plain(nn.Sequential):
        pass

    assert len(program_of(Children()).layers) == 3
    assert len(program_of(Plain(nn.Conv2d(3, 3, 1), nn.ReLU())).layers) == 1
    _assert_right(*(case := _case(Children)), lf.LASEM(case[0], prior="uniform", backend=backend))


def test_reading_a_forward_is_nothing_that_other_threads_see():
    """torch.fx patches nn.Module for all of them."""
    layer, x, failed = nn.Linear(3, 3), torch.randn(2, 3), []
    done = threading.Event()

    def others():
        while not done.is_set():
            try:
                layer(x)
            except Exception as error:
                failed.append(error)

    thread = threading.Thread(target=others)
    thread.start()
    for _ in range(200):
        assert isinstance(program_of(ReadsSetting()), Program)
    done.set()
    thread.join()
    assert not failed


@pytest.mark.parametrize("place", ["hook", "conv", "relu", "convolution"])
def test_calls_of_all_modules_that_somebody_steps_into(place, backend, monkeypatch):
    net = small_net(2)
    x, y = torch.randn(4, 2, 6, 6).double(), torch.tensor([0, 1, 2, 0])
    em = lf.LASEM(net, prior="uniform", backend=backend)
    em(x, y, "a")
    own, convolve = nn.Conv2d.forward, nn.Conv2d._conv_forward
    handle = None
    if place == "hook":
        handle = register_module_forward_hook(
            lambda module, _, out: 2 * out if type(module) is nn.Conv2d else None
        )
    elif place == "conv":
        monkeypatch.setattr(nn.Conv2d, "forward", lambda self, h: 2 * own(self, h))
    elif place == "relu":
        monkeypatch.setattr(nn.ReLU, "forward", lambda self, h: h.sigmoid())
    else:
        monkeypatch.setattr(
            nn.Conv2d, "_conv_forward", lambda self, *args: 2 * convolve(self, *args)
        )
    try:
        _assert_right(net, x, y, em)
    finally:
        if handle is not None:
            handle.remove()


def _branches(first, second, before):
    """A net whose last stage ends differently in its two branches."""
    net = lf.TransferNet([nn.Conv2d(2, 3, 3, padding=1), nn.Sequential(*before, first())])
    net.add_task("a", nn.Sequential(nn.Flatten(), nn.Linear(3 * 36, 3)))
    net.specific["a"][1][len(before)] = second()
    return net.double()


class Scaled(nn.Module):
    def __init__(self, factor=2.0):
        super().__init__()
        self.factor = factor

    def forward(self, h):
        return h * self.factor


DIFFER = {
    "types": (nn.ReLU, nn.Tanh),
    "settings": (lambda: nn.LeakyReLU(0.1), lambda: nn.LeakyReLU(0.3)),
    "attributes": (Scaled, lambda: Scaled(3.0)),
    "modes": (lambda: nn.Dropout(1.0), lambda: nn.Dropout(1.0).eval()),
}


@pytest.mark.parametrize("groups", [None, (2,)])
@pytest.mark.parametrize("behind", [False, True])
@pytest.mark.parametrize("what", DIFFER)
def test_branches_that_differ_without_any_tensor(what, behind, groups, backend):
    torch.manual_seed(0)
    net = _branches(*DIFFER[what], [nn.Conv2d(3, 3, 1)] if behind else [])
    x, y = torch.randn(4, 2, 6, 6).double(), torch.tensor([0, 1, 2, 0])
    space = lf.ConfigSpace(2, groups)
    # one posterior for both steps: the M-step alone, with what is random as it is
    posterior = torch.full((len(space),), 1 / len(space)).double()
    step = lf.LASEM(net, space, prior="uniform", backend=backend)(x, y, "a", posterior)
    step.loss.backward()
    truth = brute_force(net, space.bits, x, y, "a", posterior=posterior)
    grads = {name: p.grad for name, p in net.named_parameters()}
    torch.testing.assert_close(step.loss.detach(), truth.loss)
    for name, grad in truth.grads.items():
        got = torch.zeros_like(grad) if grads[name] is None else grads[name]
        torch.testing.assert_close(got, grad)
