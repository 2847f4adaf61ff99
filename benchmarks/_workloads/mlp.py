"""A perceptron on scikit-learn's digits in random mini-batches: what two of the workloads train."""

from dataclasses import dataclass

import _measure
import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn


@dataclass(frozen=True)
class Shape:
    """Sizes of the perceptron and of the training."""

    steps: int
    batch: int
    width: int
    validation: int = 256


def network(shape: Shape, dtype: torch.dtype) -> nn.Sequential:
    torch.manual_seed(0)
    width = shape.width
    model = nn.Sequential(nn.Linear(64, width), nn.Tanh(), nn.Linear(width, width), nn.Tanh(), nn.Linear(width, 10))
    return model.to(_measure.DEVICE, dtype)


def data(shape: Shape, dtype: torch.dtype) -> tuple[list[tuple[Tensor, Tensor]], tuple[Tensor, Tensor]]:
    """Batches of (pixels, labels) drawn with replacement, and the validation batch."""
    found = load_digits()
    pixels = torch.tensor(found.data / 16, dtype=dtype, device=_measure.DEVICE)
    labels = torch.tensor(found.target, device=_measure.DEVICE)
    generator = torch.Generator().manual_seed(3)
    order = torch.randperm(len(labels), generator=generator).to(labels.device)
    held, rest = order[: shape.validation], order[shape.validation :]
    drawn = torch.randint(len(rest), (shape.steps, shape.batch), generator=generator).to(labels.device)
    batches = [(pixels[rest[i]], labels[rest[i]]) for i in drawn]
    return batches, (pixels[held], labels[held])
