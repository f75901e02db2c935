"""Ways to run a layer on a level's rows that take as long as a test says."""

from __future__ import annotations

import torch
from torch import nn

from lasem_fast.backends import plain_torch, stopwatch
from lasem_fast.backends.operations import Layer
from lasem_fast.backends.ways import OneOf
from lasem_fast.levels.plan import Level
from lasem_fast.levels.relu_and_pool import Pool


class Way:
    """A level operation that is a function, or refuses with a reason."""

    carries = False

    def __init__(self, run, reason=""):
        self.run, self.reason = run, reason

    def why_not(self, layer, x):
        return self.reason

    def __call__(self, layer, x, level, skip, liveness, carry=False):
        return self.run(layer, x, level, skip)


class Clock:
    """Time that only the ways below let pass; ``calls`` lists their names in order."""

    def __init__(self, monkeypatch):
        self.now, self.calls = 0.0, []
        monkeypatch.setattr(stopwatch, "now", lambda: self.now)

    def way(self, name, seconds, operation=plain_torch.run_level):
        def timed(layer, x, level, skip):
            self.calls.append(name)
            self.now += seconds
            return operation(layer, x, level, skip)

        return Way(timed)

    def slow_and_fast(self, **others):
        """One of two ways, whose rule is the slow one; and others of so many seconds."""
        ways = {"slow": self.way("slow", 3.0), "fast": self.way("fast", 1.0)}
        ways |= {name: self.way(name, seconds) for name, seconds in others.items()}
        return OneOf(ways, "cpu")


def stage():
    return nn.Sequential(nn.Conv2d(2, 3, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2))


def level(samples=4, side=6, **options):
    """Arguments of a level operation: two rows through two branches."""
    cores = [nn.Conv2d(2, 3, 3, padding=1) for _ in range(2)]
    layer = Layer(
        cores[0], [c.weight for c in cores], [c.bias for c in cores],
        flatten=False, relu=True, relu_after=False, pool=Pool(2),
    )  # fmt: skip
    x = torch.randn(2, samples, side, side, 2, **options)
    return layer, x, Level((0, 0, 1, 1), (0, 1, 0, 1), 2), None, None
