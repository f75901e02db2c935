"""A launch that is made again asks Triton for nothing, and hands over what Triton would."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from triton.compiler import CompiledKernel

from bench import eager_host
from bench.cases import Case
from bench.idle_driver import idle_driver
from lasem_fast.backends.triton_level_op import level
from lasem_fast.kernels.launches import Launch
from lasem_fast.kernels.level_geometry import Geometry
from lasem_fast.kernels.level_rows import Rows
from lasem_fast.tools.builtin import NETS, Builtin, conv_stages, dense_head


class _Compiled(CompiledKernel):
    module = None  # nothing to be unloaded

    def __init__(self, launched):
        self.launched = launched

    def __getitem__(self, grid):
        return lambda *given: self.launched.append(("compiled", grid, given))


class _Kernel:
    """Notes how it is launched."""

    arg_names = ("x", "y", "count", "TWO", "ONE")

    def __init__(self):
        self.launched = []

    def __getitem__(self, grid):
        def launch(*given, **constants):
            self.launched.append(("looked up", grid, given, constants))
            return _Compiled(self.launched)

        return launch


@pytest.fixture
def kernel():
    return _Kernel()


def _launch(kernel):
    return Launch(kernel, (3, 2), (7,), ONE=1, TWO=2, num_warps=4)


def test_the_second_launch_is_not_looked_up(kernel):
    launch, x, y, z = _launch(kernel), torch.zeros(8), torch.zeros(8), torch.zeros(8)
    launch(x, y)
    launch(x, z)
    constants = {"ONE": 1, "TWO": 2, "num_warps": 4}
    assert kernel.launched == [
        ("looked up", (3, 2), (x, y, 7), constants),
        ("compiled", (3, 2, 1), (x, z, 7, 2, 1)),
    ]


@pytest.mark.parametrize("y", [torch.zeros(8, dtype=torch.float64), torch.zeros(8, device="meta")])
def test_tensors_of_another_kind_are_looked_up(y, kernel):
    launch, x = _launch(kernel), torch.zeros(8)
    launch(x, x)
    launch(x.to(y.device), y)
    launch(x, x)
    launch(x.to(y.device), y)
    assert [how for how, *_ in kernel.launched] == ["looked up"] * 2 + ["compiled"] * 2


def test_an_address_that_is_no_multiple_is_looked_up_every_time(kernel):
    launch, x = _launch(kernel), torch.zeros(9)
    for y in (x[1:], x, x[1:], x):
        launch(x, y)
    assert [how for how, *_ in kernel.launched] == ["looked up"] * 3 + ["compiled"]


def test_what_is_not_compiled_is_looked_up_every_time(kernel, monkeypatch):
    """In Triton's interpreter, and where launches are recorded."""
    monkeypatch.setattr("lasem_fast.kernels.launches.CompiledKernel", int)
    launch, x = _launch(kernel), torch.zeros(8)
    launch(x, x)
    launch(x, x)
    assert [how for how, *_ in kernel.launched] == ["looked up"] * 2


def _step(boxes: bool) -> None:
    """A level with all that there is, forward and backward."""
    rows = Rows((0, 1, 0, 1), (0, 0, 1, 1), 2, (0, 0, 1, 1), 2)
    x = torch.zeros(2, 3, 8, 8, 16, dtype=torch.bfloat16, requires_grad=True)
    weights = [torch.zeros(24, 16, 3, 3, requires_grad=True) for _ in "ab"]
    biases = [torch.zeros(24, requires_grad=True) for _ in "ab"]
    skip = torch.zeros(2, 3, 8, 8, 24, dtype=torch.bfloat16, requires_grad=True)
    geometry = Geometry(1, 1, 1, 1, 8, 8, 2, 0, 4, 4, 1, 1)
    y, carried = level(
        x, weights, biases, geometry, rows, dtype=torch.bfloat16, skip=skip, carry=True,
        boxes=boxes,
    )  # fmt: skip
    torch.autograd.backward([y, carried], [torch.ones_like(y), torch.ones_like(x)])


def _words(value):
    """An argument without its address."""
    if isinstance(value, torch.Tensor):
        return value.dtype, value.shape, value.stride()
    if dataclasses.is_dataclass(value):
        return [_words(getattr(value, field.name)) for field in dataclasses.fields(value)]
    return value


@pytest.mark.parametrize("boxes", [True, False])
def test_triton_gets_the_same_arguments(boxes, monkeypatch):
    launched = []

    def note(metadata, grid, given):
        launched.append((metadata.name, grid, [_words(value) for value in given]))

    with idle_driver(note):
        _step(boxes)
        looked_up = launched.copy()
        launched.clear()
        found = []
        monkeypatch.setattr(
            CompiledKernel, "__getitem__", _noting(found, CompiledKernel.__getitem__)
        )
        _step(boxes)
    assert len(looked_up) >= 3
    assert launched == looked_up
    assert len(found) == len(launched)


def test_the_hosts_work_for_launches_that_do_nothing(monkeypatch, capsys):
    net = Builtin(lambda: conv_stages(3, (8, 8), (3, 3), (1, 2)),
                  lambda classes: dense_head(128, (), classes), (3, 8, 8), 4)  # fmt: skip
    monkeypatch.setitem(NETS, "tiny", net)
    monkeypatch.setattr(eager_host, "_ON_GPU", [Case("tiny", 4, "bf16")])
    monkeypatch.setattr(eager_host, "problems", dict)
    eager_host.main(["--steps", "2", "--triton"])
    *name, took = capsys.readouterr().out.splitlines()[-1].split()
    assert name == ["tiny", "b4", "bf16", "cpu,", "triton"]
    assert float(took) > 0


def _noting(found, getitem):
    def noting(compiled, grid):
        found.append(grid)
        return getitem(compiled, grid)

    return noting
