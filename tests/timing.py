"""Ways to evaluate a level that take as long as a test says."""

from __future__ import annotations

import torch
from torch import nn

from lasem_fast import fastest
from lasem_fast.backends import plain_torch
from lasem_fast.transfer import Branch
from lasem_fast.ways import OneOf


class Clock:
    """Time that only the ways below let pass; ``calls`` lists their names in order."""

    def __init__(self, monkeypatch):
        self.now, self.calls = 0.0, []
        monkeypatch.setattr(fastest, "_now", lambda device: self.now)

    def way(self, name, seconds, operation=plain_torch.wide_level):
        def timed(branches, h, rows):
            self.calls.append(name)
            self.now += seconds
            return operation(branches, h, rows)

        return timed

    def slow_and_fast(self, **others):
        """One of two ways, whose rule is the slow one; and others of so many seconds."""
        ways = {"slow": self.way("slow", 3.0), "fast": self.way("fast", 1.0)}
        ways |= {name: self.way(name, seconds) for name, seconds in others.items()}
        return OneOf(ways, "cpu", rule=(ways["slow"],))


def stage():
    return nn.Sequential(nn.Conv2d(2, 3, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2))


def branches():
    return [Branch(stage()), Branch(stage())]


def level(samples=4, side=6, **options):
    """Arguments of a level operation: two rows through two branches."""
    return branches(), torch.randn(2 * samples, 2, side, side, **options), 2
