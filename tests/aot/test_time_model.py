"""The time model against numbers worked by hand, and its command without compiling anything."""

from __future__ import annotations

import json
import math

import box_launches
import level_launches
import pytest

from bench import model
from bench.cases import Case
from bench.sass import Loop, MachineCode
from bench.time_model import Ceilings, predict

# 10 SMs of 1 GHz; 1 TFLOP/s, 1 TB/s and 2 TB/s are 1e6, 1e6 and 2e6 a microsecond.
SMALL = Ceilings(peak=1, fma=0.5, memory=1, l2=2, read=50, multiprocessors=10, clock=1, node=3)


def _launch(name: str):
    return level_launches.launches()[name]


def test_forward():
    """x [8, 10, 32, 32, 64], both branches, 3x3 to 64 channels, pool 2: 16 * 10 * 256 pixels."""
    launch = _launch("level_forward/bf16/64x32x64x4x4/pool2")
    assert launch.grid == (640, 2)
    found = predict(launch, MachineCode(500, Loop(100, 2 * 64 * 32 * 64 // 4), frozenset()), SMALL)
    steps = 4 * 9  # window positions, taps of 64 channels
    assert found.flops == 1280 * steps * 2 * 64 * 32 * 64
    assert found.tensor == pytest.approx(found.flops / 1e6)
    # 128 programs of 4 warps on each of 10 multiprocessors, 4 instructions a cycle
    assert found.issue == pytest.approx(128 * 4 * (500 + (steps - 1) * 100) / 4 / 1e3)
    # bf16 pixels and float32 master weights
    assert found.l2 == pytest.approx(1280 * steps * 64 * (64 * 2 + 32 * 4) / 2e6)
    assert found.total == max(found.issue, found.tensor, found.l2, found.memory) + 3


def test_weight_gradient_passes_of_two_steps():
    launch = _launch("level_wgrad/bf16/64x64x32x4x5/pool2")
    splits = launch.grid[2]
    steps = math.ceil(math.ceil(8 * 10 * 32 * 32 / splits) / 32)
    loop = Loop(300, 2 * (2 * 64 * 64 * 32 // 4))
    found = predict(launch, MachineCode(1000, loop, frozenset()), SMALL)
    programs = 9 * 2 * splits
    assert found.flops == programs * steps * 2 * 64 * 64 * 32
    busiest = -(-programs // 10)
    assert found.issue == pytest.approx(busiest * 4 * (1000 + (steps / 2 - 1) * 300) / 4e3)
    assert found.l2 == pytest.approx(programs * steps * 32 * (64 * 2 + 64 * 3) / 2e6)


def test_input_gradient():
    launch = _launch("level_dgrad/bf16/64x64x64x4x3/pool2")
    found = predict(launch, MachineCode(100, None, frozenset()), SMALL)
    steps = 2 * 9  # branches, taps
    assert found.flops == launch.programs * steps * 2 * 64 * 64 * 64
    assert found.issue == pytest.approx(-(-launch.programs // 10) * 4 * 100 / 4e3)


def test_precision():
    code = MachineCode(1, None, frozenset())
    tf32 = predict(_launch("level_forward/tf32/64x32x64x4x4/pool2"), code, SMALL)
    assert tf32.tensor == pytest.approx(tf32.flops / 0.5e6)
    fp32 = predict(_launch("level_forward/fp32/32x32x16x4x2/pool2"), code, SMALL)
    assert fp32.tensor == pytest.approx(fp32.flops / 0.5e6)


@pytest.mark.parametrize("kernel", ["box_forward", "box_dgrad", "box_wgrad"])
def test_boxes_of_one_pixel_meet_some_taps(kernel):
    """Of 2 x 2 images 16 of the 36 pairs of a pixel and a tap; 64 channels, 8 parents of 128."""
    launches = box_launches.launches()
    launch = next(v for k, v in launches.items() if k.startswith(kernel) and k.endswith("/small"))
    found = predict(launch, MachineCode(500, None, frozenset()), SMALL)
    assert found.flops == pytest.approx(2 * 16 * 128 * 16 * 64 * 64 * _filled(launch))


def test_a_part_takes_its_share_of_the_steps():
    """160 images of 4096 values in blocks of 64, to 64 outputs, in 16 parts."""
    launch = box_launches.launches()["box_forward/64x1x1x64x128/in_parts"]
    found = predict(launch, MachineCode(500, None, frozenset()), SMALL)
    assert found.flops == 2 * 3 * 64 * 64 * 4096
    # the last of four parts, and of four such groups
    assert found.adding == pytest.approx((4 + 4) * 4 * 64 * 64 / 50e3)


def test_a_sum_that_is_not_made_anew_costs_a_node():
    launch = box_launches.launches()["level_wgrad/mended"]
    assert predict(launch, MachineCode(500, None, frozenset()), SMALL).total == 3


def _filled(launch) -> float:
    """How many times the channels a tile has."""
    a = launch.arguments
    sides = (a["COLUMNS"],) if "DEPTH" in a else (a["ROWS"], a["COLUMNS"])
    return math.prod(side / 64 for side in sides)


def test_the_command(monkeypatch, tmp_path, capsys):
    code = MachineCode(500, Loop(100, 2**15), frozenset())
    monkeypatch.setattr(model, "machine_code", lambda form, capability: code)
    case = Case("cifar-4", 2, "bf16", "cuda")
    monkeypatch.setattr(model, "gpu", lambda device: [case])
    model.main(["--kernels"])
    *lines, last = capsys.readouterr().out.splitlines()
    assert f"{len(lines) - 1} launches" in last
    counts = {"level_forward": 5, "level_dgrad": 4, "score_linear": 1, "weigh_linear": 1}
    for name, count in counts.items():  # the last layer belongs to the scores
        assert sum(line.startswith(f"{name} ") for line in lines) == count
    assert "took" not in last
    entry = {"row": case.id, "column": "lasem_fast triton, captured", "seconds": [3e-4, 2e-4]}
    names = [line.split()[0] + "_kernel" for line in lines[1:]]
    kernels = [["Memcpy", 9.0], *([name.replace("configurations_kernel", "configurations"), 1.25]
               for name in names)]  # fmt: skip
    files = {"bench.json": {"benchmarks": [{"extra_info": entry}]},
             "kernels.json": {case.id: {"gathering": kernels}}}  # fmt: skip
    for name, content in files.items():
        (tmp_path / name).write_text(json.dumps(content))
    paths = ["--results", str(tmp_path / "bench.json"),
             "--kernel-times", str(tmp_path / "kernels.json")]  # fmt: skip
    model.main(["--kernels", *paths, "--row", "cifar"])
    *lines, last = capsys.readouterr().out.splitlines()
    assert all(line.endswith(" 1.25") for line in lines[1:])
    assert "took 200 us" in last
    model.main(["--row", "nothing"])
    assert not capsys.readouterr().out
