"""What a step draws is the same in the step and in its adjoint."""

import torch
from torch import Tensor, nn

import mlc


def test_a_dropout_mask_is_the_adjoints_as_well() -> None:
    def train(w: Tensor, x: Tensor, p: Tensor) -> Tensor:
        p = nn.Parameter(p.clone())
        opt = torch.optim.SGD([p], lr=0.1)
        for _ in range(3):
            opt.zero_grad()
            scale = torch.rand(())  # read once more by the second draw's bound
            noise = torch.empty(4, dtype=torch.float64).uniform_(0, 1) * scale
            (nn.functional.dropout(x * p * w, 0.5) * noise).sin().sum().backward()
            opt.step()
        return (p * w).sum()

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
