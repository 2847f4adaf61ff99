"""What a response cannot answer is refused in words, at a line of the user's: every message once, on traces alone."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import mlc
from mlc.passes.autodiff.policy import Policy
from mlc.passes.responses.respond import respond

D = torch.float64
PERSISTENT = mlc.Evolution(persistent=True)


def steps(w: Tensor, opt: Any, xs: list[Tensor], loss: Callable[[Tensor, Tensor], Tensor]) -> None:
    for x in xs:
        opt.zero_grad()
        loss(w, x).backward()
        opt.step()


def decayed(w: Tensor, eta: Tensor, xs: list[Tensor]) -> Tensor:
    steps(w, torch.optim.AdamW([w], lr=0.1, weight_decay=0.1), xs, lambda w, x: (w - x * eta).square().sum())
    return w.sum()


def projected(w: Tensor, eta: Tensor, xs: list[Tensor]) -> Tensor:
    for x in xs:
        (g,) = torch.autograd.grad((w - x * eta).square().sum(), w)
        with torch.no_grad():
            w.copy_((w - 0.1 * g).clamp(min=0))
    return w.sum()


def plain(w: Tensor, eta: Tensor, xs: list[Tensor]) -> Tensor:
    steps(w, torch.optim.SGD([w], lr=0.1), xs, lambda w, x: (w - x * eta).square().sum())
    return w.sum()


def twice_a_trip(w: Tensor, eta: Tensor, xs: list[Tensor]) -> Tensor:
    opt = torch.optim.SGD([w], lr=0.1)
    for _ in range(4):
        steps(w, opt, [xs[0], xs[1]], lambda w, x: (w - x * eta).square().sum())
    return w.sum()


def taught(w: Tensor, eta: Tensor, xs: list[Tensor]) -> Tensor:
    teacher, opt = torch.zeros_like(w), torch.optim.SGD([w], lr=0.1)
    for x in xs:
        opt.zero_grad()
        ((w - x * eta).square().sum() + (w - teacher).square().sum()).backward()
        opt.step()
        teacher.mul_(0.9).add_(w.detach(), alpha=0.1)
    return w.sum()


def stepped_through(w: Tensor, eta: Tensor, xs: list[Tensor]) -> Tensor:
    u = torch.ones(2, dtype=D, requires_grad=True)
    outer = torch.optim.SGD([u], lr=0.1)
    for x in xs:
        with mlc.level("inner"):
            steps(w, torch.optim.SGD([w], lr=0.1), [x, x], lambda w, x: (w - x * eta - u).square().sum())
        outer.zero_grad()
        (w - 1).square().sum().backward()
        outer.step()
    return u.sum()


def accumulated(w: Tensor, eta: Tensor, xs: list[Tensor]) -> Tensor:
    opt = torch.optim.SGD([w], lr=0.1)
    for _ in range(3):
        opt.zero_grad()
        for x in xs:
            (w - x * eta).square().sum().backward()
        opt.step()
    return w.sum()


def drawn_behind(w: Tensor, eta: Tensor, xs: list[Tensor]) -> Tensor:
    steps(w, torch.optim.SGD([w], lr=0.1), xs, lambda w, x: (w - x * eta).square().sum())
    return (torch.bernoulli(w.detach().sigmoid()) * w).sum()


class Twice(torch.autograd.Function):
    """Its backward is Python."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return 2 * x

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Tensor:
        return 2 * g


def by_a_function(w: Tensor, eta: Tensor, xs: list[Tensor]) -> Tensor:
    steps(w, torch.optim.SGD([w], lr=0.1), xs, lambda w, x: (Twice.apply(w) - x * eta).square().sum())
    return w.sum()


def stateless(w: Tensor, eta: Tensor, xs: list[Tensor]) -> Tensor:
    v = torch.zeros(2, dtype=D, requires_grad=True)
    steps(v, torch.optim.SGD([v], lr=0.1), xs, lambda v, x: (v - x * eta).square().sum())
    return v.sum() + w.detach().sum()


def in_two(w: Tensor, eta: Tensor, xs: list[Tensor]) -> Tensor:
    v = torch.ones(2, dtype=D, requires_grad=True)
    with mlc.level("first"):
        steps(w, torch.optim.SGD([w], lr=0.1), xs, lambda w, x: (w - x * eta).square().sum())
    with mlc.level("second"):
        steps(v, torch.optim.SGD([v], lr=0.1), xs, lambda v, x: (v - w * eta).square().sum())
    return v.sum()


CASES: list[tuple[Any, mlc.Response, str]] = [
    (decayed, mlc.Implicit(), "moves the parameters by more than their gradient"),
    (projected, mlc.Implicit(), "does more than add to the parameters"),
    (projected, mlc.FullyFirstOrder(), "does more than add to the parameters"),
    (plain, mlc.Truncated(1), "needs to know how many steps there are"),
    (twice_a_trip, mlc.Truncated(3), "ends inside of one"),
    (taught, mlc.Implicit(), "reads state that its steps change besides"),
    (taught, mlc.Implicit(data="all"), "reads state that its steps change besides"),
    (stepped_through, mlc.ForwardGradient(), "another level steps along the gradient"),
    (stepped_through, mlc.Evolution(), "another level steps along the gradient"),
    (stepped_through, PERSISTENT, "another level steps along the gradient"),
    (accumulated, mlc.FullyFirstOrder(), "taken in a loop of its own"),
    (drawn_behind, mlc.Evolution(), "numbers are drawn behind it"),
    (drawn_behind, PERSISTENT, "numbers are drawn that depend on"),
    (by_a_function, mlc.ForwardGradient(), "custom autograd.Function"),
    (stateless, PERSISTENT, "goes on from no tensor that it changes"),
    (in_two, PERSISTENT, "each perturbs the whole call"),
]


@pytest.mark.parametrize(("fn", "response", "said"), CASES, ids=[f"{c[0].__name__}-{c[1]}" for c in CASES])
def test_each_is_refused_at_a_line_with_advice(fn: Any, response: mlc.Response, said: str) -> None:
    torch.manual_seed(0)
    w, eta = torch.zeros(2, dtype=D, requires_grad=True), torch.ones(2, dtype=D, requires_grad=True)
    program = mlc.trace(fn, w, eta, [torch.randn(2, dtype=D) for _ in range(3)])
    deepest = max(x.depth for x in program.levels)
    levels = [x for x in program.levels if x.depth == deepest]
    with pytest.raises(mlc.PlanError, match=said) as caught:
        respond(program, {x.name: response for x in levels}, Policy())
    assert caught.value.advice and str(caught.value.loc).startswith(__file__)
