"""A training in a process of its own, that can be killed: for the tests of continuing.

It has what makes continuing hard: a shuffled loader, dropout, batch normalisation, a generator function, a generator
of its own in a loss, momentum and Adam, schedulers, accumulation, and an average kept by hand.
"""

import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import mlc

STEPS = 9


def build(**options: Any) -> tuple[mlc.Training, dict[str, Tensor]]:
    """A training, and all of its tensors by name."""
    torch.manual_seed(0)
    x = torch.randn(20, 4)
    y = (x.sum(1) > 0).long()
    net = nn.Sequential(nn.Linear(4, 5), nn.BatchNorm1d(5), nn.Tanh(), nn.Dropout(0.2), nn.Linear(5, 2))
    weigh, own, average = nn.Linear(4, 1), torch.Generator().manual_seed(5), torch.zeros(4)

    def inner(batch: list[Tensor]) -> Tensor:
        x, y = batch
        average.mul_(0.9).add_(x.mean(0), alpha=0.1)
        noise = 0.01 * torch.randn(x.shape, generator=own)
        return (torch.sigmoid(weigh(x - average))[:, 0] * F.cross_entropy(net(x + noise), y, reduction="none")).mean()

    def batches() -> Iterator[tuple[Tensor, Tensor]]:
        for part in torch.randperm(len(x)).split(5):
            yield x[part], y[part]

    def sgd(params: Any) -> torch.optim.Optimizer:
        return torch.optim.SGD(params, lr=0.1, momentum=0.9)

    def decay(optimizer: torch.optim.Optimizer) -> Any:
        return torch.optim.lr_scheduler.StepLR(optimizer, 5, 0.5)

    loader = DataLoader(TensorDataset(x, y), 4, shuffle=True)
    levels = [
        mlc.Level("inner", net, sgd, inner, loader, 2, scheduler=decay, clip=1.0),
        mlc.Level(
            "outer", weigh, lambda p: torch.optim.Adam(p, lr=0.05, eps=1e-4),
            lambda b: F.cross_entropy(net(b[0]), b[1]), batches, scheduler=decay, accumulate=2,
        ),
    ]  # fmt: skip
    tensors = {**net.state_dict(keep_vars=True), **weigh.state_dict(prefix="weigh.", keep_vars=True), "avg": average}
    return mlc.Training(levels, **options), tensors


def main(folder: str, killed_at: str = "") -> None:
    """Run to the end, or die in the middle of a step."""

    def die(event: mlc.training.Event) -> None:
        if event.kind == "step" and str(event.step) == killed_at:
            os.kill(os.getpid(), 9)

    training, tensors = build(callbacks=[die])
    training.run(STEPS, checkpoint=folder, every=2)
    torch.save({k: v.detach() for k, v in tensors.items()}, Path(folder) / "result.pt")


if __name__ == "__main__":
    main(*sys.argv[1:])
