"""A module's forward as a graph of calls, found by running its code on symbols.

Nothing is taken for granted that may be another thing at the next call: the code runs with
stand-ins for the module and for its global names, which give submodules, plain settings and the
functions that are asked for by name, and refuse everything else. What was read is noted, so that
one can see whether it is still the same. Other threads see nothing of it
(``torch.fx.symbolic_trace`` patches ``nn.Module`` for all of them meanwhile).
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Collection, Iterator, Mapping
from types import FunctionType, ModuleType
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import fx, nn
from torch.fx.proxy import GraphAppendingTracer

from lasem_fast.networks.layers import is_random


class Unreadable(BaseException):
    """Why a forward cannot be read; no Exception, so that no code that is read catches it.

    Attributes:
        known: what was read before, on which the refusal depends at least.
    """

    known: tuple[Known, ...] = ()


class Known(NamedTuple):
    """Something that was read, and what it was.

    Attributes:
        where: a namespace, or a class.
        name: of the value in it.
        value: what was there; :data:`NOTHING` where there was nothing.
    """

    where: Mapping[str, Any] | type
    name: str
    value: Any

    def holds(self) -> bool:
        """Whether it is still what it was."""
        where = self.where
        if isinstance(where, type):
            found = getattr(where, self.name, NOTHING)
        else:
            found = where.get(self.name, NOTHING)
        value = self.value
        return found is value or (type(found) is type(value) and is_plain(value) and found == value)


class Reading(NamedTuple):
    """A forward's graph and what it depends on besides the modules' children and modes."""

    graph: fx.Graph
    known: tuple[Known, ...]


NOTHING = object()
_PLAIN = (bool, int, float, str, type(None))
_LOOKED_UP = ("__getattr__", "__getattribute__", "named_modules")
_BUILTINS = {f.__name__: f for f in (bool, enumerate, int, len, range, reversed, tuple, zip)}
_NAMESPACES = (torch, torch.nn, F, operator)


def is_plain(value: Any) -> bool:
    """Whether a value is a number, a string, None, or a tuple of such."""
    if type(value) is tuple:
        return all(map(is_plain, value))
    return type(value) in _PLAIN


def is_torchs(module: nn.Module) -> bool:
    """Whether a module's type is PyTorch's own."""
    return type(module).__module__.startswith("torch.nn.")


def read(module: nn.Module, functions: Collection[Any]) -> Reading:
    """What ``module(h)`` calls, as a graph with one placeholder.

    Args:
        module: whose children that are PyTorch's own layers become ``call_module`` nodes.
        functions: those that may be called; others are refused.

    Raises:
        Unreadable: its forward does anything that could be something else at another time.
    """
    reader = _Reader(functions)
    graph = reader.tracer.graph
    h = fx.Proxy(graph.placeholder("h"), reader.tracer)
    try:
        try:
            out = reader.call(module, "", (h,), {})
            graph.output(reader.tracer.create_arg(out))
        except Exception as error:  # whatever code does with symbols
            reader.refuse(f"its forward cannot be traced ({type(error).__name__})")
        if reader.refusal is not None:  # somebody caught it
            reader.refuse("")
    except Unreadable as reason:
        reason.known = tuple(reader.known)
        raise
    return Reading(graph, tuple(reader.known))


class _Reader:
    def __init__(self, functions: Collection[Any]) -> None:
        self.functions = functions
        self.tracer = GraphAppendingTracer(fx.Graph())
        self.known: list[Known] = []
        self.refusal: str | None = None

    def refuse(self, reason: str) -> None:
        if self.refusal is None:
            self.refusal = reason
        raise Unreadable(self.refusal)

    def note(self, where: Mapping[str, Any] | type, name: str, value: Any) -> Any:
        self.known.append(Known(where, name, value))
        return value

    def call(self, module: nn.Module, path: str, args: tuple, kwargs: dict[str, Any]) -> Any:
        """What calling a module gives."""
        kind = type(module)
        if kind.__call__ is not nn.Module.__call__:
            self.refuse(f"{kind.__name__} has a __call__ of its own")
        if is_torchs(module) and kind is not nn.Sequential:
            if kwargs or len(args) != 1 or not isinstance(args[0], fx.Proxy):
                self.refuse(f"it uses {kind.__name__} in a way that is not looked into")
            return self.tracer.create_proxy("call_module", path, args, {})
        if any(getattr(kind, name) is not getattr(nn.Module, name) for name in _LOOKED_UP):
            self.refuse(f"{kind.__name__} looks its attributes or layers up in a way of its own")
        if is_random(module) and module.training:
            self.refuse(f"{kind.__name__} draws random numbers in training mode")
        self.note(kind, "forward", kind.forward)
        if kind.forward is nn.Sequential.forward and not kwargs:
            (h,) = args
            for name, child in module._modules.items():
                h = self.call(child, _inner(path, name), (h,), {})
            return h
        return self.run(kind.forward, module, path, args, kwargs)

    def run(
        self, function: Any, module: nn.Module, path: str, args: tuple, kwargs: dict[str, Any]
    ) -> Any:
        """Runs a method's code where nothing but what is known can be reached."""
        if type(function) is not FunctionType or function.__closure__ is not None:
            self.refuse(f"{type(module).__name__} has a forward that is decorated or uses super()")
        defaults = function.__defaults__ or (), *(function.__kwdefaults__ or {}).values()
        if not all(map(is_plain, defaults)):
            self.refuse(f"a default of the forward of {type(module).__name__} may change")
        names = self._names(function)
        before = dict(names)
        code = FunctionType(
            function.__code__, names, function.__name__, function.__defaults__, None
        )
        code.__kwdefaults__ = function.__kwdefaults__
        try:
            out = code(_StandIn(self, module, path), *args, **kwargs)
        except NameError as error:
            self.refuse(f"its forward uses {error.name!r}, which is not looked into")
        if names != before:
            self.refuse("its forward changes global names")
        return out

    def _names(self, function: FunctionType) -> dict[str, Any]:
        """The global names that a function may use: namespaces, functions and plain values."""
        names: dict[str, Any] = {"__builtins__": _BUILTINS}
        for name in _names_in(function.__code__):
            value = function.__globals__.get(name, NOTHING)
            if value is NOTHING:
                continue
            if any(value is space for space in _NAMESPACES):
                names[name] = _Namespace(self, value)
            elif is_plain(value) or self.may_call(value):
                names[name] = value
            else:
                continue
            self.note(function.__globals__, name, value)
        return names

    def may_call(self, value: Any) -> bool:
        try:
            return value in self.functions
        except TypeError:  # it has no hash
            return False

    def attribute(self, module: nn.Module, path: str, name: str) -> Any:
        """What a module's attribute stands for, found in Python's and nn.Module's order."""
        own, kind = vars(module), type(module)
        of_kind = next((vars(c)[name] for c in kind.__mro__ if name in vars(c)), NOTHING)
        if hasattr(type(of_kind), "__set__"):
            self.refuse(f"its forward reads {name!r}, which is computed")
        if name in own:
            if not is_plain(own[name]):
                self.refuse(f"its forward reads {name!r}, which may change")
            return self.note(own, name, own[name])
        if of_kind is not NOTHING:
            self.note(own, name, NOTHING)  # nobody puts another one before it
            self.note(kind, name, getattr(kind, name))
            if is_plain(of_kind):
                return of_kind
            if type(of_kind) is FunctionType and not of_kind.__module__.startswith("torch."):
                return lambda *args, **kwargs: self.run(of_kind, module, path, args, kwargs)
            self.refuse(f"its forward reads {name!r}, which is not looked into")
        if name not in own["_modules"] or name in own["_parameters"] or name in own["_buffers"]:
            self.refuse(f"its forward reads {name!r}")
        child = own["_modules"][name]
        return None if child is None else _StandIn(self, child, _inner(path, name))


class _StandIn:
    """A module in code that is read: its attributes, its call, and its children in a row."""

    def __init__(self, reader: _Reader, module: nn.Module, path: str) -> None:
        object.__setattr__(self, "_it", (reader, module, path))

    def __getattribute__(self, name: str) -> Any:
        reader, module, path = _it(self)
        return reader.attribute(module, path, name)

    def __setattr__(self, name: str, value: Any) -> None:
        reader, module, _ = _it(self)
        reader.refuse(f"its forward changes attributes of {type(module).__name__}")

    def __delattr__(self, name: str) -> None:
        setattr(self, name, None)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        reader, module, path = _it(self)
        return reader.call(module, path, args, kwargs)

    def __iter__(self) -> Iterator[Any]:
        return iter(_in_a_row(self))

    def __reversed__(self) -> Iterator[Any]:
        return reversed(_in_a_row(self))

    def __len__(self) -> int:
        return len(_in_a_row(self))

    def __bool__(self) -> bool:
        _, module, _ = _it(self)
        return bool(module)

    def __getitem__(self, index: Any) -> Any:
        reader, module, path = _it(self)
        if type(module) is nn.ModuleDict:
            return reader.attribute(module, path, index)
        return _in_a_row(self)[index]


_it: Callable[[_StandIn], tuple[_Reader, nn.Module, str]]
_it = lambda stand_in: object.__getattribute__(stand_in, "_it")  # noqa: E731


def _in_a_row(stand_in: _StandIn) -> list[Any]:
    reader, module, path = _it(stand_in)
    kind = type(module)
    if not any(
        isinstance(module, known) and all(getattr(kind, n) is getattr(known, n) for n in _ROW)
        for known in (nn.ModuleList, nn.Sequential)
    ):
        reader.refuse(f"it goes through a {kind.__name__}")
    return [reader.attribute(module, path, name) for name in module._modules]


_ROW = ("__iter__", "__len__", "__getitem__")


class _Namespace:
    """``torch`` or a part of it in code that is read: the functions that may be called."""

    def __init__(self, reader: _Reader, module: ModuleType) -> None:
        self._reader, self._module = reader, module

    def __getattr__(self, name: str) -> Any:
        value = getattr(self._module, name, NOTHING)
        if any(value is space for space in _NAMESPACES):
            return _Namespace(self._reader, value)
        if not self._reader.may_call(value):
            self._reader.refuse(f"it uses {name}, which no kernel has")
        return value


def _names_in(code: Any) -> set[str]:
    """The names in some code and in the functions inside it."""
    inner = (c for c in code.co_consts if isinstance(c, type(code)))
    return set(code.co_names).union(*map(_names_in, inner))


def _inner(path: str, name: str) -> str:
    return f"{path}.{name}" if path else name
