"""A small classifier trained by SGD with momentum or Adam; its initial parameters are the meta-parameters."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import mlc

STEPS, BATCH, WIDTH = 3, 8, 32


def model(dtype: torch.dtype = torch.float32) -> nn.Module:
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(8, WIDTH), nn.LayerNorm(WIDTH), nn.Tanh(), nn.Linear(WIDTH, 5)).to(dtype)


def data(dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(STEPS, BATCH, 8, generator=generator)
    return x.to(dtype), torch.randint(5, (STEPS, BATCH), generator=generator)


def sgd(net: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    fast = mlc.clone(net)
    opt = torch.optim.SGD(fast.parameters(), lr=0.1, momentum=0.9)
    for a, b in zip(x, y, strict=True):
        opt.zero_grad()
        F.cross_entropy(fast(a), b).backward()
        opt.step()
    return F.cross_entropy(fast(x[0]), y[0])


def adam(net: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    fast = mlc.clone(net)
    opt = torch.optim.Adam(fast.parameters(), lr=1e-2, eps=1e-1)
    for a, b in zip(x, y, strict=True):
        opt.zero_grad()
        F.cross_entropy(fast(a), b).backward()
        opt.step()
    return F.cross_entropy(fast(x[0]), y[0])


def hypergradient(loop: Any, dtype: torch.dtype = torch.float32, **options: Any) -> tuple[Tensor, Any]:
    """All of the hypergradient in float64, and the compiled function."""
    net = model(dtype)
    f = mlc.compile(loop, backend="interpreter", **options)
    grads = torch.autograd.grad(f(net, *data(dtype)), list(net.parameters()))
    return torch.cat([g.double().flatten() for g in grads]), f


def cosine(a: Tensor, b: Tensor) -> float:
    return float(a @ b / (a.norm() * b.norm()))


def ratio(a: Tensor, b: Tensor) -> float:
    return float(a.norm() / b.norm())
