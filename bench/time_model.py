"""What a compiled launch should take on a GPU: the largest of four bounds, and what follows.

For a launch of ``P`` programs of ``W`` warps, whose loop has ``I`` instructions and is passed ``n``
times, and which has ``A`` instructions in all:

- issue:  ceil(P / SMs) * W * (n * I + A - I) / (4 * clock): each multiprocessor issues four
  instructions a cycle, and the one with the most programs decides;
- tensor: FLOPs of the products as tiles do them, padding included, / peak;
- L2:     bytes of the operands' tiles, read again by every program, / L2 bandwidth;
- DRAM:   bytes of all tensors, each once, / memory bandwidth;
- adding: bytes of the parts that the last of a sum's programs adds up / what one multiprocessor
          reads;
- node:   what a node of a CUDA graph costs beside its work.

Assumed: no sum has to be made anew; every issue slot is used and all latency hidden; the four
overlap within a launch, and launches do not; both branches of a level are taken by every parent;
operators of PyTorch's own cost a node. So a bound is a bound from below, and a launch that takes
much longer is off.
"""

from __future__ import annotations

from math import prod
from typing import NamedTuple

import torch

from bench.compiling import Launch
from bench.sass import MachineCode
from lasem_fast.kernels.boxes import Box, Convolution, Taps, reads
from lasem_fast.kernels.parts import groups_of

_TILED = ("level_forward_kernel", "level_dgrad_kernel", "level_wgrad_kernel")
_BOXED = ("box_forward_kernel", "box_dgrad_kernel", "box_wgrad_kernel")


class Ceilings(NamedTuple):
    """A GPU. The defaults were read on an H200, but for clock, L2 bandwidth, read and node.

    Attributes:
        peak: TFLOP/s of bf16 matrix products; TF32 has half of it.
        fma: TFLOP/s of float32 without tensor cores.
        memory, l2: TB/s.
        read: bytes that one multiprocessor reads in a nanosecond, by the tiles' times on an H100.
        multiprocessors: how many.
        clock: GHz.
        node: microseconds.
    """

    peak: float = 788.0
    fma: float = 60.0
    memory: float = 4.3
    l2: float = 5.5
    read: float = 75.0
    multiprocessors: int = 132
    clock: float = 1.755
    node: float = 2.2


class Prediction(NamedTuple):
    """Microseconds of one launch, bound by bound, and its FLOPs."""

    flops: float
    issue: float
    tensor: float
    l2: float
    memory: float
    adding: float
    node: float

    @property
    def total(self) -> float:
        """The largest bound, adding up and the node."""
        return max(self.issue, self.tensor, self.l2, self.memory) + self.adding + self.node


def predict(launch: Launch, code: MachineCode, ceilings: Ceilings) -> Prediction:
    """What a launch should take."""
    if launch.arguments.get("IF_SPOILT"):  # it asks whether a sum has to be made anew, and ends
        return Prediction(0, 0, 0, 0, 0, 0, ceilings.node)
    programs, warps = launch.programs, launch.options.get("num_warps", 4)
    busiest = -(-programs // ceilings.multiprocessors)
    steps, flops, operands = _work(launch)
    issued = code.instructions
    if code.loop is not None and steps:
        # a pass may hold several steps of the source's loop
        passes = steps * flops / warps / code.loop.flops
        issued += max(0.0, passes - 1) * code.loop.instructions
    total_flops = programs * steps * flops
    peak = ceilings.peak
    if launch.arguments.get("PRECISION") == "tf32":
        peak /= 2
    elif launch.arguments.get("PRECISION") == "ieee" and _operand(launch).itemsize == 4:
        peak = ceilings.fma
    return Prediction(
        flops=total_flops,
        issue=busiest * warps * issued / (4e3 * ceilings.clock),
        tensor=total_flops / (1e6 * peak),
        l2=programs * steps * operands / (1e6 * ceilings.l2),
        memory=_bytes(launch) / (1e6 * ceilings.memory),
        adding=_added_up(launch) / (1e3 * ceilings.read),
        node=ceilings.node,
    )


def _operand(launch: Launch) -> torch.dtype:
    arguments = launch.arguments
    return next(arguments[name] for name in ("y", "dy", "x") if name in arguments).dtype


def _boxed_work(launch: Launch) -> tuple[float, float, float]:
    """As :func:`_work`, of kernels that read boxes of 16 bits."""
    name, a = launch.kernel.__name__, launch.arguments
    pixels, columns = a["IMAGES"] * a["BOX_H"] * a["BOX_W"], a["COLUMNS"]
    if name == "box_wgrad_kernel":
        taps, groups = a["TAPS"], a["KH"] * a["KW"] // a["TAPS"]
        of_row = _cdiv(a["samples"], a["IMAGES"]) * _met(launch)
        of_row *= _cdiv(a["CONV_H"], a["BOX_H"]) * _cdiv(a["CONV_W"], a["BOX_W"])
        steps = max(a["count0"], a["count1"]) * of_row / (launch.grid[2] // groups)
        operands = 2 * pixels * (taps * a["ROWS"] + columns)
        return steps, 2 * taps * a["ROWS"] * columns * pixels, operands
    depth = a["DEPTH"]
    steps = a["KH"] * a["KW"] * _met(launch)
    if name == "box_forward_kernel":
        steps *= _cdiv(a["C_IN"], depth) / a["PARTS"]
    else:
        steps *= a["BRANCHES"] * _cdiv(a["C_OUT"], depth)
    return steps, 2 * pixels * columns * depth, 2 * depth * (pixels + columns)


def _met(launch: Launch) -> float:
    """The share of the pairs of a box and a tap that meet more than padding."""
    a = launch.arguments
    if a.get("ALL_TAPS", a.get("ALL_BOXES")):
        return 1.0
    down, across = Taps(a["KH"], -a["PAD_H"], a["HEIGHT"]), Taps(a["KW"], -a["PAD_W"], a["WIDTH"])
    size, begin = (1, a["CONV_H"], a["CONV_W"]), 0
    if launch.kernel.__name__ == "box_dgrad_kernel":
        down = Taps(a["KH"], a["PAD_H"] - a["KH"] + 1, a["CONV_H"])
        across = Taps(a["KW"], a["PAD_W"] - a["KW"] + 1, a["CONV_W"])
        size = 1, a["HEIGHT"], a["WIDTH"]
    elif launch.kernel.__name__ == "box_forward_kernel":
        size, begin = (1, a["OUT_H"] * a["POOL"], a["OUT_W"] * a["POOL"]), -a["POOL_PAD"]
    box = Box(a["IMAGES"], a["BOX_H"], a["BOX_W"])
    met = reads(box, *size, convolution=Convolution(down, across, begin))
    return met / (prod(box.counts(*size)) * a["KH"] * a["KW"])


def _work(launch: Launch) -> tuple[float, float, float]:
    """Steps of a program, and FLOPs and operands' bytes of a step; zeros without a product."""
    name, a = launch.kernel.__name__, launch.arguments
    if name in _BOXED:
        return _boxed_work(launch)
    if name not in _TILED:
        return 0, 0, 0
    rows, columns, depth = a["ROWS"], a["COLUMNS"], a["DEPTH"]
    size = _operand(launch).itemsize
    if name == "level_forward_kernel":
        steps = a["POOL"] ** 2 * _cdiv(a["KH"] * a["KW"] * a["C_IN"], depth)
        sides = a["x"].element_size(), a["weight0"].element_size()
    elif name == "level_dgrad_kernel":
        taps = 1 if a["COVERS"] else a["KH"] * a["KW"]
        steps = a["BRANCHES"] * taps * _cdiv(a["C_OUT"], depth)
        sides = size + a["HAS_CODE"], a["weight0"].element_size()
    else:
        pixels = max(a["count0"], a["count1"]) * a["samples"] * a["CONV_H"] * a["CONV_W"]
        steps = _cdiv(_cdiv(pixels, launch.grid[2]), depth)
        sides = a["x"].element_size(), size + a["HAS_CODE"]
    return steps, 2 * rows * columns * depth, depth * (rows * sides[0] + columns * sides[1])


def _added_up(launch: Launch) -> int:
    """Bytes of the parts that the last of a sum's programs adds up."""
    name, a = launch.kernel.__name__, launch.arguments
    if name == "box_forward_kernel":
        parts, rows = a["PARTS"], a["IMAGES"] * a["BOX_H"] * a["BOX_W"]
    elif name == "box_wgrad_kernel":
        parts, rows = launch.grid[2] * a["TAPS"] // (a["KH"] * a["KW"]), a["ROWS"] * a["TAPS"]
    elif name == "level_wgrad_kernel":
        parts, rows = launch.grid[2], a["ROWS"]
    else:
        return 0
    if parts == 1:
        return 0
    read = a["GROUP"] + groups_of(parts) if a["GROUP"] else parts
    return 4 * read * rows * a["COLUMNS"]


def _bytes(launch: Launch) -> int:
    """Of all its tensors, each once."""
    if launch.kernel.__name__ == "many_copies_kernel":  # which finds its tensors in a table
        sizes = launch.arguments["of_weights"], launch.arguments["of_copies"]
        return launch.programs * launch.arguments["BLOCK"] * sum(t.element_size() for t in sizes)
    values = [getattr(value, "base", value) for value in launch.arguments.values()]
    tensors = [t for t in values if isinstance(t, torch.Tensor)]
    return sum({t.data_ptr(): t.numel() * t.element_size() for t in tensors}.values())


def _cdiv(a: int, b: int) -> int:
    return -(-a // b)
