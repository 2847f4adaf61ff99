"""Two hundred steps of SGD on a perceptron; learned are three numbers: learning rate, momentum, weight decay."""

from collections.abc import Sequence
from dataclasses import asdict

import _measure
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from _workloads import mlp
from _workloads.optimizers import Sgd
from _workloads.workload import Workload, applied, copies, values

# Logarithm of the rate, logit of the momentum, logarithm of the decay.
START = (-3.5, 1.4, -7.0)
FULL, SMALL = mlp.Shape(steps=200, batch=256, width=128), mlp.Shape(steps=4, batch=8, width=8, validation=8)


def ordinary(
    model: nn.Module, log_rate: Tensor, logit: Tensor, log_decay: Tensor,
    batches: Sequence[tuple[Tensor, Tensor]], validation: tuple[Tensor, Tensor],
) -> Tensor:  # fmt: skip
    """The loop as people write it."""
    opt = torch.optim.SGD(model.parameters(), lr=log_rate.exp(), momentum=logit.sigmoid(), weight_decay=log_decay.exp())
    for x, y in batches:
        opt.zero_grad()
        F.cross_entropy(model(x), y).backward()
        opt.step()
    x, y = validation
    return F.cross_entropy(model(x), y)


def build(quick: bool, dtype: torch.dtype) -> Workload:
    shape = SMALL if quick else FULL
    model = mlp.network(shape, dtype)
    batches, validation = mlp.data(shape, dtype)
    meta = [torch.tensor(value, dtype=dtype, device=_measure.DEVICE, requires_grad=True) for value in START]
    forward, first = applied(model), copies(model)
    return Workload(
        name="hyperparameters",
        shape=asdict(shape),
        fn=ordinary,
        args=(model, *meta, batches, validation),
        model=model,
        meta=meta,
        batches=batches,
        validation=validation,
        start=lambda meta: list(first),
        loss=lambda params, meta, b: F.cross_entropy(forward(params, b[0]), b[1]),
        outer=lambda params, b: F.cross_entropy(forward(params, b[0]), b[1]),
        optimizer=Sgd(lambda meta: (meta[0].exp(), meta[1].sigmoid(), meta[2].exp()), momentum=True),
        initial=values(model),
    )
