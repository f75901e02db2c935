"""The state of a run in a file: written whole or not at all, read back to the very bit."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn

from lasem_fast.lifelong.task_data import Task

FORMAT = 1


def write_text(path: Path, text: str) -> None:
    """Writes a text file atomically; one writer at a time."""
    _replace(path, lambda beside: beside.write_text(text, encoding="utf-8"))


def write_state(path: Path, state: dict[str, Any]) -> None:
    """Writes a dict of tensors and plain values atomically; one writer at a time."""
    _replace(path, lambda beside: torch.save(state, beside))


def _replace(path: Path, write: Callable[[Path], object]) -> None:
    """Writes beside and renames, so that a reader finds the old file or the new one, complete.

    One name beside: what a killed process has left there the next one overwrites.
    """
    beside = path.with_name(f".{path.name}.new")
    try:
        write(beside)
        os.replace(beside, path)
    except BaseException:
        beside.unlink(missing_ok=True)
        raise


def read_state(path: Path, identity: str) -> dict[str, Any] | None:
    """What `write_state` wrote, or None where there is nothing yet.

    Raises:
        ValueError: the file cannot be read, or it belongs to a run with other arguments.
    """
    if not path.exists():
        return None
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
        found, version = state["identity"], state["format"]
    except Exception as error:  # what a damaged file raises depends on where it is damaged
        reason = str(error).partition("\n")[0]
        raise ValueError(
            f"folder: expected a saved state that can be read in {path}, got a damaged one "
            f"({reason}); remove it to start this run anew"
        ) from error
    if version != FORMAT:
        raise ValueError(f"folder: expected format {FORMAT} in {path}, got {version}")
    if found != identity:
        raise ValueError(
            f"folder: expected the state of a run with the same arguments in {path}, got "
            f"{_difference(json.loads(found), json.loads(identity))}"
        )
    return state


def _difference(saved: dict[str, Any], now: dict[str, Any]) -> str:
    names = [name for name in now if saved.get(name) != now[name]]
    return ", ".join(f"{name} {saved.get(name)!r} where it is now {now[name]!r}" for name in names)


def identity_of(tasks: list[Task], **arguments: Any) -> str:
    """The arguments of a run that its state depends on, as JSON; of the data a digest."""
    digest = hashlib.sha256()
    for task in tasks:
        for _, (x, y) in task.splits():
            for tensor in (x, y):
                digest.update(f"{tuple(tensor.shape)} {tensor.dtype}".encode())
                digest.update(tensor.detach().cpu().contiguous().view(torch.uint8).numpy())
    names = [task.name for task in tasks]
    return json.dumps({**arguments, "tasks": names, "data": digest.hexdigest()})


def module_state(module: nn.Module) -> dict[str, Any]:
    """Weights and buffers, and which of them are frozen and which modules in evaluation mode."""
    return {
        "weights": module.state_dict(),
        "frozen": [name for name, p in module.named_parameters() if not p.requires_grad],
        "evaluating": [name for name, part in module.named_modules() if not part.training],
    }


def load_module_state(module: nn.Module, state: dict[str, Any]) -> None:
    """Brings a module with the same tasks to what `module_state` gave."""
    module.load_state_dict(state["weights"])
    frozen, evaluating = set(state["frozen"]), set(state["evaluating"])
    for name, parameter in module.named_parameters():
        if parameter.requires_grad == (name in frozen):  # an integer one cannot be set
            parameter.requires_grad_(name not in frozen)
    for name, part in module.named_modules():
        part.training = name not in evaluating


def random_state(batches: torch.Generator, device: torch.device) -> dict[str, Any]:
    """Of PyTorch on the host and on the run's device, and of the order of mini-batches."""
    state = {"host": torch.get_rng_state(), "batches": batches.get_state()}
    if device.type == "cuda":
        state["device"] = torch.cuda.get_rng_state(device)
    return state


def load_random_state(
    state: dict[str, Any], batches: torch.Generator, device: torch.device
) -> None:
    torch.set_rng_state(state["host"])
    batches.set_state(state["batches"])
    if device.type == "cuda":
        torch.cuda.set_rng_state(state["device"], device)
