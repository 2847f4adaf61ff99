"""Estimated responses where a level is entered in a loop, read beside itself, or fed by several gradients; float64."""

import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import mlc

D = torch.float64
Made = tuple[Any, ...]


@pytest.fixture(autouse=True)
def quiet() -> Any:
    """What solvers say of approximations is another test's matter."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", mlc.MlcWarning)
        yield


def made() -> Made:
    torch.manual_seed(0)
    eta = torch.tensor([0.7, -0.3], dtype=D, requires_grad=True)
    return eta, [torch.randn(2, dtype=D) for _ in range(4)]


def over_tasks(eta: Tensor, xs: list[Tensor]) -> Tensor:
    """The level is entered once for each task; eta is read behind it, too."""
    total = torch.zeros((), dtype=D)
    for x in xs:
        w = torch.zeros(2, dtype=D, requires_grad=True)
        opt = torch.optim.SGD([w], lr=0.3)
        with mlc.level("inner"):
            for _ in range(2):
                opt.zero_grad()
                (0.5 * (w - x * eta).square().sum() + 0.05 * w.pow(4).sum()).backward()
                opt.step()
        total = total + ((w - 1).square() * eta).sum()
    return total


def tasks_by_hand(eta: Tensor, xs: list[Tensor]) -> Tensor:
    total = torch.zeros((), dtype=D)
    for x in xs:
        w = torch.zeros(2, dtype=D)
        for _ in range(2):
            w = w - 0.3 * (w - x * eta + 0.2 * w.pow(3))
        total = total + ((w - 1).square() * eta).sum()
    return total


@pytest.mark.parametrize("response", [mlc.ForwardGradient(8), mlc.Evolution(sigma=1e-3, samples=8)], ids=str)
def test_a_level_that_a_loop_enters_anew_has_fresh_directions_and_no_bias(response: mlc.Response) -> None:
    eta, xs = made()
    (exact,) = torch.autograd.grad(tasks_by_hand(eta, xs), eta)
    cf = mlc.compile(over_tasks, backend="interpreter", flows={"inner": response})
    found = []
    for seed in range(25):
        eta, xs = made()
        loss = cf(eta, xs)
        torch.manual_seed(seed)
        loss.backward()
        found.append(eta.grad)
    each = torch.stack(found)
    error = each.std(0) / len(found) ** 0.5
    assert ((each.mean(0) - exact).abs() < 3 * error).all() and (error < 0.2 * exact.abs()).any()
    assert cf.report is not None
    spread = float((each - exact).square().sum(1).mean())
    assert 0.4 < cf.report.variances["inner"] / spread < 2.5  # fresh ones: variances of entries add up


def one_step(w: Tensor, eta: Tensor, x: Tensor, apart: bool) -> Tensor:
    opt = torch.optim.SGD([w], lr=0.3)
    with mlc.level("inner"):
        opt.zero_grad()
        a, b = 0.5 * (w - x - eta).square().sum(), 0.5 * (w + x).square().sum() * eta.exp().sum()
        if apart:
            a.backward()
            b.backward()
        else:
            (a + b).backward()
        opt.step()
    return (w - 1).square().sum()


@pytest.mark.parametrize(
    "response",
    [mlc.Truncated(1), mlc.Implicit(tol=1e-12), mlc.Implicit(data="all", tol=1e-12), mlc.ForwardGradient(2),
     mlc.FullyFirstOrder(1e3)], ids=str,
)  # fmt: skip
def test_two_backward_passes_before_a_step_are_one_step(response: mlc.Response) -> None:
    found = []
    for apart in (True, False):
        torch.manual_seed(0)
        w, eta = nn.Parameter(torch.zeros(3, dtype=D)), torch.randn(3, dtype=D, requires_grad=True)
        loss = mlc.compile(one_step, backend="interpreter", flows={"inner": response})(w, eta, eta.detach() + 1, apart)
        torch.manual_seed(1)
        loss.backward()
        found.append(eta.grad)
    torch.testing.assert_close(found[0], found[1], rtol=1e-9, atol=1e-12)


def test_directions_are_not_drawn_for_where_a_level_starts() -> None:
    """One meta-parameter: a slope squared is the whole second moment, so the estimate is exact but for a chi-square."""

    def fit(w: Tensor, eta: Tensor) -> Tensor:
        opt = torch.optim.SGD([w], lr=0.01)
        with mlc.level("inner"):  # straight code: the step's gradient is taken by the start itself
            opt.zero_grad()
            (w - eta).square().sum().backward()
            opt.step()
        return (10 * w).sum()

    cf = mlc.compile(fit, backend="interpreter", flows={"inner": mlc.ForwardGradient(200)})
    w, eta = nn.Parameter(torch.zeros(1, dtype=D)), torch.ones(1, dtype=D, requires_grad=True)
    cf(w, eta).backward()
    assert eta.grad is not None and abs(eta.grad.item() - 0.2) < 0.1  # with the start: standard deviation 0.7
    assert cf.report is not None and cf.report.variances["inner"] < 2 * 2 * 0.2**2 / 200


def implicit_by_hand(loss: Callable[[Tensor, Tensor], Tensor], end: Tensor, eta: Tensor, upper: Tensor) -> Tensor:
    """-(d2L/dw du)^T H^-1 c, all of it dense."""
    hessian = torch.autograd.functional.hessian(lambda w: loss(w, eta), end)
    mixed = torch.autograd.functional.jacobian(
        lambda u: torch.autograd.functional.jacobian(lambda w: loss(w, u), end, create_graph=True), eta
    )
    return -mixed.T @ torch.linalg.solve(hessian, upper)


def test_implicit_with_all_data_is_the_dense_implicit_gradient_of_the_mean_loss() -> None:
    def one(w: Tensor, eta: Tensor, x: Tensor) -> Tensor:
        return 0.5 * (w - x).square().sum() + 0.5 * (eta.exp() * (w * x).square()).sum() + 0.1 * w.pow(4).sum()

    def fit(w: Tensor, eta: Tensor, xs: list[Tensor]) -> Tensor:
        opt = torch.optim.SGD([w], lr=0.1, momentum=0.5)
        with mlc.level("inner"):
            for x in xs:
                opt.zero_grad()
                one(w, eta, x).backward()
                opt.step()
        return (w - 1).square().sum()

    _, xs = made()
    found = {}
    for data in ("all", "last"):
        w, eta = nn.Parameter(torch.ones(2, dtype=D)), torch.tensor([0.2, -0.4], dtype=D, requires_grad=True)
        flows = {"inner": mlc.Implicit("cg", tol=1e-14, data=data)}
        mlc.compile(fit, backend="interpreter", flows=flows)(w, eta, xs).backward()
        found[data] = eta.grad
    end, at = w.detach(), eta.detach()
    mean = implicit_by_hand(lambda w, u: torch.stack([one(w, u, x) for x in xs]).mean(), end, at, 2 * (end - 1))
    last = implicit_by_hand(lambda w, u: one(w, u, xs[-1]), end, at, 2 * (end - 1))
    torch.testing.assert_close(found["all"], mean, rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(found["last"], last, rtol=1e-9, atol=1e-12)
    assert (mean - last).norm() > 0.1 * mean.norm()
