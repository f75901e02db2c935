"""``python -m lasem_fast overhead``: how long an EM step takes by phase, and by which kernels."""

from __future__ import annotations

import argparse
import json
import statistics
from collections import defaultdict
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from rich import box
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

from lasem_fast.em import LASEM
from lasem_fast.networks.layers import active_random_layers
from lasem_fast.priors import Count
from lasem_fast.search.posterior import evidence, expected_nll, posterior_of
from lasem_fast.tools import arguments, subject
from lasem_fast.tools.calibration import synchronized_seconds
from lasem_fast.tools.memory import measured_peak
from lasem_fast.tools.stage_ways import stage_ways
from lasem_fast.tools.subject import Subject
from lasem_fast.tools.users_code import UsersError, told_in_one_line

MIB = 2**20
PHASES = ("E forward", "M forward", "posterior", "prior", "backward", "optimiser")


def main(argv: Sequence[str] | None = None, prog: str | None = None) -> int:
    """Measures and prints; returns the exit status."""
    parser = argparse.ArgumentParser(prog=prog, description=__doc__)
    subject.add_net_arguments(parser)
    add = parser.add_argument
    add("--device", type=arguments.device, default="cpu", help="a PyTorch device (default cpu)")
    add("--backend", default="auto", help="of the EM step (default auto)")
    add("--rounds", type=arguments.positive, default=7,
        help="each measures everything once; medians are shown (default 7)")  # fmt: skip
    add("--threads", type=arguments.threads, help="CPU threads (default: PyTorch's)")
    add("--json", action="store_true", help="print JSON in place of the table")
    args = parser.parse_args(argv)
    if args.threads:
        torch.set_num_threads(args.threads)
    try:
        with told_in_one_line(args.net):
            result = measure(
                subject.load(args), device=args.device, backend=args.backend, rounds=args.rounds
            )
    except UsersError as error:
        parser.error(str(error))
    if args.json:
        print(json.dumps(result, indent=1, allow_nan=False))
    else:
        _print(result, Console())
    return 0


def measure(
    looked_at: Subject, *, device: str = "cpu", backend: str = "auto", rounds: int = 7
) -> dict[str, Any]:
    """Medians over rounds in which everything takes its turn.

    The phases are run on their own with the library's functions, one after another; an EM step is
    `em(x, y, task)`, backward and optimiser as a user has them. Where a layer draws random numbers
    the E-step's forward is a second one, measured on its own although `em` runs what lies before
    the first such layer once.

    Returns:
        What ``--json`` prints: milliseconds and bytes.
    """
    samples, dev = looked_at.batch, torch.device(device)
    x, y = looked_at.batch_of(samples, dev)
    net, task = looked_at.net.to(dev), looked_at.task
    space = looked_at.space()
    em = LASEM(net, space, backend=backend)
    naive = LASEM(net, space, backend="reference")
    optimizer = torch.optim.Adam(net.task_parameters(task))
    prior = Count()
    prior.start(task, len(space), dev)

    def training_step(loss: Callable[[], Tensor]) -> Callable[[], None]:
        def step() -> None:
            optimizer.zero_grad()
            loss().backward()
            optimizer.step()

        return step

    steps = {
        "EM step": training_step(lambda: em(x, y, task).loss),
        "plain step": training_step(lambda: F.cross_entropy(net(x, task, config=space.all), y)),
        "naive loop": training_step(lambda: naive(x, y, task).loss),
    }
    seconds: dict[str, list[float]] = defaultdict(list)
    for round_ in range(rounds + 1):
        once = {name: synchronized_seconds(step, dev) for name, step in steps.items()}
        once |= _phases(em, prior, optimizer, task, x, y)
        for name, value in once.items() if round_ else ():  # the first round warms up
            seconds[name].append(value)
    optimizer.zero_grad()
    ms = {name: 1e3 * statistics.median(values) for name, values in seconds.items()}
    return {
        "net": looked_at.name,
        "device": device,
        "backend": em.backend,
        "batch": samples,
        "configurations": len(space),
        "rounds": rounds,
        "phases_ms": {name: ms[name] for name in PHASES if name in ms},
        "step_ms": {name: ms[name] for name in steps},
        "overhead_percent": 100 * (ms["EM step"] / ms["plain step"] - 1),
        "naive_over_em": ms["naive loop"] / ms["EM step"],
        "peak_bytes": {name: measured_peak(step, dev) for name, step in steps.items()},
        "ways": [way._asdict() for way in stage_ways(net, task, em.backend, x)],
    }


def _phases(
    em: LASEM, prior: Count, optimizer: torch.optim.Optimizer, task: str, x: Tensor, y: Tensor
) -> dict[str, float]:
    """Seconds of each phase of one step."""
    seconds = {}

    def timed(phase: str, run: Callable[[], Any]) -> Any:
        results = []
        seconds[phase] = synchronized_seconds(lambda: results.append(run()), x.device)
        return results[0]

    optimizer.zero_grad()
    random_layers = active_random_layers(em.net)
    if random_layers:
        timed("E forward", lambda: _without_noise(em, random_layers, task, x))
    logits = timed("M forward" if random_layers else "E forward", lambda: em.evaluate(x, task))

    def infer() -> tuple[Tensor, Tensor]:
        scores = evidence(logits, y, em.likelihood)
        posterior = posterior_of(prior.log_prob(task), scores.log_likelihood)
        return posterior, expected_nll(posterior, scores.nll)

    posterior, loss = timed("posterior", infer)
    counted = torch.ones((), dtype=torch.bool, device=x.device)
    timed("prior", lambda: prior.update(task, posterior, counted))
    timed("backward", loss.backward)
    timed("optimiser", optimizer.step)
    return seconds


@torch.no_grad()
def _without_noise(em: LASEM, random_layers: list[nn.Module], task: str, x: Tensor) -> Tensor:
    for layer in random_layers:
        layer.training = False
    try:
        return em.evaluate(x, task)
    finally:
        for layer in random_layers:
            layer.training = True


def _print(result: dict[str, Any], console: Console) -> None:
    table = Table(
        title=f"{result['net']}: {result['configurations']} configurations, mini-batch of "
        f"{result['batch']}, backend {result['backend']}, {result['device']}",
        caption="Medians. One forward serves the E-step and the M-step unless a layer is random.",
        title_justify="left",
        box=box.SIMPLE_HEAD,
    )
    for i, heading in enumerate(("", "ms", "of the EM step", "peak memory, MiB")):
        table.add_column(heading, justify="right" if i else "left")
    em_ms = result["step_ms"]["EM step"]
    for name, ms in result["phases_ms"].items():
        table.add_row(f"  {name}", f"{ms:.3g}", f"{100 * ms / em_ms:.0f}%", "")
    for name, ms in result["step_ms"].items():
        peak = f"{result['peak_bytes'][name] / MIB:.1f}"
        table.add_row(name, f"{ms:.3g}", f"{100 * ms / em_ms:.0f}%", peak)
    console.print(table)
    console.print(
        f"EM costs {result['overhead_percent']:.0f}% on top of a plain step; the naive loop takes "
        f"{result['naive_over_em']:.1f} times as long as the EM step."
    )
    ways = Table(title="Ways that the stages take", title_justify="left", box=box.SIMPLE_HEAD)
    for heading in ("stage", "way", "what is left to PyTorch, and why"):
        ways.add_column(heading)
    for way in result["ways"]:
        ways.add_row(*map(str, way.values()))
    console.print(ways)
