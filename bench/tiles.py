"""``python -m bench.tiles``: every tile of the level kernels against float64, on the device itself.

One level of 2 parents through both branches, forward and backward, for every tile,
dtype, pool and number of channels. Outputs are poisoned beforehand (NaN in memory that nothing has
written), every case is run twice and has to give the same bits, and may be off from float64 by at
most twice as much as PyTorch at that precision, or as one rounding of what is added up, the choices
of ReLU and pool held as the kernel made them. Results are written case by case, one JSON object a
line; a second call with the same file goes on. The exit status is 1 if a case failed.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import sys
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from lasem_fast.backends import second_order
from lasem_fast.backends.triton_level_op import Tiles, level
from lasem_fast.kernels.level_geometry import Geometry
from lasem_fast.kernels.level_rows import Rows

KERNELS = ("forward", "dgrad", "wgrad", "box_forward", "box_dgrad", "box_wgrad")
PARENTS, BRANCHES, KERNEL = 2, 2, 3
# How much further off than PyTorch a kernel may be: its sums are taken in another order.
SLACK = 2.0
# Size and samples of a problem whose gradients of weights are not made in parts.
_ONE_PART = 8, 1
_DTYPES = {
    "bf16": (torch.bfloat16, 2**-8),
    "fp16": (torch.float16, 2**-11),
    "tf32": (torch.float32, 2**-11),
    "fp32": (torch.float32, 2**-24),
}


@dataclass(frozen=True)
class Case:
    """One level; ``kernel`` is the one of the family's three whose tile is ``tile``."""

    kernel: str
    tile: tuple[int, ...]
    dtype: str
    pool: int
    channels: int
    size: int
    samples: int
    device: str

    @property
    def id(self) -> str:
        tile = "x".join(map(str, self.tile))
        sizes = f"{self.channels}/{self.size}/{self.samples}"
        return f"{self.kernel}/{tile}/{self.dtype}/pool{self.pool}/{sizes}"


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the cases that the file does not have; returns the exit status."""
    parser = argparse.ArgumentParser(prog="python -m bench.tiles", description=__doc__)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda",
        help="cpu: in Triton's interpreter, TRITON_INTERPRET=1")  # fmt: skip
    parser.add_argument("--dtypes", nargs="+", choices=_DTYPES, default=list(_DTYPES))
    parser.add_argument("--pools", type=int, nargs="+", default=[1, 2, 3])
    parser.add_argument("--channels", type=int, nargs="+", default=[64, 72])
    parser.add_argument("--size", type=int, default=20, help="of the images")
    parser.add_argument("--samples", type=int, default=3, help="of a parent")
    parser.add_argument("--few", action="store_true", help="one tile of every kernel and dtype")
    parser.add_argument("--workers", type=int, default=0,
        help="processes, which compile side by side; 0: this one")  # fmt: skip
    parser.add_argument("--out", type=Path, required=True, metavar="FILE", help="one line a case")
    args = parser.parse_args(argv)
    known = {found["id"]: found for found in _read(args.out)}
    asked = list(_cases(args))
    for found in _run([case for case in asked if case.id not in known], args.workers):
        known[found["id"]] = found
        with args.out.open("a") as file:
            file.write(json.dumps(found) + "\n")
    here = [known[case.id] for case in asked]
    failed = [found for found in here if found["failed"]]
    for found in failed:
        print(f"FAILED {found['id']}: {found['failed']}")
    print(f"{len(here)} cases, {len(failed)} failed")
    return 1 if failed else 0


def _read(path: Path) -> list[dict[str, Any]]:
    if not path.exists():
        return []
    return [json.loads(line) for line in path.read_text().splitlines() if line.endswith("}")]


def _cases(args: argparse.Namespace) -> Iterator[Case]:
    for dtype in args.dtypes:
        for kernel in KERNELS:
            tiles = _tiles(kernel, dtype)
            for tile in tiles[:1] if args.few else tiles:
                for pool in args.pools:
                    for channels in args.channels:
                        for size, samples in _sizes(kernel, args):
                            if _runs(kernel, tile, pool):
                                yield Case(
                                    kernel, tuple(tile), dtype, pool, channels, size, samples,
                                    args.device,
                                )  # fmt: skip


def _sizes(kernel: str, args: argparse.Namespace) -> list[tuple[int, int]]:
    """Of images, with their samples."""
    asked = args.size, args.samples
    return [asked, _ONE_PART] if kernel == "box_wgrad" and not args.few else [asked]


def _module(kernel: str) -> Any:
    family = "" if kernel.startswith("box_") else "level_"
    return import_module(f"lasem_fast.kernels.{family}{kernel}")


def _tiles(kernel: str, dtype: str) -> Sequence[Any]:
    module = _module(kernel)
    if kernel.startswith("box_"):
        return module.TILES if dtype in ("bf16", "fp16") else ()
    if dtype == "fp32":
        return module.FMA_TILES
    if dtype == "tf32" and hasattr(module, "TF32_TILES"):
        return module.TF32_TILES
    return module.TENSOR_CORE_TILES


def _runs(kernel: str, tile: Any, pool: int) -> bool:
    """Whether a shape can take the tile: with a pool the forward holds all window positions."""
    return kernel != "forward" or pool == 1 or tile.accumulators <= _module(kernel).MOST_POOLED


def _run(cases: list[Case], workers: int) -> Iterator[dict[str, Any]]:
    if not workers:
        yield from map(_checked, cases)
        return
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(workers, mp_context=context) as pool:
        for future in as_completed([pool.submit(_checked, case) for case in cases]):
            yield future.result()


def _checked(case: Case) -> dict[str, Any]:
    """The case, its errors, and why it failed or ""."""
    found: dict[str, Any] = {"id": case.id, **asdict(case), "errors": {}, "failed": ""}
    try:
        found["errors"], found["failed"] = check(case)
    except Exception as error:  # one kernel that does not compile must not end the run
        found["failed"] = f"{type(error).__name__}: {str(error)[:500]}"
    return found


def check(case: Case) -> tuple[dict[str, list[float]], str]:
    """By name, the error against float64 and what was allowed; what failed, or ""."""
    dtype, unit = _DTYPES[case.dtype]
    with _tf32(case.dtype == "tf32"):
        x, weights, biases, dy, geometry = _problem(case, dtype)
        first = _ours(case, dtype, x, weights, biases, dy, geometry)
        second = _ours(case, dtype, x, weights, biases, dy, geometry)
        code = first.pop("code")
        same = torch.equal(code, second.pop("code"))
        same = same and all(torch.equal(first[name], second[name]) for name in first)
        exact = _plain(torch.float64, dtype, x, weights, biases, dy, geometry, code)
        rounded = _plain(dtype, dtype, x, weights, biases, dy, geometry, code)
        sizes = [[t.abs() for t in tensors] for tensors in ([x], weights, biases, [dy])]
        (x, *_), weights, biases, (dy, *_) = sizes
        added = _plain(torch.float64, dtype, x, weights, biases, dy, geometry, code)
    errors, failed = {}, [] if same else ["two runs differ"]
    for name, truth in exact.items():
        error = _error(first[name], truth)
        # PyTorch may be lucky: sums are taken in fp32, and rounded once more where they are kept
        rounding = unit + 2**-24 * float(added[name].norm() / truth.norm())
        allowed = SLACK * max(_error(rounded[name], truth), rounding)
        errors[name] = [error, allowed]
        if not error <= allowed:
            failed.append(f"{name} is off by {error:.3g}, allowed {allowed:.3g}")
    return errors, "; ".join(failed)


def _problem(
    case: Case, dtype: torch.dtype
) -> tuple[Tensor, list[Tensor], list[Tensor], Tensor, Geometry]:
    """New values every time; weights are fp32, as a net's are."""
    pool, size, channels = case.pool, case.size, case.channels
    geometry = Geometry(1, 1, 1, 1, size, size, pool, 0, size // pool, size // pool, 1)

    def normal(*shape: int, scale: float = 1.0) -> Tensor:
        return scale * torch.randn(shape, device=case.device)

    x = normal(PARENTS, case.samples, size, size, channels).to(dtype)
    scale = (channels * KERNEL**2) ** -0.5
    weights = [
        normal(channels, channels, KERNEL, KERNEL, scale=scale).contiguous(
            memory_format=torch.channels_last
        )
        for _ in range(BRANCHES)
    ]
    biases = [normal(channels, scale=0.1) for _ in range(BRANCHES)]
    rows = PARENTS * BRANCHES
    dy = normal(rows, case.samples, geometry.out_h, geometry.out_w, channels).to(dtype)
    return x, weights, biases, dy, geometry


def _ours(
    case: Case,
    dtype: torch.dtype,
    x: Tensor,
    weights: list[Tensor],
    biases: list[Tensor],
    dy: Tensor,
    geometry: Geometry,
) -> dict[str, Tensor]:
    """Output, code and gradients of the kernels, in memory that was poisoned."""
    leaves = [t.detach().requires_grad_() for t in (x, *weights, *biases)]
    tiles = Tiles(**{case.kernel.removeprefix("box_"): case.tile})
    with _poisoned():
        y = level(
            leaves[0], leaves[1 : 1 + BRANCHES], leaves[1 + BRANCHES :], geometry,
            Rows.full(PARENTS, BRANCHES), dtype=dtype, tiles=tiles,
            boxes=case.kernel.startswith("box_"),
        )  # fmt: skip
        code = y.grad_fn.saved_tensors[2]  # x, skip, code, then the parameters
        gradients = torch.autograd.grad(y, leaves, dy)
    return {"y": y.detach(), "code": code, **_named(gradients)}


def _plain(
    dtype: torch.dtype,
    operands: torch.dtype,
    x: Tensor,
    weights: list[Tensor],
    biases: list[Tensor],
    dy: Tensor,
    geometry: Geometry,
    code: Tensor,
) -> dict[str, Tensor]:
    """The level in PyTorch in ``dtype``, of operands rounded as the kernels round them."""
    rows = Rows.full(PARENTS, BRANCHES)
    parents, branches = (torch.tensor(r, device=x.device) for r in (rows.parents, rows.branches))
    chosen = second_order.Level(parents, branches, None, None, code, geometry.pool, 0)

    def convolve(x: Tensor, *parameters: Tensor) -> Tensor:
        images = x.flatten(0, 1).permute(0, 3, 1, 2)
        weight, bias = torch.cat(parameters[:BRANCHES]), torch.cat(parameters[BRANCHES:])
        return F.conv2d(images, weight, bias, padding=KERNEL // 2)

    inputs = [
        x.to(dtype),
        *(w.to(operands).to(dtype) for w in weights),
        *(b.to(dtype) for b in biases),
    ]
    leaves = [t.detach().requires_grad_() for t in inputs]
    gradients = chosen.gradients(convolve, leaves, None, [True] * len(leaves), dy.to(dtype))
    z = convolve(*inputs).relu()
    if geometry.pool > 1:
        z = F.max_pool2d(z, geometry.pool)
    z = z.unflatten(0, (PARENTS, -1)).unflatten(2, (BRANCHES, -1))
    y = z.permute(0, 2, 1, 4, 5, 3).flatten(0, 1)
    return {"y": y, **_named([g.detach() for g in gradients if g is not None])}


def _named(gradients: Sequence[Tensor]) -> dict[str, Tensor]:
    weights = range(BRANCHES)
    names = ["dx", *(f"dweight{b}" for b in weights), *(f"dbias{b}" for b in weights)]
    return dict(zip(names, gradients, strict=True))


def _error(value: Tensor, truth: Tensor) -> float:
    """Relative, in the Euclidean norm; NaN and infinity are infinitely far off."""
    value = value.double()
    if not bool(torch.isfinite(value).all()):
        return float("inf")
    return float((value - truth.double()).norm() / truth.double().norm())


@contextmanager
def _poisoned() -> Iterator[None]:
    """Memory that ``torch.empty`` gives is filled with NaN, or the largest integer."""
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before)


@contextmanager
def _tf32(on: bool) -> Iterator[None]:
    """Whether float32 convolutions may round to TF32, in PyTorch and so in the kernels."""
    settings = torch.backends.cudnn.conv
    before = settings.fp32_precision
    settings.fp32_precision = "tf32" if on else "ieee"
    try:
        yield
    finally:
        settings.fp32_precision = before


if __name__ == "__main__":
    sys.exit(main())
