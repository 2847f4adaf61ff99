"""Derivatives that PyTorch gets wrong inside the user's loop: refused by name, and the advice works."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

import mlc


class Written(nn.Module):
    """What the refusal advises: the norm written out."""

    def __init__(self, layer: nn.Linear) -> None:
        super().__init__()
        self.v, self.bias = nn.Parameter(layer.weight.detach().clone()), nn.Parameter(layer.bias.detach().clone())
        self.g = nn.Parameter(torch.linalg.vector_norm(layer.weight.detach(), dim=1, keepdim=True))

    def forward(self, x: Tensor) -> Tensor:
        v, g = self.v, self.g
        return nn.functional.linear(x, v * (g / torch.linalg.vector_norm(v, dim=1, keepdim=True)), self.bias)


WRAPS: dict[str, Callable[[nn.Linear], nn.Module]] = {
    "fused": nn.utils.parametrizations.weight_norm, "written": Written,
}  # fmt: skip


def make(wrap: str, shift: float = 0.0) -> tuple[nn.Module, Tensor, Tensor]:
    torch.manual_seed(0)
    net = nn.Sequential(WRAPS[wrap](nn.Linear(3, 4).double()), nn.Tanh(), nn.Linear(4, 1).double())
    x = torch.randn(5, 3, dtype=torch.float64)
    return net, torch.tensor(0.3 + shift, dtype=torch.float64, requires_grad=True), x


def train(net: nn.Module, w: Tensor, x: Tensor) -> Tensor:
    """A penalty on the weights' own gradient: the second derivative of the layer."""
    opt = torch.optim.SGD(net.parameters(), lr=0.1)
    for _ in range(2):
        opt.zero_grad()
        loss = net(x).square().mean()
        slopes = torch.autograd.grad(loss, list(net.parameters()), create_graph=True)
        (loss + w * sum(g.square().sum() for g in slopes)).backward()
        opt.step()
    return net(x).square().mean()


def test_the_second_derivative_of_weight_norm_is_refused_by_name() -> None:
    with pytest.raises(mlc.MlcError, match="PyTorch gets the second derivative of weight_norm wrong") as e:
        mlc.compile(train)(*make("fused"))
    assert "vector_norm(v, dim=1, keepdim=True)" in e.value.advice
    assert e.value.loc is not None


def test_the_advice_works() -> None:
    args = make("written")
    (got,) = torch.autograd.grad(mlc.compile(train)(*args), [args[1]])
    h = 1e-5
    want = (train(*make("written", h)).item() - train(*make("written", -h)).item()) / (2 * h)
    assert got.item() == pytest.approx(want, rel=1e-6)
