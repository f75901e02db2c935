"""Timing work on a device, with a stand-in for CUDA that has two clocks, the host's and its own."""

from __future__ import annotations

import contextlib

import pytest
import torch
from timing import Way, level

from lasem_fast.backends import plain_torch, stopwatch
from lasem_fast.backends.fastest import fastest
from lasem_fast.backends.level_call import LevelCall

GPU = torch.device("cuda", 0)


class FakeCuda:
    """A device with one queue; the host runs ahead of it."""

    hertz = 1e9

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.host = self.done = 0.0
        self.sleeps: list[int] = []
        fake = self

        class Event:
            def __init__(self, enable_timing: bool) -> None:
                assert enable_timing

            def record(self) -> None:
                self.at = max(fake.host, fake.done)

            def query(self) -> bool:
                return fake.host >= self.at

            def synchronize(self) -> None:
                fake.host = max(fake.host, self.at)

            def elapsed_time(self, end: Event) -> float:
                return 1e3 * (end.at - self.at)

        monkeypatch.setattr(torch.cuda, "Event", Event)
        monkeypatch.setattr(torch.cuda, "_sleep", self.sleep)
        monkeypatch.setattr(torch.cuda, "synchronize", self.synchronize)
        monkeypatch.setattr(torch.cuda, "device", lambda device: contextlib.nullcontext())

    def sleep(self, cycles: int) -> None:
        self.sleeps.append(cycles)
        self.kernel(cycles / self.hertz)

    def synchronize(self) -> None:
        self.host = max(self.host, self.done)

    def kernel(self, seconds: float) -> None:
        self.done = max(self.host, self.done) + seconds

    def work(self, launches: int, python: float, kernels: float):
        """Work of some launches, by the host's seconds and the device's for each of them."""

        def run() -> None:
            for _ in range(launches):
                self.host += python
                self.kernel(kernels)

        return run


def test_the_host_does_not_count(monkeypatch):
    fake = FakeCuda(monkeypatch)
    seconds = stopwatch.watch(GPU)(fake.work(10, python=50e-6, kernels=5e-6))
    assert seconds == pytest.approx(50e-6)
    assert len(fake.sleeps) == 1


def test_the_sleep_grows_until_the_host_is_ahead_and_stays_so(monkeypatch):
    fake = FakeCuda(monkeypatch)
    timed = stopwatch.watch(GPU)
    work = fake.work(100, python=70e-6, kernels=1e-6)  # 7 ms of Python
    assert timed(work) == pytest.approx(100e-6)
    assert fake.sleeps == [2**21, 2**22, 2**23]
    assert timed(work) == pytest.approx(100e-6)
    assert fake.sleeps[3:] == [2**23]


def test_work_that_waits_for_the_device_is_timed_all_the_same(monkeypatch):
    fake = FakeCuda(monkeypatch)

    def work() -> None:
        fake.work(1, python=1e-6, kernels=3e-6)()
        fake.synchronize()
        fake.work(1, python=2e-6, kernels=3e-6)()

    assert stopwatch.watch(GPU)(work) == pytest.approx(3e-6 + 2e-6 + 3e-6)
    assert len(fake.sleeps) == 7


def test_slow_python_over_fast_kernels_beats_the_other_way_round(monkeypatch):
    fake = FakeCuda(monkeypatch)
    timed = stopwatch.watch(GPU)
    python_heavy = timed(fake.work(8, python=90e-6, kernels=4e-6))
    device_heavy = timed(fake.work(1, python=5e-6, kernels=60e-6))
    assert python_heavy < device_heavy


def test_the_fastest_level_is_the_fastest_on_the_device(monkeypatch):
    fake = FakeCuda(monkeypatch)
    monkeypatch.setattr(stopwatch, "now", lambda: fake.host)

    def way(*work: float) -> Way:
        def run(*arguments):
            fake.work(*work)()
            return plain_torch.run_level(*arguments)

        return Way(run)

    ways = {"little Python": way(1, 5e-6, 60e-6), "little device": way(8, 90e-6, 4e-6)}
    layer, x, rows, skip, _ = level()
    call = LevelCall(layer, x, rows, skip)
    assert fastest(ways, None, call, call.shape()).way == "little Python"  # the host's time
    monkeypatch.setattr(stopwatch, "watch", lambda device: stopwatch.DeviceWatch(GPU))
    assert fastest(ways, None, call, call.shape()).way == "little device"


def test_a_cpu_is_timed_by_the_wall_clock(monkeypatch):
    now = iter([5.0, 7.5])
    monkeypatch.setattr(stopwatch, "now", lambda: next(now))
    assert stopwatch.watch(torch.device("cpu"))(lambda: None) == 2.5
