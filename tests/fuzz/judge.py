"""What is asked of a refusal: its type, its message, and that nothing changed."""

from __future__ import annotations

import random
import re
import warnings
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from . import values, world
from .calls import CALLS, Call
from .legal import is_legal

KINDS = (TypeError, ValueError, RuntimeError, NotImplementedError)
NAMES_ARGUMENT = re.compile(r"[\w\]\)'\"]+( [\w'\"=.\[\]()]+){0,6}: expected .*got", re.DOTALL)
# Messages of other forms that were read and found good.
REVIEWED = [
    re.compile(pattern)
    for pattern in (
        r"\w+\(\) (missing|takes|got an unexpected)",  # Python's, about the signature
        r"^[\w, ]+ must (be|have) ",
        r"^Error\(s\) in loading state_dict for \w+:",  # PyTorch's, with the keys
        r"^optimizer got an empty parameter list$",
        r"^task '.*' \(\d+ of \d+\) failed after",  # with the error of the user's own function
        r"^Module \[\w+\] is missing the required \"forward\" function",
        r"^Inplace update to inference tensor outside InferenceMode",
        r"^unsupported operation: more than one element of the written-to tensor",
        r"^Inference tensors cannot be saved for backward",
        r"^Expected state_dict to be dict-like, got",
        r"^optimizer can only optimize Tensors, but one of the params is",
        r"^capture: the step of task .* cannot be captured: ",
    )
]
SOURCE_FILE = re.compile(r"\.(cpp|cc|h|cu|py)\b(:\d+|\")")


_WORLDS = world.Worlds()


@dataclass
class Verdict:
    """One call and what came of it."""

    seed: int
    call: str
    broken: dict[str, str]
    outcome: str  # "refused", "legal", "raw", "changed", "accepted"
    detail: str = ""

    @property
    def is_bad(self) -> bool:
        return self.outcome in ("raw", "changed", "accepted")

    def __str__(self) -> str:
        arguments = ", ".join(f"{name}={value}" for name, value in self.broken.items())
        return f"{self.outcome:8} seed {self.seed}: {self.call}({arguments}): {self.detail}"


@dataclass
class Report:
    """All calls."""

    verdicts: list[Verdict] = field(default_factory=list)

    @property
    def bad(self) -> list[Verdict]:
        return [v for v in self.verdicts if v.is_bad]

    def figures(self) -> str:
        count = Counter(v.outcome for v in self.verdicts)
        return (
            f"{len(self.verdicts)} calls: {count['refused'] + count['changed'] + count['raw']} "
            f"refused, {count['legal']} legal, {count['raw']} raw messages, {count['changed']} "
            f"changes, {count['accepted']} accepted that are not known to be legal"
        )


def one(seed: int, only: Sequence[str] | None = None) -> Verdict:
    """Draws a call, makes it and judges it. Everything depends on ``seed`` alone."""
    pick = random.Random(seed)
    entry = CALLS[pick.choice(list(only or CALLS))]
    number, there = _WORLDS.draw(pick)
    torch.manual_seed(seed)
    arguments = {name: make(there) for name, make in entry.good.items()}
    broken = {}
    for name in pick.sample(list(arguments), min(len(arguments), pick.choice([1, 1, 1, 2]))):
        broken[name], arguments[name] = values.broken(pick, arguments[name])
    with warnings.catch_warnings(), torch.random.fork_rng(devices=[]):
        warnings.simplefilter("ignore")
        verdict = _judged(seed, entry, there, arguments, broken)
    _WORLDS.leave(number)
    return verdict


def _judged(
    seed: int, entry: Call, there: world.World, arguments: dict[str, Any], broken: dict[str, str]
) -> Verdict:
    def verdict(outcome: str, detail: str = "") -> Verdict:
        return Verdict(
            seed, entry.name, broken, outcome, " ".join(detail.split())[:300].replace("\0", "\\0")
        )

    if entry.setup is not None:
        try:
            entry.setup(there, **arguments)
        except KINDS as error:
            return verdict(*_of_message(error))
    before, draws = world.picture(there), torch.get_rng_state()
    try:
        entry.run(there, **arguments)
    except Exception as error:
        outcome, detail = _of_message(error)
        drew = [] if torch.equal(draws, torch.get_rng_state()) else ["torch random state"]
        changed = drew + world.differences(before, world.picture(there))
        if changed and outcome == "refused":
            return verdict("changed", f"{changed[:4]} by {detail}")
        return verdict(outcome, detail + (f" AND CHANGED {changed[:4]}" if changed else ""))
    if all(is_legal(entry.name, name, value) for name, value in broken.items()):
        return verdict("legal")
    return verdict("accepted")


def _of_message(error: Exception) -> tuple[str, str]:
    message = str(error)
    shown = f"{type(error).__name__}: {message}"
    # IndexError is what Python asks of a sequence
    known = isinstance(error, (*KINDS, IndexError)) and not isinstance(error, RecursionError)
    if not known or (isinstance(error, IndexError) and not message.startswith("row: expected")):
        return "raw", shown
    if SOURCE_FILE.search(message):
        return "raw", f"names a source file: {shown}"
    if NAMES_ARGUMENT.search(message) or any(p.search(message) for p in REVIEWED):
        return "refused", shown
    return "raw", shown


def many(calls: int, seed: int = 0, only: Sequence[str] | None = None) -> Report:
    """Makes ``calls`` calls."""
    return Report([one(seed + i, only) for i in range(calls)])
