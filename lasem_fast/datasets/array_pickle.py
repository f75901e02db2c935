"""Reads a pickle that holds arrays of numbers, text, lists and dicts, and nothing else.

Unpickling calls whatever the file names. Here it may name what NumPy's arrays are pickled with,
and gets stand-ins that only keep and check what they are given: neither code nor NumPy's own
unpickling is reached.
"""

from __future__ import annotations

import io
import math
import pickle
from collections.abc import Callable
from typing import Any

import numpy as np

_DTYPES = ("u1", "i1", "i2", "i4", "i8", "u2", "u4", "u8", "f4", "f8")


def load_arrays(content: bytes) -> Any:
    """The object in the pickle; text of Python 2 becomes ``str`` (Latin-1).

    Raises:
        ValueError: the pickle is truncated or damaged, or it names anything else.
    """
    try:
        return _plain(_Unpickler(io.BytesIO(content), encoding="latin1").load())
    except MemoryError as error:
        raise ValueError("it claims to hold more than fits into memory") from error
    except Exception as error:  # damaged pickles raise almost anything
        raise ValueError(f"not a pickle of arrays, text, lists and dicts ({error})") from error


class _DType:
    """Stands for ``numpy.dtype``."""

    def __init__(self, code: str, *_: Any) -> None:
        if code not in _DTYPES:
            raise ValueError(f"arrays of dtype {code!r} are not expected here")
        self.value = np.dtype(code)

    def __setstate__(self, state: tuple[Any, ...]) -> None:
        order = state[1]
        if order not in ("<", ">", "|", "="):
            raise ValueError(f"unknown byte order {order!r}")
        self.value = self.value.newbyteorder(order)


class _Array:
    """Stands for an array that is filled after it was made."""

    value: np.ndarray

    def __setstate__(self, state: tuple[Any, ...]) -> None:
        _, shape, dtype, fortran, content = state
        if isinstance(content, str):
            content = content.encode("latin1")
        if not isinstance(dtype, _DType) or not isinstance(content, bytes):
            raise ValueError("an array of objects is not expected here")
        shape = tuple(int(size) for size in shape)
        if len(content) != math.prod(shape) * dtype.value.itemsize:
            raise ValueError(f"{len(content)} bytes for an array of shape {shape}")
        flat = np.frombuffer(content, dtype.value)
        self.value = flat.reshape(shape, order="F" if fortran else "C")


def _encoded(text: str, encoding: str) -> bytes:
    """Stands for ``_codecs.encode``, with which Python 3 writes bytes for Python 2."""
    if encoding != "latin1":
        raise ValueError(f"text in {encoding!r} is not expected here")
    return text.encode("latin1")


def _refused(*_: Any) -> None:
    """Stands for ``numpy.ndarray``, which is passed on and never called."""
    raise ValueError("an array that is made in an unusual way is not expected here")


class _StandIn:
    """A function that a pickle can call, and that it cannot write to."""

    __slots__ = ("_function",)

    def __init__(self, function: Callable[..., Any]) -> None:
        self._function = function

    def __call__(self, *args: Any) -> Any:
        return self._function(*args)

    def __setstate__(self, state: Any) -> None:
        raise ValueError("a function with a state is not expected here")


_STAND_INS = {
    ("numpy.core.multiarray", "_reconstruct"): _StandIn(lambda *_: _Array()),
    ("numpy._core.multiarray", "_reconstruct"): _StandIn(lambda *_: _Array()),
    ("numpy", "ndarray"): _StandIn(_refused),
    ("numpy", "dtype"): _StandIn(_DType),
    ("_codecs", "encode"): _StandIn(_encoded),
}


class _Unpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in _STAND_INS:
            raise ValueError(f"it names {module}.{name}")
        return _STAND_INS[module, name]


def _plain(item: Any) -> Any:
    """The same with arrays for stand-ins; keys are text."""
    if isinstance(item, _Array):
        return item.value
    if isinstance(item, dict):
        return {_text(key): _plain(value) for key, value in item.items()}
    if isinstance(item, (list, tuple)):
        return [_plain(value) for value in item]
    if item is None or isinstance(item, (bool, int, float, str, bytes)):
        return item
    raise ValueError(f"a {type(item).__name__} is not expected here")


def _text(key: Any) -> Any:
    return key.decode("latin1") if isinstance(key, bytes) else key
