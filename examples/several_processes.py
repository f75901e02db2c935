"""Trains two tasks with DistributedDataParallel: every process has a part of each mini-batch.

The posterior is that of the whole mini-batch, so the processes do together what one would do alone
with all of its samples; every process ends up with the same weights, prior and configurations. The
images are scikit-learn's handwritten digits; a task tells five of them apart.

    torchrun --nproc-per-node 2 examples/several_processes.py

Runs on CUDA devices, one for each process, if there are as many, else on the CPU. Needs
scikit-learn.
"""

from __future__ import annotations

import argparse
import os
import sys
from itertools import pairwise

import torch
import torch.distributed as dist
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, DistributedSampler, TensorDataset

import lasem_fast as lf

_TASKS = {"low": range(5), "high": range(5, 10)}


def digits(classes: range) -> TensorDataset:
    """Images ``[N, 1, 8, 8]`` of some digits, and labels from 0."""
    data = load_digits()
    x = torch.from_numpy(data.images).float().unsqueeze(1) / 16
    y = torch.from_numpy(data.target).long()
    rows = (y >= classes[0]) & (y <= classes[-1])
    return TensorDataset(x[rows], y[rows] - classes[0])


def new_net() -> lf.TransferNet:
    """Three stages."""
    widths = [1, 16, 32, 32]
    stages = [
        nn.Sequential(nn.Conv2d(i, o, 3, padding=1), nn.ReLU(), *[nn.MaxPool2d(2)] * (o == 32))
        for i, o in pairwise(widths)
    ]
    return lf.TransferNet(stages)


def train(em: lf.LASEM, task: str, epochs: int, batch: int, device: torch.device) -> None:
    """One task, from its head to its configuration."""
    data = digits(_TASKS[task])
    em.net.add_task(task, nn.Sequential(nn.Flatten(), nn.Linear(32 * 4, 5)).to(device))
    # after add_task, because DDP averages the gradients of what it finds when it wraps
    ddp = DistributedDataParallel(em, find_unused_parameters=True)
    optimizer = torch.optim.Adam(em.net.task_parameters(task), lr=1e-3)
    # gives every process as many samples, which are another part each
    sampler = DistributedSampler(data, drop_last=True)
    loader = DataLoader(data, batch // dist.get_world_size(), sampler=sampler, drop_last=True)
    for epoch in range(epochs):
        sampler.set_epoch(epoch)
        for part in loader:
            x, y = (t.to(device) for t in part)
            optimizer.zero_grad()
            ddp(x, y, task=task).loss.backward()
            optimizer.step()
    em.end_task(task)  # in every process


@torch.no_grad()
def accuracy(net: lf.TransferNet, task: str, device: torch.device) -> float:
    """On the images that it was trained with."""
    x, y = (t.to(device) for t in digits(_TASKS[task]).tensors)
    return float((net(x, task).argmax(1) == y).float().mean())


def checksum(net: lf.TransferNet) -> Tensor:
    """Differs if any weight does."""
    return torch.stack([p.detach().double().sum() for p in net.parameters()]).sum()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--epochs", type=int, default=5)
    parser.add_argument("--batch", type=int, default=32, help="samples of all processes (32)")
    options = parser.parse_args()

    # torchrun says how many processes this machine has
    on_devices = torch.cuda.device_count() >= int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    dist.init_process_group("nccl" if on_devices else "gloo")
    number = int(os.environ["LOCAL_RANK"])
    device = torch.device("cuda", number) if on_devices else torch.device("cpu")
    if on_devices:
        torch.cuda.set_device(device)
    torch.manual_seed(dist.get_rank())  # DDP takes the first process's weights
    net = new_net().to(device)
    em = lf.LASEM(net)
    for task in _TASKS:
        train(em, task, options.epochs, options.batch, device)
        if dist.get_rank() == 0:
            config = em.space.label(em.space.index(net.config(task)))
            print(f"{task}: shares {config}, accuracy {accuracy(net, task, device):.3f}")
    own = checksum(net)
    sums = [torch.empty_like(own) for _ in range(dist.get_world_size())]
    dist.all_gather(sums, own)
    assert len(set(map(float, sums))) == 1, "the processes have different weights"
    dist.barrier()  # nobody leaves while another one still listens
    dist.destroy_process_group()
    # Gloo's threads outlive DistributedDataParallel, and one that lets go of a tensor while Python
    # ends takes the process with it (pytorch PR#179291)
    sys.stdout.flush()
    os._exit(0)


if __name__ == "__main__":
    main()
