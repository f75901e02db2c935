"""What a state dict holds beside weights, as a tensor, and loading that changes all or nothing."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn


def packed(state: dict[str, Any]) -> Tensor:
    """A JSON-able dict as a tensor of its UTF-8 bytes, uint8 ``[n]``.

    ``safetensors`` and the libraries that build on it save tensors and nothing else.
    """
    return torch.frombuffer(bytearray(json.dumps(state).encode()), dtype=torch.uint8)


def unpacked(state: Any, *keys: str) -> dict[str, Any]:
    """The dict that was :func:`packed`; a dict, as former versions saved it, is taken as it is.

    Args:
        state: a tensor or a dict.
        keys: what has to be in it.

    Raises:
        TypeError, ValueError: neither of them.
    """
    found = state if isinstance(state, dict) else _decoded(state)
    missing = [key for key in keys if key not in found]
    if missing:
        raise ValueError(
            f"state_dict: expected an extra state with {list(keys)}, got none of {missing}; it is "
            f"not one of this kind of module"
        )
    return found


def _decoded(state: Any) -> dict[str, Any]:
    if not isinstance(state, Tensor) or state.is_nested:
        raise TypeError(
            f"state_dict: expected the extra state as a uint8 tensor, got {type(state).__name__}"
        )
    try:
        found = json.loads(bytes(state.cpu().tolist()))
    except (TypeError, ValueError, RuntimeError) as error:  # the last of tensors without values
        raise ValueError(
            f"state_dict: expected the extra state as UTF-8 JSON in a uint8 tensor, got "
            f"{state.dtype} of shape {list(state.shape)} that is none ({error})"
        ) from error
    if not isinstance(found, dict):
        raise ValueError(f"state_dict: expected a dict as extra state, got {found!r}")
    return found


def lasting() -> AbstractContextManager:
    """Where tensors are made that later calls may write to, whatever mode this call is in."""
    if not torch.compiler.is_compiling() and torch.is_inference_mode_enabled():
        return torch.inference_mode(False)
    return nullcontext()


@contextmanager
def all_or_nothing(module: nn.Module) -> Iterator[None]:
    """Gives a module back its parts, tensors, values and gradients, if the block raises.

    Holds a copy of all values meanwhile.
    """
    inside = list(_inside(module))
    held = [_Held(part) for part in inside]
    tensors = {id(t): t for part in inside for t in _own_tensors(part)}
    values = [(t, t.data, t.detach().clone(), t.grad) for t in tensors.values()]
    random_state = torch.get_rng_state()
    try:
        yield
    except BaseException:
        torch.set_rng_state(random_state)
        for part in held:
            part.put_back()
        with torch.no_grad():
            for tensor, data, value, grad in values:
                tensor.data = data
                tensor.copy_(value)
                tensor.grad = grad
        raise


class _Held:
    """The attributes of one module; containers among them by what they held."""

    def __init__(self, module: nn.Module) -> None:
        self.module = module
        self.attributes = dict(module.__dict__)
        self.contents = [
            (value, value.copy())
            for value in self.attributes.values()
            if isinstance(value, (dict, set, list))
        ]

    def put_back(self) -> None:
        self.module.__dict__.clear()
        self.module.__dict__.update(self.attributes)
        for container, content in self.contents:
            container.clear()  # in place: handles of hooks refer to the container
            (container.extend if isinstance(container, list) else container.update)(content)


def _inside(module: nn.Module) -> Iterator[nn.Module]:
    """The module and all inside it, unlisted ones as well; one may come twice."""
    yield module
    for child in module.children():
        yield from _inside(child)


def _own_tensors(module: nn.Module) -> list[Tensor]:
    return [t for t in (*module._parameters.values(), *module._buffers.values()) if t is not None]
