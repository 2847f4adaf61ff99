"""A conv net with BatchNorm on scikit-learn's digits; every training example has a weight that is learned.

Ten steps of SGD with momentum; the meta-parameters are one number per example, a weight after a sigmoid.
BatchNorm keeps no running statistics, so validation uses those of its own batch too. A fifth of the labels
is wrong, which is what the weights are there to find.
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass

import _measure
import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import Tensor, nn

from _workloads.optimizers import Sgd
from _workloads.workload import Workload, applied, copies, values

LR, MOMENTUM = 0.1, 0.9


@dataclass(frozen=True)
class Shape:
    """Sizes of the net and of the training."""

    steps: int = 10
    batch: int = 128
    width: int = 32
    validation: int = 256


FULL, SMALL = Shape(), Shape(steps=3, batch=16, width=4, validation=16)


def network(width: int) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(1, width, 3, padding=1, bias=False),
        nn.BatchNorm2d(width, track_running_stats=False),
        nn.SiLU(),
        nn.Conv2d(width, width, 3, padding=1, bias=False),
        nn.BatchNorm2d(width, track_running_stats=False),
        nn.SiLU(),
        nn.Conv2d(width, 2 * width, 3, padding=1, stride=2, bias=False),
        nn.BatchNorm2d(2 * width, track_running_stats=False),
        nn.SiLU(),
        nn.Flatten(),
        nn.Linear(32 * width, 10),
    )


def weighted(logits: Tensor, labels: Tensor, weights: Tensor) -> Tensor:
    return (torch.sigmoid(weights) * F.cross_entropy(logits, labels, reduction="none")).mean()


def ordinary(
    model: nn.Module, weights: Tensor, batches: Sequence[tuple[Tensor, ...]], validation: tuple[Tensor, Tensor]
) -> Tensor:
    """The loop as people write it."""
    opt = torch.optim.SGD(model.parameters(), lr=LR, momentum=MOMENTUM)
    for images, labels, index in batches:
        opt.zero_grad()
        weighted(model(images), labels, weights[index]).backward()
        opt.step()
    images, labels = validation
    return F.cross_entropy(model(images), labels)


def data(shape: Shape, dtype: torch.dtype) -> tuple[list[tuple[Tensor, ...]], tuple[Tensor, Tensor]]:
    """Batches of (images, labels, which examples), and the validation batch (images, labels)."""
    found = load_digits()
    generator = torch.Generator().manual_seed(2)
    order = torch.randperm(len(found.target), generator=generator)
    images = torch.tensor(found.images / 16, dtype=dtype)[order, None].to(_measure.DEVICE)
    labels = torch.tensor(found.target)[order].to(_measure.DEVICE)
    count = shape.steps * shape.batch
    noisy = labels[:count].clone()
    noisy[::5] = (noisy[::5] + 1) % 10
    index = torch.arange(count, device=labels.device).split(shape.batch)
    batches = [(images[i].clone(), noisy[i], i) for i in index]
    held = slice(count, count + shape.validation)
    return batches, (images[held].clone(), labels[held].clone())


def build(quick: bool, dtype: torch.dtype) -> Workload:
    shape = SMALL if quick else FULL
    torch.manual_seed(0)
    model = network(shape.width).to(_measure.DEVICE, dtype)
    batches, validation = data(shape, dtype)
    weights = torch.zeros(shape.steps * shape.batch, dtype=dtype, device=_measure.DEVICE, requires_grad=True)
    forward, first = applied(model), copies(model)
    return Workload(
        name="digits",
        shape=asdict(shape),
        fn=ordinary,
        args=(model, weights, batches, validation),
        model=model,
        meta=[weights],
        batches=batches,
        validation=validation,
        start=lambda meta: list(first),
        loss=lambda params, meta, b: weighted(forward(params, b[0]), b[1], meta[0][b[2]]),
        outer=lambda params, b: F.cross_entropy(forward(params, b[0]), b[1]),
        optimizer=Sgd(lambda meta: (LR, MOMENTUM, 0.0), momentum=True),
        initial=values(model),
    )
