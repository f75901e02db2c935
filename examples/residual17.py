"""Trains the paper's 17-layer residual net in four groups for an epoch on real images, on the CPU.

The images are scikit-learn's handwritten digits, scaled up from 8 x 8 to the net's 32 x 32 in three
channels. As in the paper's CIFAR-100 runs a task has 170 training images, so an epoch is 17
mini-batches of 10; the choices are the authors' release's (``LASEM.reference``, its RMSProp). Its
initial weights make logits of hundreds, so the first epochs (of the paper's 2000) bring the loss
down and not yet the accuracy up.

At the end the step is timed against the naive loop, which runs every configuration separately.

    python examples/residual17.py
    python examples/residual17.py --transfer tf --groups 5 --width 0.25

Needs scikit-learn.
"""

from __future__ import annotations

import argparse
import time

import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import Tensor

import lasem_fast as lf


def digits(train: int, test: int, seed: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Images ``[N, 3, 32, 32]``, standardised by the training images, and labels, per split."""
    data = load_digits()
    order = torch.randperm(len(data.target), generator=torch.Generator().manual_seed(seed))
    order = order[: train + test]
    x = torch.from_numpy(data.images).float()[order].unsqueeze(1) / 16
    x = F.interpolate(x, size=(32, 32), mode="bilinear", align_corners=False)
    x = ((x - x[:train].mean()) / x[:train].std()).expand(-1, 3, -1, -1).contiguous()
    y = torch.from_numpy(data.target).long()[order]
    return x[:train], y[:train], x[train:], y[train:]


@torch.no_grad()
def accuracy(em: lf.LASEM, x: Tensor, y: Tensor) -> float:
    """Of the configuration that is ahead."""
    em.eval()
    config = em.best_config("digits")
    predicted = torch.cat([em.net(part, "digits", config).argmax(1) for part in x.split(100)])
    em.train()
    return float((predicted == y).float().mean())


def seconds_per_step(em: lf.LASEM, x: Tensor, y: Tensor, repeats: int) -> float:
    """The median of ``repeats`` E- and M-steps with their backward, after one to warm up."""
    times = []
    for _ in range(repeats + 1):
        em.net.zero_grad()
        start = time.perf_counter()
        em(x, y, "digits").loss.backward()
        times.append(time.perf_counter() - start)
    return sorted(times[1:])[repeats // 2]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--transfer", choices=("hps", "tf", "dfcnn"), default="hps")
    parser.add_argument("--groups", type=int, choices=range(4, 9), default=4)
    parser.add_argument("--width", type=float, default=1.0, help="factor on channels (default 1)")
    parser.add_argument("--epochs", type=int, default=1)
    parser.add_argument("--images", type=int, default=170, help="for training (default 170)")
    parser.add_argument("--lr", type=float, default=1e-4)
    parser.add_argument("--repeats", type=int, default=3, help="steps timed per way (default 3)")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()

    torch.manual_seed(args.seed)
    arch = lf.nets.residual17(args.groups, args.transfer, args.width)
    space = arch.space()
    net = arch.net()
    net.add_task("digits", arch.head(10))
    em = lf.LASEM.reference(net, space)
    optimizer = lf.optim.TFRMSprop(net.task_parameters("digits"), lr=args.lr)
    x, y, test_x, test_y = digits(args.images, 500, args.seed)
    parameters = sum(p.numel() for p in net.parameters())
    print(f"{space}, {args.transfer}, {parameters / 1e6:.1f} million parameters")

    for epoch in range(1, args.epochs + 1):
        start, losses = time.perf_counter(), []
        order = torch.randperm(len(x))
        for rows in order.split(arch.batch_size):
            if len(rows) < arch.batch_size:
                continue  # the release drops what is left over
            optimizer.zero_grad()
            step = em(x[rows], y[rows], task="digits")
            step.loss.backward()
            optimizer.step()
            losses.append(float(step.loss.detach()))
        took = time.perf_counter() - start
        first, last = (sum(part) / len(part) for part in (losses[:3], losses[-3:]))
        label = space.label(space.index(em.best_config("digits")))
        print(
            f"epoch {epoch}: {len(losses)} steps in {took:.1f} s, loss {first:.3f} -> {last:.3f}, "
            f"test accuracy {accuracy(em, test_x, test_y):.3f}, ahead: {label}"
        )

    x, y = x[: arch.batch_size], y[: arch.batch_size]
    tree = seconds_per_step(em, x, y, args.repeats)
    naive = seconds_per_step(lf.LASEM.reference(net, space, "reference"), x, y, args.repeats)
    print(
        f"one step (E, M, backward), {torch.get_num_threads()} thread(s): "
        f"{em.backend} tree {tree:.3f} s, naive loop {naive:.3f} s, {naive / tree:.2f} times that"
    )
    em.end_task("digits")


if __name__ == "__main__":
    main()
