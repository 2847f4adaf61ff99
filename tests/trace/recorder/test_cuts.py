"""What a derivative may pass: a cut on its way into a loss is a constant, on its way into state an update."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

import mlc

X = torch.rand(4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


def by_hand(w: Tensor, cut: Callable[[Tensor], Tensor]) -> Tensor:
    """Steps of which the loss reads a value that is cut, beside one that is not."""
    p = nn.Parameter(X.clone())
    opt = torch.optim.SGD([p], lr=0.2)
    for _ in range(3):
        opt.zero_grad()
        ((p * w).sin() * cut(w * 2) + (p * p).sum()).sum().backward()
        opt.step()
    return (p * w).sum()


def under_no_grad(x: Tensor) -> Tensor:
    with torch.no_grad():
        return x.exp() / 2


def state(w: Tensor) -> Tensor:
    """Updates by hand: `.data`, `copy_`, an average; a hyperparameter in them."""
    p, mean = nn.Parameter(X.clone()), torch.zeros(4, dtype=torch.float64)
    for _ in range(3):
        (g,) = torch.autograd.grad(((p * w).sin() * X).sum(), p)
        with torch.no_grad():
            mean.mul_(0.5).add_(g, alpha=0.5)
            p.data.copy_(p.data - 0.3 * mean)
            p -= 0.1 * g
    return (p * w).sum() + mean.square().sum()


def learned_rate(w: Tensor) -> Tensor:
    """A rate that requires grad, in an update by ``.data``: a tracked operator reads the cut that goes into state."""
    p = nn.Parameter(X.clone())
    for _ in range(3):
        (g,) = torch.autograd.grad(((p * w).sin() * X).sum(), p)
        p.data = p.data - w.mean() * g
    return (p * w).sum()


def slope(f: Callable[[Tensor], Tensor], w: Tensor, d: Tensor) -> Tensor:
    return ((f(w + 1e-5 * d) - f(w - 1e-5 * d)) / 2e-5).detach()


def check(f: Callable[[Tensor], Tensor], frozen: Callable[[Tensor], Tensor]) -> None:
    """The gradient of `f` against differences of `frozen`, which has the same value."""
    w = torch.rand(4, generator=torch.Generator().manual_seed(1), dtype=torch.float64) + 0.2
    d = torch.rand(4, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    torch.testing.assert_close(f(w).detach(), frozen(w).detach())
    meta = w.clone().requires_grad_()
    (g,) = torch.autograd.grad(mlc.compile(f)(meta), meta)
    torch.testing.assert_close((g * d).sum(), slope(frozen, w, d), rtol=1e-7, atol=1e-9)


CUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "detach": lambda x: x.detach(),
    "data": lambda x: x.data.sin(),
    "no_grad": under_no_grad,
    "a view of a cut": lambda x: x.detach().flip(0)[:4],
}


@pytest.mark.parametrize("name", CUTS)
def test_a_cut_is_a_constant_of_the_loss(name: str) -> None:
    w0 = torch.rand(4, generator=torch.Generator().manual_seed(1), dtype=torch.float64) + 0.2
    held = CUTS[name](w0 * 2)
    check(lambda w: by_hand(w, CUTS[name]), lambda w: by_hand(w, lambda x: held))


def test_updates_of_state_pass() -> None:
    check(state, state)
    check(learned_rate, learned_rate)
