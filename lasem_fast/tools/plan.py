"""``python -m lasem_fast plan``: what a search would cost, before it is run."""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Sequence
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table
from torch import Tensor

from lasem_fast.configs import ConfigSpace
from lasem_fast.levels.plan import Plan
from lasem_fast.net import TransferNet
from lasem_fast.networks.network import Network
from lasem_fast.search import dispatch
from lasem_fast.tools import arguments, subject
from lasem_fast.tools.calibration import StageTime, naive_seconds, stage_times, tree_seconds
from lasem_fast.tools.costs import MOST_CONFIGURATIONS, StepCost, step_cost
from lasem_fast.tools.partition import best_partition
from lasem_fast.tools.subject import Subject
from lasem_fast.tools.users_code import UsersError, told_in_one_line
from lasem_fast.tree.budget import StepBytes, best_cut, least_of, peak_of, step_bytes

MIB = 2**20


def main(argv: Sequence[str] | None = None, prog: str | None = None) -> int:
    """Prints the plan; returns the exit status."""
    parser = argparse.ArgumentParser(prog=prog, description=__doc__)
    subject.add_net_arguments(parser)
    add = parser.add_argument
    add(
        "--device",
        type=arguments.device,
        default="cpu",
        help="where to calibrate the times (default cpu)",
    )
    add("--partition", type=arguments.positive, metavar="G",
        help="find the best partition into G groups (default: as many as fit)")  # fmt: skip
    add(
        "--max-seconds",
        type=arguments.above_zero,
        help="budget per step, of the search for a partition",
    )
    add(
        "--max-memory",
        type=arguments.above_zero,
        metavar="MIB",
        help="budget of peak memory, likewise, and of LASEM(..., max_memory=...)",
    )
    add("--backend", default="auto", help="of that LASEM (default auto)")
    add("--json", action="store_true", help="print JSON in place of tables")
    args = parser.parse_args(argv)
    budget = None if args.max_memory is None else args.max_memory * MIB
    try:
        with told_in_one_line(args.net):
            result = make_plan(
                subject.load(args),
                device=args.device,
                partition=args.partition,
                max_seconds=args.max_seconds,
                max_memory=budget,
                backend=args.backend,
            )
    except UsersError as error:
        parser.error(str(error))
    if args.json:
        print(json.dumps(result, indent=1, allow_nan=False))
    else:
        _print(result, budget, Console())
    return 0


def make_plan(
    looked_at: Subject,
    *,
    device: str = "cpu",
    partition: int | None = None,
    max_seconds: float | None = None,
    max_memory: float | None = None,
    backend: str = "auto",
) -> dict[str, Any]:
    """The costs of a search: counted on the meta device, times from a quick calibration.

    Args:
        looked_at: the net, its mini-batch and groups.
        device: where to calibrate.
        partition: number of groups to find the best partition for; None: as many as fit, if there
            is a budget.
        max_seconds: per step.
        max_memory: peak bytes of a step.
        backend: of the search that keeps to ``max_memory`` by running sub-trees one by one.

    Returns:
        What ``--json`` prints: seconds, bytes, FLOPs.

    Raises:
        ValueError: an argument is not as described.
        RuntimeError: the backend cannot run here.
    """
    backend = dispatch.choose(backend)
    net, task, sample, batch = looked_at.net, looked_at.task, looked_at.sample, looked_at.batch
    if partition is not None and partition > net.depth:
        raise ValueError(f"partition: expected at most {net.depth} groups, got {partition}")
    space = looked_at.space()
    cost = step_cost(net, task, space, sample, batch)
    x, _ = looked_at.batch_of(batch, device)
    times = stage_times(net.to(device), task, x)
    plan = Plan.of_configs(space.configs)
    result = {
        "net": looked_at.name,
        "batch": batch,
        "stages": net.depth,
        "groups": list(space.groups or ()),
        "configurations": len(space),
        "stage_evaluations": {"tree": plan.stage_evaluations, "naive": len(space) * net.depth},
        "flops": {"tree": cost.flops, "naive": cost.naive_flops, "base": cost.base_flops},
        "memory": {"held": cost.held, "peak": cost.peak},
        "predicted_seconds": {
            "tree": tree_seconds(times, space),
            "naive": naive_seconds(times, space),
            "base": sum(t.seconds(1) for t in times),
        },
        "levels": _levels(cost, times),
        "bounded": _bounded(net, task, plan, x, backend, max_memory),
    }
    if partition is not None or max_seconds is not None or max_memory is not None:
        result["partitions"] = _partitions(
            looked_at, times, partition, max_seconds or math.inf, max_memory or math.inf
        )
    return result


def _levels(cost: StepCost, times: Sequence[StageTime]) -> list[dict[str, Any]]:
    names = [*(f"stage {i + 1}" for i in range(len(times) - 1)), "head"]
    return [
        {"level": name, **level._asdict(), "predicted_seconds": time.seconds(level.rows)}
        for name, level, time in zip(names, cost.levels, times, strict=True)
    ]


def _bounded(
    net: TransferNet, task: str, plan: Plan, x: Tensor, backend: str, max_memory: float | None
) -> dict[str, Any]:
    """What ``LASEM(..., max_memory=...)`` makes of a budget in bytes, and of the least one."""
    network = Network(net.branches(task), net.heads[task], task)
    costs = step_bytes(network, dispatch.operations(backend), x)
    whole, least = peak_of(plan, costs), least_of(plan, costs)
    result = {"backend": backend, "whole": whole, "least": least}
    for name, budget in (("at_least", least), ("in_budget", max_memory)):
        result[name] = None if budget is None or budget < least else _cut(plan, costs, budget)
    return result


def _cut(plan: Plan, costs: StepBytes, budget: float) -> dict[str, int]:
    """How a step runs within a budget that can be met."""
    cut = best_cut(plan, costs, budget)
    if cut is None:
        return {"whole_stages": len(plan.levels), "runs": 0, "peak": peak_of(plan, costs)}
    runs = -(-len(plan.levels[cut.stage - 1]) // cut.rows)
    return {"whole_stages": cut.stage, "runs": runs, "peak": cut.peak}


def _partitions(
    looked_at: Subject,
    times: Sequence[StageTime],
    groups: int | None,
    max_seconds: float,
    max_memory: float,
) -> list[dict[str, Any]]:
    """The best partition for each number of groups, up to the largest that fits."""
    depth = looked_at.net.depth
    net, task, sample, batch = looked_at.net, looked_at.task, looked_at.sample, looked_at.batch

    def cost_of(sizes: tuple[int, ...]) -> StepCost:
        return step_cost(net, task, ConfigSpace(depth, groups=sizes), sample, batch)

    # All stages in one group have two rows each.
    held = [level.held // 2 for level in cost_of((depth,)).levels[:-1]]
    most = min(depth, MOST_CONFIGURATIONS.bit_length() - 1)
    found = []
    for g in range(1, most + 1) if groups is None else [groups]:
        best = best_partition(
            times, held, g, lambda sizes: cost_of(sizes).peak,
            max_seconds=max_seconds, max_memory=max_memory,
        )  # fmt: skip
        if best is None:
            break
        found.append(
            {
                "groups": list(best.sizes),
                "configurations": 2**g,
                "predicted_seconds": best.seconds,
                "peak": best.peak,
            }
        )
    return found


def _print(result: dict[str, Any], budget: float | None, console: Console) -> None:
    evaluations, seconds = result["stage_evaluations"], result["predicted_seconds"]
    groups = f", groups {result['groups']}" if len(result["groups"]) < result["stages"] else ""
    console.print(
        f"{result['net']}: {result['stages']} stages{groups}, {result['configurations']} "
        f"configurations, mini-batch of {result['batch']}"
    )
    table = _table("One training step", "", "tree", "naive loop", "one configuration")
    table.add_row("stage evaluations", str(evaluations["tree"]), str(evaluations["naive"]),
                  str(result["stages"]))  # fmt: skip
    table.add_row("GFLOP", *(f"{result['flops'][k] / 1e9:.3g}" for k in ("tree", "naive", "base")))
    table.add_row("predicted ms", *(f"{1e3 * seconds[k]:.3g}" for k in ("tree", "naive", "base")))
    console.print(table)
    table = _table("Level by level", "", "rows", "GFLOP", "memory, MiB", "predicted ms")
    for level in result["levels"]:
        table.add_row(level["level"], str(level["rows"]), f"{level['flops'] / 1e9:.3g}",
                      f"{level['held'] / MIB:.1f}",
                      f"{1e3 * level['predicted_seconds']:.3g}")  # fmt: skip
    console.print(table)
    memory = result["memory"]
    console.print(
        f"Memory beside weights and mini-batch: {memory['held'] / MIB:.1f} MiB between forward and "
        f"backward, {memory['peak'] / MIB:.1f} MiB at the peak (gradients included)."
    )
    console.print(_words(result["bounded"], budget))
    if "partitions" in result:
        _print_partitions(result["partitions"], console)


def _words(bounded: dict[str, Any], budget: float | None) -> str:
    whole, least = (f"{bounded[k] / MIB:.1f} MiB" for k in ("whole", "least"))
    words = (
        f"LASEM(..., max_memory=...), backend {bounded['backend']}: {whole} hold the whole tree, "
        f"{least} are the least ({_way(bounded['at_least'])})."
    )
    if budget is None:
        return words
    if bounded["in_budget"] is None:
        return f"{words} {budget / MIB:.1f} MiB cannot be met."
    return (
        f"{words} {budget / MIB:.1f} MiB: {_way(bounded['in_budget'])}, "
        f"{bounded['in_budget']['peak'] / MIB:.1f} MiB at the peak."
    )


def _way(cut: dict[str, int]) -> str:
    if not cut["runs"]:
        return "the whole tree at once"
    first = cut["whole_stages"]
    upper = "stage 1" if first == 1 else f"stages 1-{first}"
    return f"{upper} whole, then sub-trees in {cut['runs']} runs"


def _print_partitions(found: list[dict[str, Any]], console: Console) -> None:
    if not found:
        console.print("No partition fits the budget.")
        return
    table = _table(
        "Fastest partitions within the budget", "groups", "configurations", "predicted ms",
        "peak memory, MiB",
    )  # fmt: skip
    for row in found:
        table.add_row(
            ",".join(map(str, row["groups"])), str(row["configurations"]),
            f"{1e3 * row['predicted_seconds']:.3g}", f"{row['peak'] / MIB:.1f}",
        )  # fmt: skip
    console.print(table)
    console.print(f"Best: ConfigSpace({sum(found[-1]['groups'])}, groups={found[-1]['groups']})")


def _table(title: str, *headings: str) -> Table:
    table = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD)
    for i, heading in enumerate(headings):
        table.add_column(heading, justify="right" if i else "left")
    return table
