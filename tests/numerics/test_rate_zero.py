"""Rates that are zero, as at the start of every warm-up: finite gradients, the ones that differences see."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import mlc

NAMES = ["SGD", "Adam", "AdamW", "NAdam", "RAdam", "Adamax", "Adagrad", "RMSprop", "Adadelta", "ASGD"]
STEPS = (3e-3, 1e-3, 3e-4, 1e-4, 3e-5, 1e-5)


def loop(name: str, how: str, **flags: Any) -> Callable[[Tensor], Tensor]:
    """Four steps whose rate is zero in the first, or in all."""
    torch.manual_seed(0)
    start, x, y = torch.randn(3, 4), torch.randn(4, 5, 4), torch.randint(3, (4, 5))
    options = {} if name in ("SGD", "Adadelta", "ASGD") else {"eps": 1e-3}

    def train(w: Tensor) -> Tensor:
        p = start.clone().requires_grad_()
        lr = {"schedule": 0.05, "zero": 0.0}[how]
        opt = getattr(torch.optim, name)([p], lr=lr, **options, **flags)
        warm = torch.optim.lr_scheduler.LambdaLR(opt, lambda k: k / 2) if how == "schedule" else None
        for k in range(4):
            opt.zero_grad()
            (w * F.cross_entropy(x[k] @ p.T, y[k], reduction="none")).mean().backward()
            opt.step()
            if warm is not None:
                warm.step()
        return F.cross_entropy(x[0] @ p.T, y[0]) * (1 + 0.1 * w.mean())

    return train


def agrees(train: Callable[[Tensor], Tensor], plain: Callable[[Tensor], Tensor]) -> None:
    w, along = torch.linspace(0.6, 1.4, 5), torch.tensor([0.3, -1.1, 0.7, 0.2, -0.5])
    found = [((plain(w + h * along) - plain(w - h * along)) / (2 * h)).item() for h in STEPS]
    spread, want = min((abs(a - b), b) for a, b in pairwise(found))
    w.requires_grad_()
    (g,) = torch.autograd.grad(mlc.compile(train)(w), w)
    assert g.isfinite().all()
    assert abs((g * along).sum().item() - want) <= max(1e-6 * abs(want), 5 * spread, 1e-9)


@pytest.fixture(autouse=True)
def double() -> Any:
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(before)


@pytest.mark.parametrize("how", ["schedule", "zero"])
@pytest.mark.parametrize("name", NAMES)
def test_a_warm_up_from_zero(name: str, how: str) -> None:
    train = loop(name, how)
    agrees(train, lambda w: train(w).detach())


@pytest.mark.parametrize("flags", [{"weight_decay": 0.1}, {"amsgrad": True}, {"maximize": True}], ids=str)
@pytest.mark.parametrize("name", ["Adam", "AdamW"])
def test_a_warm_up_with_flags(name: str, flags: dict[str, Any]) -> None:
    train = loop(name, "schedule", **flags)
    agrees(train, lambda w: train(w).detach())


@pytest.mark.parametrize("name", ["Adam", "AdamW"])
def test_a_rate_that_is_a_tensor(name: str) -> None:
    """The rate is 0 and has a derivative: by it the update is differentiated, not only what it is applied to."""
    torch.manual_seed(0)
    start, x = torch.randn(3), torch.randn(5, 3)

    def train(lr: Tensor, w: Tensor) -> Tensor:
        p = start.clone().requires_grad_()
        opt = getattr(torch.optim, name)([p], lr=1.0, eps=1e-3)
        opt.param_groups[0]["lr"] = lr  # the constructor takes no negative rate, which differences need
        for _ in range(3):
            opt.zero_grad()
            (w * (x @ p).square()).sum().backward()
            opt.step()
        return (x @ p).sin().sum()

    def value(lr: float, w: Tensor) -> float:
        return train(torch.tensor(lr), w).item()

    w = torch.linspace(0.5, 1, 5)
    found = [(value(h, w) - value(-h, w)) / (2 * h) for h in STEPS]
    spread, want = min((abs(a - b), b) for a, b in pairwise(found))
    lr = torch.zeros((), requires_grad=True)
    g, h = torch.autograd.grad(mlc.compile(train)(lr, w.requires_grad_()), [lr, w])
    assert abs(g.item() - want) <= max(1e-6 * abs(want), 5 * spread)
    assert torch.equal(h, torch.zeros(5))
