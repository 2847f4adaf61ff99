"""Responses of several levels in one program, mixed, against full unrolling."""

import warnings
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import mlc

D = torch.float64
CG = mlc.Implicit("cg", steps=40, tol=1e-14)


@pytest.fixture(autouse=True)
def quiet() -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", mlc.MlcWarning)
        yield


def made() -> tuple[Tensor, ...]:
    torch.manual_seed(0)
    h = torch.diag(torch.tensor([1.0, 1.4, 1.8], dtype=D))
    w, v = nn.Parameter(torch.zeros(3, dtype=D)), nn.Parameter(torch.zeros(3, dtype=D))
    return w, v, torch.randn(3, dtype=D, requires_grad=True), h


def chain(w: Tensor, v: Tensor, eta: Tensor, h: Tensor) -> Tensor:
    """eta -> pre -> fine -> result, and eta -> fine: two paths."""
    a, c = torch.optim.SGD([w], lr=0.5), torch.optim.SGD([v], lr=0.3)
    with mlc.level("pre"):
        for _ in range(60):
            a.zero_grad()
            (0.5 * w @ h @ w - (eta * w).sum()).backward()
            a.step()
    with mlc.level("fine"):
        for _ in range(120):
            c.zero_grad()
            (0.5 * (v - torch.sin(w)).square().sum() + 0.5 * (eta.exp() * v.square()).sum()).backward()
            c.step()
    return (v - 1).square().sum()


def top_down(w: Tensor, v: Tensor, eta: Tensor, h: Tensor) -> Tensor:
    """eta enters only the middle problem, whose solution enters the bottom one (Betty returns 0 here)."""
    a, c = torch.optim.SGD([w], lr=0.5), torch.optim.SGD([v], lr=0.3)
    with mlc.level("middle"):
        for _ in range(60):
            a.zero_grad()
            (0.5 * w @ h @ w - (eta * w).sum()).backward()
            a.step()
    with mlc.level("bottom"):
        for _ in range(60):
            c.zero_grad()
            (0.5 * (v - w).square().sum() + 0.1 * v.square().sum()).backward()
            c.step()
    return (v * torch.tensor([1.0, -2.0, 3.0], dtype=D)).sum()


def gradient(fn: Any, flows: Any = None) -> Tensor:
    x = made()
    mlc.compile(fn, backend="interpreter", flows=flows)(*x).backward()
    assert x[2].grad is not None
    return x[2].grad


def apart(a: Tensor, b: Tensor) -> float:
    return float((a - b).norm() / b.norm())


MIXED = [
    {"pre": CG}, {"fine": CG}, {"pre": CG, "fine": CG}, {"pre": mlc.Truncated(60), "fine": CG},
    {"pre": CG, "fine": mlc.FiniteDifference()}, {"pre -> L0": CG}, {"L1": CG, "fine": mlc.Unroll()},
]  # fmt: skip


@pytest.mark.parametrize("flows", MIXED, ids=lambda f: " ".join(f"{k}:{type(r).__name__}" for k, r in f.items()))
def test_mixtures_agree_with_the_unroll_of_two_paths(flows: Any) -> None:
    assert apart(gradient(chain, flows), gradient(chain)) < 1e-9


def test_a_top_down_chain_is_not_zero() -> None:
    exact = gradient(top_down)
    h = made()[3]
    closed = torch.linalg.solve(h, torch.tensor([1.0, -2.0, 3.0], dtype=D) / 1.2)
    assert apart(exact, closed) < 1e-9
    assert apart(gradient(top_down, {"middle": CG, "bottom": CG}), closed) < 1e-9


def nested(w: Tensor, reg: Tensor, meta: Tensor, h: Tensor) -> Tensor:
    """The loop's own gradient of the middle level goes through the inner training."""
    top = torch.optim.SGD([reg], lr=0.1)
    for _ in range(2):
        opt = torch.optim.SGD([w], lr=0.4)
        with mlc.level("inner"):
            for _ in range(30):
                opt.zero_grad()
                (0.5 * w @ h @ w - w.sum() + 0.5 * (reg.exp() * w.square()).sum()).backward()
                opt.step()
        top.zero_grad()
        ((w - 1).square() * meta.exp()).sum().backward()
        top.step()
    return (w - 0.5).square().sum()


RESPONSES = [mlc.Implicit("cg", tol=1e-14), mlc.Implicit("gmres", tol=1e-14), mlc.Truncated(30)]


@pytest.mark.parametrize("response", RESPONSES, ids=str)
def test_a_gradient_of_the_loop_goes_through_a_response(response: mlc.Response) -> None:
    """The second derivative of the inner level is that of what the response computed (a solve of a solve)."""
    assert apart(gradient(nested, {"inner": response}), gradient(nested)) < 1e-6
