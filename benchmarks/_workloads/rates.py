"""Fifty steps of SGD on a perceptron where every single weight has a learning rate of its own, which is learned.

The meta-parameters are the logarithms of the rates (Meta-SGD, Li et al. 2017, arXiv 1707.09835), as many as
there are parameters. The update is written by hand, as torch.optim has one rate per group.
"""

from collections.abc import Sequence
from dataclasses import asdict

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from _workloads import mlp
from _workloads.optimizers import Sgd
from _workloads.workload import Workload, applied, copies, values

LOG_RATE = -2.5
FULL, SMALL = mlp.Shape(steps=50, batch=256, width=256), mlp.Shape(steps=3, batch=8, width=8, validation=8)


def ordinary(
    model: nn.Module, log_rates: Sequence[Tensor], batches: Sequence[tuple[Tensor, Tensor]],
    validation: tuple[Tensor, Tensor],
) -> Tensor:  # fmt: skip
    """The loop as people write it."""
    params = list(model.parameters())
    for x, y in batches:
        grads = torch.autograd.grad(F.cross_entropy(model(x), y), params)
        with torch.no_grad():
            for p, g, log_rate in zip(params, grads, log_rates, strict=True):
                p -= log_rate.exp() * g
    x, y = validation
    return F.cross_entropy(model(x), y)


def build(quick: bool, dtype: torch.dtype) -> Workload:
    shape = SMALL if quick else FULL
    model = mlp.network(shape, dtype)
    batches, validation = mlp.data(shape, dtype)
    log_rates = [torch.full_like(p, LOG_RATE).requires_grad_() for p in model.parameters()]
    forward, first = applied(model), copies(model)
    return Workload(
        name="rates",
        shape=asdict(shape),
        fn=ordinary,
        args=(model, log_rates, batches, validation),
        model=model,
        meta=log_rates,
        batches=batches,
        validation=validation,
        start=lambda meta: list(first),
        loss=lambda params, meta, b: F.cross_entropy(forward(params, b[0]), b[1]),
        outer=lambda params, b: F.cross_entropy(forward(params, b[0]), b[1]),
        optimizer=Sgd(lambda meta: ([r.exp() for r in meta], 0.0, 0.0), momentum=False),
        initial=values(model),
    )
