"""Problems, loops and references for several processes: a classifier trained on weighted examples, in parts of a batch.

The reference of a loop that averages gradients is one process on the whole batches: a plain unroll, in torch alone.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

__all__ = [
    "batches",
    "differences",
    "models",
    "summed",
    "train",
    "unroll",
]

STEPS = (1e-3, 1e-4, 1e-5)


def models(seed: int = 1) -> tuple[nn.Module, nn.Module]:
    """A classifier, and the network that weighs its examples."""
    torch.manual_seed(seed)
    return (
        nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3)),
        nn.Sequential(nn.Linear(4, 1), nn.Sigmoid()),
    )


def batches(rank: int, n: int, total: int = 8, steps: int = 3) -> tuple[list[Any], Any]:
    """A process's part of each batch, and of the validation batch."""
    g = torch.Generator().manual_seed(0)
    whole = [(torch.randn(total, 4, generator=g), torch.randint(3, (total,), generator=g)) for _ in range(steps + 1)]
    k = total // n
    parts = [(x[rank * k : (rank + 1) * k], y[rank * k : (rank + 1) * k]) for x, y in whole]
    return parts[:-1], parts[-1]


def weighted(model: Any, weigh: Any, x: Tensor, y: Tensor) -> Tensor:
    """The inner loss."""
    return (weigh(x).squeeze(-1) * F.cross_entropy(model(x), y, reduction="none")).mean()


def train(model: Any, weigh: Any, data: Any, val: Any, optimizer: str, average: Callable[[Any], None]) -> Tensor:
    """A training loop as people write it."""
    if optimizer == "sgd":
        opt: Any = torch.optim.SGD(model.parameters(), lr=0.2, momentum=0.9)
    else:
        opt = torch.optim.Adam(model.parameters(), lr=0.05, eps=1e-3)
    for x, y in data:
        opt.zero_grad()
        weighted(model, weigh, x, y).backward()
        average(model)
        nn.utils.clip_grad_norm_(model.parameters(), 0.5)
        opt.step()
    return F.cross_entropy(model(val[0]), val[1])


def unroll(optimizer: str) -> tuple[Tensor, list[Tensor], list[Tensor]]:
    """Loss, hypergradient and trained parameters of one process on the whole batches, by an unrolled loop."""
    model, weigh = models()
    data, val = batches(0, 1)
    names = [n for n, _ in model.named_parameters()]
    ps: list[Tensor] = list(model.parameters())
    m = [torch.zeros_like(p) for p in ps]
    v = [torch.zeros_like(p) for p in ps]

    def call(x: Tensor) -> Tensor:
        return torch.func.functional_call(model, dict(zip(names, ps, strict=True)), (x,))

    for t, (x, y) in enumerate(data, 1):
        gs = torch.autograd.grad(weighted(call, weigh, x, y), ps, create_graph=True)
        norm = torch.stack([g.norm() for g in gs]).norm()
        gs = tuple(g * torch.clamp(0.5 / (norm + 1e-6), max=1.0) for g in gs)
        if optimizer == "sgd":
            m = [0.9 * a + g for a, g in zip(m, gs, strict=True)] if t > 1 else list(gs)
            ps = [p - 0.2 * a for p, a in zip(ps, m, strict=True)]
        else:
            m = [0.9 * a + 0.1 * g for a, g in zip(m, gs, strict=True)]
            v = [0.999 * b + 0.001 * g * g for b, g in zip(v, gs, strict=True)]
            ps = [
                p - 0.05 * (a / (1 - 0.9**t)) / ((b / (1 - 0.999**t)).sqrt() + 1e-3)
                for p, a, b in zip(ps, m, v, strict=True)
            ]
    loss = F.cross_entropy(call(val[0]), val[1])
    return loss.detach(), list(torch.autograd.grad(loss, list(weigh.parameters()))), [p.detach() for p in ps]


def summed(t: Tensor) -> Tensor:
    """The sum over processes."""
    out = t.detach().clone()
    dist.all_reduce(out)
    return out


def differences(f: Callable[[float], Tensor]) -> float:
    """Central differences at 0 of the sum over processes of ``f``, at the pair of steps that agrees best."""
    slopes = [float((summed(f(h)) - summed(f(-h))) / (2 * h)) for h in STEPS]
    pairs = [(abs(a - b), b) for a, b in itertools.pairwise(slopes)]
    return min(pairs)[1]
