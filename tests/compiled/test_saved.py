"""What the backward stage reads is what the call read, whatever happens to the tensor objects in between."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import mlc


def make() -> dict[str, Any]:
    torch.manual_seed(3)
    model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)).double()
    data = [(torch.randn(4, 3).double(), torch.randint(2, (4,))) for _ in range(3)]
    return {"model": model, "w": torch.rand(4).double().requires_grad_(), "data": data}


def rebinding(model: nn.Module, w: Tensor, data: list[tuple[Tensor, Tensor]]) -> Tensor:
    for x, y in data:
        model.zero_grad()
        (w * F.cross_entropy(model(x), y, reduction="none")).mean().backward()
        for p in model.parameters():
            p.data = p.data - 0.1 * p.grad.data
    return F.cross_entropy(model(data[0][0]), data[0][1])


def writing(model: nn.Module, w: Tensor, data: list[tuple[Tensor, Tensor]]) -> Tensor:
    opt = torch.optim.SGD(model.parameters(), lr=0.1)
    for x, y in data:
        opt.zero_grad()
        (w * F.cross_entropy(model(x), y, reduction="none")).mean().backward()
        opt.step()
    return F.cross_entropy(model(data[0][0]), data[0][1])


def slope(loop: Callable[..., Tensor], h: float = 1e-5) -> float:
    """The derivative of the plain function by every weight at once."""

    def at(shift: float) -> float:
        args = make()
        args["w"].data.add_(shift)
        return loop(**args).item()

    return (at(h) - at(-h)) / (2 * h)


def rebind(args: dict[str, Any]) -> None:
    """Every tensor object of the arguments gets another memory."""
    for t in [*args["model"].parameters(), args["w"], *(t for batch in args["data"] for t in batch)]:
        t.data = torch.zeros_like(t)


def nothing(args: dict[str, Any]) -> None:
    """The usual call."""


@pytest.mark.parametrize("after", [nothing, rebind], ids=lambda f: f.__name__)
@pytest.mark.parametrize("loop", [rebinding, writing], ids=lambda f: f.__name__)
def test_every_call(loop: Callable[..., Tensor], after: Callable[[dict[str, Any]], None]) -> None:
    compiled = mlc.compile(loop)
    for _ in range(3):
        args = make()
        value = compiled(**args)
        w = args["w"]
        after(args)
        (got,) = torch.autograd.grad(value, [w])
        assert got.sum().item() == pytest.approx(slope(loop), rel=1e-7)
    assert compiled.recordings == 1


@pytest.mark.parametrize("calls", [1, 2])
def test_a_write_is_told(calls: int) -> None:
    compiled = mlc.compile(writing)
    for _ in range(calls):
        args = make()
        value = compiled(**args)
    args["data"][1][0].zero_()
    with pytest.raises(mlc.MlcError, match="in-place operation before backward") as e:
        torch.autograd.grad(value, [args["w"]])
    assert "clone()" in e.value.advice
