"""One point of modes.py: ``_modes_point.py MODE STEPS HYPERPARAMETERS CALLS FULL|SMALL WHAT``.

An MLP trained by SGD with momentum; the first three hyperparameters are learning rate, weight decay and momentum,
further ones weigh single training examples.  WHAT is ``seconds``, ``memory`` or ``seconds,memory``.
"""

import json
import sys
import time
from dataclasses import asdict, dataclass
from itertools import pairwise
from typing import Any

import _measure
import torch
import torch.nn.functional as F
from _spine_point import memory, seconds
from torch import Tensor, nn

import mlc


@dataclass(frozen=True)
class Shape:
    """Of the MLP and its batches; ``layers`` hidden ones."""

    layers: int
    width: int
    features: int
    classes: int
    batch: int


FULL = Shape(2, 64, 32, 10, 64)
SMALL = Shape(1, 8, 4, 3, 8)


def model(shape: Shape) -> nn.Module:
    sizes = [shape.features, *[shape.width] * shape.layers]
    hidden = [part for a, b in pairwise(sizes) for part in (nn.Linear(a, b), nn.Tanh())]
    return nn.Sequential(*hidden, nn.Linear(sizes[-1], shape.classes))


def train(net: nn.Module, hyper: dict[str, Tensor], batches: list[Any], validation: Any) -> Tensor:
    """The compiled loop."""
    rate, decay, momentum = hyper["rate"], hyper["decay"], hyper["momentum"]
    weights = hyper.get("weights")
    buffers = [torch.zeros_like(p) for p in net.parameters()]
    for x, y in batches:
        net.zero_grad()
        losses = F.cross_entropy(net(x), y, reduction="none")
        if weights is not None:
            losses = torch.cat([losses[: len(weights)] * weights, losses[len(weights) :]])
        losses.mean().backward()
        with torch.no_grad():
            for p, m in zip(net.parameters(), buffers, strict=True):
                m.copy_(momentum * m + p.grad + decay * p)
                p.sub_(rate * m)
    return F.cross_entropy(net(validation[0]), validation[1])


def hyperparameters(count: int) -> dict[str, Tensor]:
    """``count`` of them, 0-d tensors but for the examples' weights."""
    start = {"rate": 0.05, "decay": 1e-3, "momentum": 0.8}
    found = {n: torch.tensor(v, requires_grad=i < count) for i, (n, v) in enumerate(start.items())}
    return found | ({"weights": torch.ones(count - 3, requires_grad=True)} if count > 3 else {})


def main(mode: str, steps: int, count: int, calls: int, size: str, what: list[Any]) -> None:
    if memory in what:
        _measure.return_memory()
    torch.manual_seed(0)
    shape = {"FULL": FULL, "SMALL": SMALL}[size]

    def batch() -> tuple[Tensor, Tensor]:
        return torch.randn(shape.batch, shape.features), torch.randint(0, shape.classes, (shape.batch,))

    net, batches, validation = model(shape), [batch() for _ in range(steps)], batch()
    start = [p.detach().clone() for p in net.parameters()]
    hyper = hyperparameters(count)
    metas = [t for t in hyper.values() if t.requires_grad]
    compiled = mlc.compile(train, flows=mode)

    def call() -> list[Tensor]:
        with torch.no_grad():
            for p, s in zip(net.parameters(), start, strict=True):
                p.copy_(s)
        return list(torch.autograd.grad(compiled(net, hyper, batches, validation), metas))

    began = time.perf_counter()
    gradient = torch.cat([g.flatten() for g in call()])
    point = {
        "mode": mode,
        "steps": steps,
        "hyperparameters": count,
        "first_call_seconds": time.perf_counter() - began,
        "gradient": gradient.tolist(),
        "planned_mode": compiled.plan.mode,
        "planned_peak_bytes": compiled.plan.peak_bytes,
        "parameter_bytes": sum(p.numel() * p.element_size() for p in net.parameters()),
        "shape": asdict(shape),
        "machine": _measure.machine(),
    }
    for meter in what:
        point |= meter(call, calls)
    print(json.dumps(point))


if __name__ == "__main__":
    mode, steps, count, calls, size, what = sys.argv[1:]
    meters = [{"seconds": seconds, "memory": memory}[each] for each in what.split(",")]
    main(mode, int(steps), int(count), int(calls), size, meters)
