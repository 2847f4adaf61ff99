"""A gradient by an activation moves the activation alone, not what its operator saved."""

import torch
from torch import Tensor, nn

import mlc


def test_a_gradient_by_an_activation_and_by_the_weights_below_it() -> None:
    """``tanh`` reads its result on the way back: differences of the plain loop see that it is not moved."""
    x = torch.rand(3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)

    def train(s: Tensor) -> Tensor:
        p = nn.Parameter(torch.full((3,), 0.3, dtype=torch.float64))
        for _ in range(3):
            h = (p * x).tanh()
            loss = (h * h * s).sum() + (p * s).sin().sum()
            gp, gh = torch.autograd.grad(loss, [p, h])
            with torch.no_grad():
                p -= 0.1 * gp * gh.exp()
        return (p * s).square().sum()

    s, d = torch.rand(3, dtype=torch.float64), torch.rand(3, dtype=torch.float64)
    expected = (train(s + 1e-5 * d) - train(s - 1e-5 * d)) / 2e-5
    meta = s.clone().requires_grad_()
    for flows in ("mixed", "reverse"):
        (g,) = torch.autograd.grad(mlc.compile(train, flows=flows)(meta), meta)
        torch.testing.assert_close((g * d).sum(), expected.detach(), rtol=1e-7, atol=1e-9)
