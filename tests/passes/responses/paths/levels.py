"""A program with two levels that share flows, and the same by hand with flows cut by ``detach``; float64."""

from collections.abc import Callable, Collection

import torch
from torch import Tensor, nn

import mlc

DTYPE = torch.float64


def values() -> tuple[nn.Parameter, nn.Parameter, Tensor, Tensor]:
    g = torch.Generator().manual_seed(0)
    w, u, a, b = (0.3 * torch.randn(3, generator=g, dtype=DTYPE) for _ in range(4))
    return nn.Parameter(w), nn.Parameter(u), a.requires_grad_(), b.requires_grad_()


def program(w: nn.Parameter, u: nn.Parameter, a: Tensor, b: Tensor) -> Tensor:
    """Pre-training reads a, fine-tuning its result, a and b; a moving average of both goes to the result, too."""
    opt = torch.optim.SGD([w], lr=0.1, momentum=0.9)
    with mlc.level("pre"):
        for _ in range(3):
            opt.zero_grad()
            ((w - 1).square() * a.exp()).sum().backward()
            opt.step()
    shared = a.exp() * w  # read by fine-tuning and by the result
    s = torch.zeros(3, dtype=DTYPE)
    with mlc.level("fine"):
        for _ in range(3):
            (g,) = torch.autograd.grad(((u * shared - 2).square() * (1 + b.square())).sum(), u, retain_graph=True)
            with torch.no_grad():
                u -= 0.05 * g * b.cos()  # b enters the update as well
            s = 0.5 * s + a * b * u
    return (u.square() * a.cos()).sum() + (s * shared).sum()


def by_hand(w: Tensor, u: Tensor, a: Tensor, b: Tensor, cut: Collection[str]) -> list[Tensor]:
    """The result and its gradient by a and b, with flows ("a -> L1", ...) cut where the target reads the source."""

    def use(t: Tensor, flow: str) -> Tensor:
        return t.detach() if flow in cut else t

    w, u = w.detach().requires_grad_(), u.detach().requires_grad_()
    m = torch.zeros(3, dtype=DTYPE)
    for _ in range(3):
        (g,) = torch.autograd.grad(((w - 1).square() * use(a, "a -> L1").exp()).sum(), w, create_graph=True)
        m = 0.9 * m + g
        w = w - 0.1 * m
    a2, b2, w2, s = use(a, "a -> L2"), use(b, "b -> L2"), use(w, "L1 -> L2"), torch.zeros(3, dtype=DTYPE)
    a0, b0, w0 = use(a, "a -> L0"), use(b, "b -> L0"), use(w, "L1 -> L0")
    for _ in range(3):
        loss = ((u * a2.exp() * w2 - 2).square() * (1 + b2.square())).sum()
        (g,) = torch.autograd.grad(loss, u, create_graph=True)
        u = u - 0.05 * g * b2.cos()
        s = 0.5 * s + a0 * b0 * use(u, "L2 -> L0")
    out = (use(u, "L2 -> L0").square() * a0.cos()).sum() + (s * a0.exp() * w0).sum()
    return [out.detach(), *torch.autograd.grad(out, (a, b))]


def compiled(fn: Callable[..., Tensor] = program, **options: object) -> mlc.CompiledFunction:
    return mlc.compile(fn, backend="interpreter", **options)  # type: ignore[call-overload, no-any-return]
