"""What a step draws is the same in the step and in its adjoint."""

from collections.abc import Callable

import torch
from torch import Tensor, nn

import mlc


def check(train: Callable[[Tensor, Tensor, Tensor], Tensor]) -> None:
    """The hypergradient against central differences of the plain loop, from the same state of the generator."""
    w, x, p = (torch.randn(4, dtype=torch.float64) for _ in range(3))
    d = torch.randn(4, dtype=torch.float64)

    def value(h: float) -> Tensor:
        torch.manual_seed(3)
        with torch.enable_grad():
            return train(w + h * d, x, p).detach()

    expected = (value(1e-5) - value(-1e-5)) / 2e-5
    meta = w.clone().requires_grad_()
    for _ in range(2):
        torch.manual_seed(3)
        (g,) = torch.autograd.grad(mlc.compile(train)(meta, x, p), meta)
        torch.testing.assert_close((g * d).sum(), expected, rtol=1e-7, atol=1e-9)


def test_a_dropout_mask_is_the_adjoints_as_well() -> None:
    def train(w: Tensor, x: Tensor, p: Tensor) -> Tensor:
        p = nn.Parameter(p.clone())
        opt = torch.optim.SGD([p], lr=0.1)
        for _ in range(3):
            opt.zero_grad()
            noise = torch.rand(4, dtype=torch.float64)
            (nn.functional.dropout(x * p * w, 0.5) * noise).sin().sum().backward()
            opt.step()
        return (p * w).sum()

    check(train)


def test_a_draw_that_depends_on_the_step_is_the_adjoints_as_well() -> None:
    """Its bound is what the step has computed, so it cannot be drawn before the loop."""

    def train(w: Tensor, x: Tensor, p: Tensor) -> Tensor:
        p = nn.Parameter(p.clone())
        opt = torch.optim.SGD([p], lr=0.1)
        for _ in range(3):
            opt.zero_grad()
            mask = torch.bernoulli(torch.sigmoid(p.detach() * 100) * 0.5 + 0.25)
            ((x * p * w).sin() * (mask + 0.5)).sum().backward()
            opt.step()
        return (p * w).sum()

    check(train)
