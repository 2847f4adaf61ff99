"""Forward mode as stages: columns of several parameters and outputs, contracted with cotangents."""

import torch
from torch import Tensor, nn

import mlc


def test_columns_of_parameters_and_outputs_add_up() -> None:
    """Two meta-parameters, two outputs with cotangents of their own, against central differences of the plain loop."""

    def train(a: Tensor, b: Tensor, p: Tensor) -> tuple[Tensor, Tensor]:
        p = p.clone()
        for _ in range(3):
            p = p - 0.1 * (p.cos() * a + b.sum() * p)
        return p.square().sum(), (p * a).sum()

    gen = torch.Generator().manual_seed(0)
    a, b, p = (torch.randn(n, generator=gen, dtype=torch.float64) for n in (3, 2, 3))
    da, db = (torch.randn(n, generator=gen, dtype=torch.float64) for n in (3, 2))
    x, y = nn.Parameter(a.clone()), nn.Parameter(b.clone())
    cf = mlc.compile(train, flows="forward")
    one, two = cf(x, y, p)
    assert cf.plan.mode == "forward"
    ga, gb = torch.autograd.grad(0.7 * one + 1.9 * two, [x, y])

    def value(h: float) -> Tensor:
        one, two = train(a + h * da, b + h * db, p)
        return 0.7 * one + 1.9 * two

    expected = (value(1e-5) - value(-1e-5)) / 2e-5
    torch.testing.assert_close((ga * da).sum() + (gb * db).sum(), expected, rtol=1e-8, atol=1e-10)
