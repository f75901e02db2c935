"""Which copies a captured step makes early, and when they are taken; no stream is CUDA's here."""

from __future__ import annotations

from contextlib import nullcontext
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from lasem_fast.backends import early_copies
from lasem_fast.backends.early_copies import EarlyCopies, Wanted, noted
from lasem_fast.kernels.box_form import BoxForm

FORM = BoxForm(None, (1, 2, 4, 4, 8), (3, 3), False)


class _Stream:
    """Notes what it waits for."""

    device, cuda_stream = torch.device("cpu"), 7

    def __init__(self):
        self.waited = []

    def wait_stream(self, stream):
        self.waited.append(stream)

    wait_event = wait_stream

    def record_event(self):
        return object()


class _Copies:
    """What copies the weights of some levels."""

    def __init__(self, levels):
        self.filters = [object() for _ in levels]
        self.runs = 0

    def __call__(self):
        self.runs += 1


@pytest.fixture
def streams(monkeypatch):
    main, side = _Stream(), _Stream()
    monkeypatch.setattr(torch.cuda, "current_stream", lambda *_: main)
    monkeypatch.setattr(torch.cuda, "stream", lambda _: nullcontext())
    monkeypatch.setattr(early_copies, "captured_stream", lambda _: main)
    monkeypatch.setattr(early_copies, "beside", lambda *_: side)
    return main, side


@pytest.fixture
def launched(monkeypatch):
    """The launches that were made ready, each with its levels."""
    launches = []

    def together(levels):
        launches.append(SimpleNamespace(levels=levels, copies=_Copies(levels)))
        return [level.place for level in levels], launches[-1].copies

    monkeypatch.setattr(early_copies, "_together", together)
    return launches


def wanted(*weights, dtype=torch.bfloat16):
    return Wanted(weights, dtype, FORM)


def parameters(count, size=(8, 8, 3, 3)):
    return [nn.Parameter(torch.randn(size)) for _ in range(count)]


def test_levels_are_copied_together(streams, launched, monkeypatch):
    """In the order in which they are asked for; each waits for its own launch alone."""
    main, side = streams
    monkeypatch.setattr(early_copies, "_MOST_TOGETHER", 3 * 576)
    weights = parameters(5)
    asked = [wanted(*weights[:2]), wanted(weights[2]), wanted(*weights[3:]), wanted(weights[2])]
    early = EarlyCopies(weights, asked)
    assert [len(launch.levels) for launch in launched] == [2, 1]
    assert [launch.copies.runs for launch in launched] == [1, 1]  # compiled
    with early.running():
        assert [launch.copies.runs for launch in launched] == [2, 2]
        assert side.waited == [main]
        found = [early.made(one) for one in asked]
        events = main.waited
        assert events[0] is events[1] is events[3] is not events[2]
    assert found == [*launched[0].copies.filters, launched[1].copies.filters[0], found[1]]
    assert main.waited[-1] is side


def test_only_what_is_as_it_was_is_taken(streams, launched):
    weights = parameters(3)
    flat = weights[0].unflatten(0, (2, 4)).flatten(0, 1)  # a view, as of a linear layer's
    asked = [wanted(flat), wanted(weights[1]), wanted(weights[2] * 2)]
    early = EarlyCopies(weights, asked)
    assert len(launched[0].levels) == 2
    with early.running():
        assert early.made(asked[0]) is not None
        assert early.made(wanted(weights[0].view(8, 8, 3, 3))) is not None
        assert early.made(asked[2]) is None
        assert early.made(asked[1]._replace(dtype=torch.float16)) is None
        assert early.made(wanted(weights[1].transpose(0, 1))) is None
        assert early.made(asked[1]) is not None
        with torch.no_grad():
            weights[1].mul_(2)
        assert early.made(asked[1]) is None
    assert EarlyCopies(weights[:1], asked[1:])._launches == []


def test_weights_of_other_dtypes_or_layouts_are_apart(streams, launched):
    weights = parameters(2)
    turned = nn.Parameter(torch.randn(8, 3, 3, 8).permute(0, 3, 1, 2))
    half = nn.Parameter(torch.randn(8, 8, 3, 3).half())
    asked = [wanted(weights[0]), wanted(half), wanted(weights[1], turned), wanted(turned)]
    EarlyCopies([*weights, turned, half], asked)
    assert [len(launch.levels) for launch in launched] == [1, 1, 1]


def test_what_is_asked_for_is_noted_and_then_found(streams, launched, monkeypatch):
    from lasem_fast.kernels import weight_copies as kernel

    plain = object()
    monkeypatch.setattr(kernel, "weight_copies", lambda *_: plain)
    weights, asked = parameters(2), []
    computed = weights[0] + weights[1]
    with torch.no_grad():
        without_graph = weights[0] + weights[1]

    def ask():
        levels = [weights[:1], weights[1:], [computed], [without_graph]]
        return [early_copies.copies_of(computed, w, torch.bfloat16, FORM) for w in levels]

    assert ask() == [plain] * 4
    with noted(asked):
        assert ask() == [plain] * 4
    assert len(asked) == 2
    early = EarlyCopies(weights, asked)
    with early.running():
        assert ask() == [*launched[0].copies.filters, plain, plain]
    assert ask() == [plain] * 4
    assert not early_copies._running and not early_copies._noting


def test_without_copies_nothing_waits(streams):
    main, side = streams
    with EarlyCopies(parameters(1), []).running():
        pass
    assert main.waited == side.waited == []
