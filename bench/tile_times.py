"""``python -m bench.tile_times``: how long every tile takes on every level of the benchmark's rows.

The levels of one eager step are run again one by one, each of the three kernels that read boxes
with every tile that fits, in a CUDA graph of several launches. What the rule chose is noted beside
the times, so that the estimates behind the rule can be judged and corrected. Results are added to a
file, ``{row: [{"kernel", "level", "chosen", "times": {tile: microseconds}}]}``; a level that an
earlier row has is not timed again.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import torch

from bench import cases
from bench.peers import ours
from lasem_fast.backends import box_level_run
from lasem_fast.kernels import box_dgrad, box_forward, box_gradient, box_wgrad, boxes
from lasem_fast.kernels.kept import forget
from lasem_fast.kernels.level_tiles import Tile

# Beside the tables' own: is there a better one?
_TO_IMAGES = (
    Tile(128, 128, 64, 8, 4), Tile(128, 64, 64, 8, 4), Tile(128, 256, 64, 8, 3),
    Tile(64, 128, 64, 4, 4), Tile(64, 64, 64, 4, 6), Tile(128, 64, 64, 4, 5),
)  # fmt: skip
_TO_WEIGHTS = (
    Tile(128, 128, 64, 8, 4), Tile(128, 64, 64, 4, 5), Tile(64, 64, 128, 4, 5),
    Tile(64, 128, 64, 4, 5), Tile(128, 256, 64, 8, 4),
)  # fmt: skip
_LAUNCHES, _REPLAYS = 10, 5


class Launch(NamedTuple):
    """A kernel on a level of a step.

    Attributes:
        kernel, level: what it is, and its sizes.
        chosen: the tile it had.
        tiles: those that fit.
        run: makes what runs it with a tile.
    """

    kernel: str
    level: str
    chosen: Tile
    tiles: list[Tile]
    run: Callable[[Tile], Callable[[], object]]


def main(argv: Sequence[str] | None = None) -> int:
    """Times the levels of the rows that are asked for."""
    parser = argparse.ArgumentParser(prog="python -m bench.tile_times", description=__doc__)
    parser.add_argument("--row", action="append", help="only rows whose name contains this")
    parser.add_argument("--compile-only", action="store_true", help="run each tile, time none")
    parser.add_argument("--share", type=int, nargs=2, default=(0, 1), metavar=("I", "N"),
        help="every N-th launch from the I-th on: processes compile side by side")  # fmt: skip
    parser.add_argument("--out", type=Path, required=True, metavar="FILE", help="JSON")
    args = parser.parse_args(argv)
    found = json.loads(args.out.read_text()) if args.out.exists() else {}
    seen = {(entry["kernel"], entry["level"]) for row in found.values() for entry in row}
    for case in cases.gpu("cuda"):
        asked = not args.row or any(part in case.id for part in args.row)
        if case.dtype != "bf16" or not asked:
            continue
        here = found.setdefault(case.id, [])
        for number, launch in enumerate(_launches(case)):
            if launch[:2] in seen or number % args.share[1] != args.share[0]:
                continue
            seen.add(launch[:2])
            times = {_name(tile): _tried(launch, tile, args.compile_only) for tile in launch.tiles}
            here.append({"kernel": launch.kernel, "level": launch.level,
                         "chosen": _name(launch.chosen), "times": times})  # fmt: skip
            args.out.write_text(json.dumps(found, indent=1))
        print(f"{case.id}: {len(here)} levels", flush=True)
    return 0


def _name(tile: Tile) -> str:
    return "x".join(map(str, tile))


def _tried(launch: Launch, tile: Tile, compile_only: bool) -> float | str:
    try:
        work = launch.run(tile)
        work()
        torch.cuda.synchronize()
        return 0.0 if compile_only else _microseconds(work)
    except Exception as error:  # one that does not fit must not end the others
        return f"{type(error).__name__}: {error}"[:200]


def _microseconds(work: Callable[[], object]) -> float:
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(_LAUNCHES):
            work()
    graph.replay()
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    for _ in range(_REPLAYS):
        graph.replay()
    end.record()
    end.synchronize()
    return 1e3 * start.elapsed_time(end) / (_LAUNCHES * _REPLAYS)


def _launches(case: cases.Case) -> Iterator[Launch]:
    with _recorded() as calls:
        ours(case.problem(), backend="triton").step()
    gradient_of: tuple[Any, ...] = ()
    for name, function, arguments, keywords, chosen in calls:
        if name == "gradient":
            gradient_of = function, arguments, keywords
        elif name == "wgrad":
            yield _wgrad_launch(function, arguments, keywords, gradient_of)
        else:
            yield _image_launch(name, function, arguments, keywords, chosen)


def _image_launch(name, function, arguments, keywords, chosen) -> Launch:
    images, filters = arguments[:2]
    shape = tuple(images.shape)
    if name == "forward":
        rows, geometry, columns, depth = *arguments[4:6], filters.channels_out, filters.channels
        arguments = arguments[:6]
        extra = "skip" if arguments[3] is not None else ""
    else:
        rows, geometry = arguments[2], arguments[4]
        columns, depth = filters.channels, filters.channels_out
        keywords = {key: value for key, value in keywords.items() if key != "tile"}
        extra = "skip" if keywords["skip_dtype"] is not None else ""
    level = _level(shape, columns, filters.kernel, rows, geometry) + extra
    tiles = [t for t in dict.fromkeys((*boxes.TILES, *_TO_IMAGES))
             if t.columns < 2 * columns and t.depth < 2 * depth]  # fmt: skip

    def run(tile: Tile) -> Callable[[], object]:
        return partial(function, *arguments, **keywords, tile=tile)

    return Launch(name, level, chosen, tiles, run)


def _wgrad_launch(function, arguments, keywords, gradient_of) -> Launch:
    _, x, filters, weights, biases, rows, geometry, chosen = arguments
    make, made_of, liveness = gradient_of
    level = _level(tuple(x.shape), filters.channels_out, filters.kernel, rows, geometry)
    tiles = [t for t in dict.fromkeys((*box_wgrad.TILES, *_TO_WEIGHTS))
             if t.rows < 2 * filters.channels and t.columns < 2 * filters.channels_out]  # fmt: skip

    def run(tile: Tile) -> Callable[[], object]:
        box = box_wgrad.box_of(tile, x.shape, geometry, filters.kernel)
        columns = min(tile.columns, box_gradient.MOST_COLUMNS)
        gradient = make(*made_of[:5], box, columns, **liveness)
        return partial(function, gradient, x, filters, weights, biases, rows, geometry, tile,
                       **keywords)  # fmt: skip

    return Launch("wgrad", level, chosen, tiles, run)


def _level(shape, columns, kernel, rows, geometry) -> str:
    return f"{list(shape)} to {columns} by {kernel} rows {rows.counts} {tuple(geometry)}"


@contextmanager
def _recorded() -> Iterator[list[tuple[Any, ...]]]:
    """The calls of the kernels' functions and the tiles that the rule gave them."""
    calls: list[tuple[Any, ...]] = []
    given: list[Tile] = []
    with ExitStack() as stack:

        def watch(module, name, note):
            original = getattr(module, name)

            def watched(*arguments, **keywords):
                forget()  # what a launch is made of is looked at, each time
                result = original(*arguments, **keywords)
                note(original, arguments, keywords, result)
                return result

            stack.enter_context(mock.patch.object(module, name, watched))

        def called(name):
            def note(function, arguments, keywords, _):
                # a level with a pool of 3 calls the kernel's function again, without it
                if name != "forward" or arguments[5].pool < 3:
                    calls.append((name, function, arguments, keywords, given[-1]))

            return note

        for name, module in (
            ("forward", box_forward), ("dgrad", box_dgrad), ("wgrad", box_wgrad),
            ("gradient", box_gradient),
        ):  # fmt: skip
            if name in ("forward", "dgrad"):
                watch(module, "tiled", lambda f, a, k, result: given.append(result[0]))
            # a level with a pool of 3 calls the function where it is, all others from there
            for caller in (module, box_level_run):
                watch(caller, f"box_{name}", called(name))
        yield calls


if __name__ == "__main__":
    sys.exit(main())
