"""Copies of weights that a captured step makes before all else, of many levels in one launch.

What a step asks for is noted while it runs eagerly. The copies have memory of their own that lasts
as long as the graph: a graph's memory is given out again in the order of the host, whatever stream
reads it.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from lasem_fast.backends.side_stream import beside, captured_stream, key_of
from lasem_fast.kernels.box_form import BoxForm, Filters

# Values that one launch copies: with more of them levels would wait for the copies of others.
_MOST_TOGETHER = 2**20


class Wanted(NamedTuple):
    """What a level asks for.

    Attributes:
        weights: one ``[Co, C, KH, KW]`` per branch.
        dtype: of the copies.
        form: of the level.
    """

    weights: Sequence[Tensor]
    dtype: torch.dtype
    form: BoxForm

    @property
    def place(self) -> tuple[Any, ...]:
        """Where the weights lie in memory, and what becomes of them."""
        lie = tuple((w.data_ptr(), w.shape, w.stride(), w.dtype) for w in self.weights)
        return lie, self.dtype, self.form


class EarlyCopies:
    """The copies of one step that is to be captured.

    They are made from :meth:`running` on, if nothing has changed the weights when they are asked
    for.
    """

    def __init__(self, weights: Iterable[Tensor], wanted: Iterable[Wanted]) -> None:
        """
        Args:
            weights: whose changes in place are noticed; of others no copies are made here.
            wanted: what the step asked for when it ran before.
        """
        self._versions = {id(weight): (weight, weight._version) for weight in weights}
        wanted = {one.place: one for one in wanted if self._knows(one)}
        self._launches = [_together(levels) for levels in _in_launches(wanted.values())]
        for _, copies in self._launches:
            copies()  # compiled, which a capture does not allow
        self._made: dict[tuple[Any, ...], tuple[Filters, Any]] = {}

    @contextmanager
    def running(self) -> Iterator[None]:
        """A context, in a capture, that begins with the copies and in which they are found."""
        if not self._launches:
            yield
            return
        main = torch.cuda.current_stream()
        side = beside(main, "copies")
        side.wait_stream(main)
        with torch.cuda.stream(side):
            for places, copies in self._launches:
                copies()
                done = side.record_event()
                made = ((filters, done) for filters in copies.filters)
                self._made.update(zip(places, made, strict=True))
        _running[key_of(main)] = self
        try:
            yield
        finally:
            del _running[key_of(main)]
        main.wait_stream(side)  # for copies that nobody has asked for, too

    def made(self, wanted: Wanted) -> Filters | None:
        """What was made of some weights; None if it was not, or not of what they are now."""
        filters, done = self._made.get(wanted.place, (None, None))
        if filters is None or not self._knows(wanted):
            return None
        torch.cuda.current_stream().wait_event(done)
        return filters

    def _knows(self, wanted: Wanted) -> bool:
        """Whether the weights are what they were when this was made."""
        for weight in map(_whole, wanted.weights):
            known, version = self._versions.get(id(weight), (None, 0))
            if known is not weight or version != weight._version:
                return False
        return True


def copies_of(x: Tensor, weights: Sequence[Tensor], dtype: torch.dtype, form: BoxForm) -> Filters:
    """The filters of a level, which a captured step may have made already; else one launch.

    Args:
        x: on the device.
        weights: one ``[Co, C, KH, KW]`` per branch.
        dtype: of the copies.
        form: of the level.
    """
    from lasem_fast.kernels.weight_copies import weight_copies  # and triton with it

    if _noting or _running:
        wanted = Wanted(weights, dtype, form)
        _note(x, wanted)
        stream = captured_stream(x)
        early = None if stream is None else _running.get(key_of(stream))
        filters = None if early is None else early.made(wanted)
        if filters is not None:
            return filters
    return weight_copies(weights, dtype, form)


@contextmanager
def noted(into: list[Wanted]) -> Iterator[None]:
    """A context in which what levels ask for on the current stream is added to a list."""
    key = key_of(torch.cuda.current_stream())
    _noting[key] = into
    try:
        yield
    finally:
        del _noting[key]


_running: dict[tuple[torch.device, int], EarlyCopies] = {}
_noting: dict[tuple[torch.device, int], list[Wanted]] = {}


def _note(x: Tensor, wanted: Wanted) -> None:
    if not _noting or torch.compiler.is_compiling():
        return
    # those that are computed are made in the middle of a step, and would be held here
    if all(isinstance(_whole(weight), nn.Parameter) for weight in wanted.weights):
        noted_here = _noting.get(key_of(torch.cuda.current_stream()))
        if noted_here is not None:
            noted_here.append(wanted)


def _whole(weight: Tensor) -> Tensor:
    return weight if weight._base is None else weight._base


def _in_launches(wanted: Iterable[Wanted]) -> list[list[Wanted]]:
    """Levels in the order in which they are asked for, those of one launch together."""
    launches: list[list[Wanted]] = []
    room, before = 0, None
    for one in wanted:
        if any(weight.stride() != one.weights[0].stride() for weight in one.weights):
            continue
        size = sum(weight.numel() for weight in one.weights)
        kind = one.weights[0].dtype, one.dtype
        if size > room or kind != before:
            launches.append([])
            room, before = _MOST_TOGETHER, kind
        launches[-1].append(one)
        room -= size
    return launches


def _together(levels: Sequence[Wanted]) -> tuple[list[tuple[Any, ...]], Any]:
    """Where the weights of some levels lie, and what copies them."""
    from lasem_fast.kernels.many_copies import ManyCopies

    copies = ManyCopies([(level.weights, level.form) for level in levels], levels[0].dtype)
    return [level.place for level in levels], copies
