"""Gradients by activations, taken together with those of the weights below them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import mlc

# Operators that read their own result on the way back, and one that does not.
ACTS: dict[str, Callable[[Tensor], Tensor]] = {
    "tanh": torch.tanh, "sigmoid": torch.sigmoid, "exp": lambda x: (0.3 * x).exp(), "softmax": lambda x: x.softmax(1),
    "sqrt": lambda x: (x.square() + 0.1).sqrt(), "gelu": F.gelu, 
    "log_softmax": lambda x: torch.tanh(x).log_softmax(1),
}  # fmt: skip


def retained(model: Any, act: Any, w: Tensor, x: Tensor, y: Tensor) -> Tensor:
    hidden = act(model[0](x))
    hidden.retain_grad()
    (torch.sigmoid(w) * F.cross_entropy(model[1](hidden), y, reduction="none")).mean().backward()
    return hidden.grad.square().sum()


def asked(model: Any, act: Any, w: Tensor, x: Tensor, y: Tensor) -> Tensor:
    hidden = act(model[0](x))
    loss = (torch.sigmoid(w) * F.cross_entropy(model[1](hidden), y, reduction="none")).mean()
    first, *rest = torch.autograd.grad(loss, [hidden, *model.parameters()])
    for p, g in zip(model.parameters(), rest, strict=True):
        p.grad = g
    return first.square().sum()


def penalised(model: Any, act: Any, w: Tensor, x: Tensor, y: Tensor) -> Tensor:
    hidden = act(model[0](x))
    loss = (torch.sigmoid(w) * F.cross_entropy(model[1](hidden), y, reduction="none")).mean()
    first, weight = torch.autograd.grad(loss, [hidden, model[0].weight], create_graph=True)
    (loss + 3 * first.square().sum() + weight.square().sum()).backward()
    return first.abs().sum()


@pytest.mark.parametrize("flows", ["mixed", "reverse"])
@pytest.mark.parametrize("how", [retained, asked, penalised], ids=lambda f: f.__name__)
@pytest.mark.parametrize("act", ACTS)
def test_differences(act: str, how: Callable[..., Tensor], flows: Any) -> None:
    torch.manual_seed(4)
    data = [(torch.randn(5, 3).double(), torch.randint(4, (5,))) for _ in range(3)]
    along, start = torch.randn(5).double(), torch.randn(5).double()

    def train(w: Tensor) -> Tensor:
        torch.manual_seed(1)
        model = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 4)).double()
        opt = torch.optim.SGD(model.parameters(), lr=0.3)
        total = torch.zeros((), dtype=torch.float64)
        for x, y in data:
            opt.zero_grad()
            total = total + how(model, ACTS[act], w, x, y)
            opt.step()
        return F.cross_entropy(model[1](model[0](data[0][0])), data[0][1]) + total

    h = 1e-5
    want = (train(start + h * along) - train(start - h * along)).item() / (2 * h)
    w = start.clone().requires_grad_()
    (got,) = torch.autograd.grad(mlc.compile(train, flows=flows)(w), [w])
    assert (got @ along).item() == pytest.approx(want, rel=2e-6)
