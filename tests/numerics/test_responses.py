"""Responses against closed forms and the full unroll, float64."""

import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
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


def gradient(fn: Callable[..., Tensor], made: Made, flows: Any = None, at: int = 1) -> Tensor:
    cf = mlc.compile(fn, backend="interpreter", flows=flows)
    cf(*made).backward()
    return made[at].grad.clone()


def apart(a: Tensor, b: Tensor) -> float:
    return float((a - b).norm() / b.norm())


# ---- quadratic: theta* = H^-1 (b + eta), condition number of H given


def quadratic(condition: float, n: int = 6) -> tuple[Made, Tensor]:
    torch.manual_seed(0)
    q, _ = torch.linalg.qr(torch.randn(n, n, dtype=D))
    h = q @ torch.diag(torch.logspace(0, float(torch.tensor(condition).log10()), n, dtype=D)) @ q.T
    h = (h + h.T) / 2
    eta = torch.randn(n, dtype=D, requires_grad=True)
    star = torch.linalg.solve(h, eta.detach())
    w = nn.Parameter(star.clone())  # it has converged: what is left is the solver's
    exact = torch.linalg.solve(h, 2 * (star - 1))
    return (w, eta, h, 1 / condition), exact


def on_quadratic(w: Tensor, eta: Tensor, h: Tensor, lr: float) -> Tensor:
    opt = torch.optim.SGD([w], lr=lr)
    with mlc.level("inner"):
        for _ in range(3):
            opt.zero_grad()
            (0.5 * w @ h @ w - eta @ w).backward()
            opt.step()
    return (w - 1).square().sum()


@pytest.mark.parametrize("condition", [7.0, 650.0])
@pytest.mark.parametrize("solver", ["cg", "gmres"])
def test_krylov_solvers_reach_the_closed_form(condition: float, solver: str) -> None:
    made, exact = quadratic(condition)
    found = gradient(on_quadratic, made, {"inner": mlc.Implicit(solver, steps=60, tol=1e-14)})
    assert apart(found, exact) < 1e-10


def test_neumann_falls_as_its_theory_says() -> None:
    _, exact = quadratic(7.0)
    errors = []
    for k in (5, 15, 60):
        flows = {"inner": mlc.Implicit("neumann", steps=k, tol=0.0)}
        errors.append(apart(gradient(on_quadratic, quadratic(7.0)[0], flows), exact))
    assert (
        errors[0] < (1 - 1 / 7.5) ** 4 and errors[1] < errors[0] * (1 - 1 / 7.5) ** 8 and errors[2] < 1e-2 * errors[0]
    )


def test_nystrom_is_exact_with_every_column() -> None:
    made, exact = quadratic(7.0)
    assert apart(gradient(on_quadratic, made, {"inner": mlc.Implicit("nystrom", steps=6, damping=1e-13)}), exact) < 1e-9
    made, _ = quadratic(7.0)
    assert apart(gradient(on_quadratic, made, {"inner": mlc.Implicit("nystrom", steps=2, damping=0.1)}), exact) > 1e-3


@pytest.mark.parametrize("decay", [1.0, 0.01])
def test_logistic_regression_with_a_learned_penalty(decay: float) -> None:
    torch.manual_seed(1)
    x, y = torch.randn(30, 3, dtype=D), torch.randint(2, (30,)).to(D)
    log = torch.tensor(decay, dtype=D).log()

    def inner(w: Tensor, eta: Tensor) -> Tensor:
        return F.binary_cross_entropy_with_logits(x @ w, y) + 0.5 * eta.exp() * w.square().sum()

    star = torch.zeros(3, dtype=D, requires_grad=True)
    for _ in range(40):  # Newton
        (g,) = torch.autograd.grad(inner(star, log), star, create_graph=True)
        h = torch.stack([torch.autograd.grad(gi, star, retain_graph=True)[0] for gi in g])
        star = (star - torch.linalg.solve(h, g)).detach().requires_grad_()
    (v,) = torch.autograd.grad((star - 1).square().sum(), star)
    exact = -(torch.linalg.solve(h.detach(), v) @ (decay * star.detach())).reshape(())
    w, eta = nn.Parameter(star.detach().clone()), log.clone().requires_grad_()

    def fit(w: Tensor, eta: Tensor) -> Tensor:
        opt = torch.optim.SGD([w], lr=0.5)
        with mlc.level("inner", response=mlc.Implicit("cg", steps=50, tol=1e-14)):
            for _ in range(2):
                opt.zero_grad()
                inner(w, eta).backward()
                opt.step()
        return (w - 1).square().sum()

    assert apart(gradient(fit, (w, eta)), exact) < 1e-10


# ---- what the loop may look like


def network(steps: int) -> Made:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 1)).double()
    weigh = torch.randn(5, dtype=D, requires_grad=True)
    batches = [(torch.randn(5, 3, dtype=D), torch.randn(5, dtype=D)) for _ in range(steps)]
    return model, weigh, batches


def reweighted(optimizer: str) -> Callable[..., Tensor]:
    def train(model: nn.Module, weigh: Tensor, batches: Any) -> Tensor:
        cls = getattr(torch.optim, optimizer)
        opt = cls(model.parameters(), lr=0.05, **({"momentum": 0.9} if optimizer == "SGD" else {"eps": 1e-2}))
        with mlc.level("inner"):
            for x, y in batches:
                opt.zero_grad()
                losses = (model(x)[:, 0] - y).square()
                scale = losses.detach().mean()  # a stopped value of its own
                (torch.sigmoid(weigh) * losses / scale).mean().backward()
                opt.step()
        x, y = batches[0]
        return (model(x)[:, 0] - y).square().mean()

    return train


@pytest.mark.parametrize("optimizer", ["SGD", "Adam"])
def test_truncated_with_all_steps_is_the_unroll_and_with_fewer_is_not(optimizer: str) -> None:
    fn = reweighted(optimizer)
    exact = gradient(fn, network(5))
    assert apart(gradient(fn, network(5), {"inner": mlc.Truncated(5)}), exact) < 1e-12
    assert apart(gradient(fn, network(5), {"inner": mlc.Truncated(2)}), exact) > 1e-3


def test_truncated_is_the_unroll_from_where_it_begins() -> None:
    """The last two steps alone, from the state after the first three."""

    def last(model: nn.Module, weigh: Tensor, batches: Any) -> Tensor:
        opt = torch.optim.SGD(model.parameters(), lr=0.05)
        with mlc.level("inner"):
            for x, y in batches:
                opt.zero_grad()
                (torch.sigmoid(weigh) * (model(x)[:, 0] - y).square()).mean().backward()
                opt.step()
        x, y = batches[-1]
        return (model(x)[:, 0] - y).square().mean()

    found = gradient(last, network(5), {"inner": mlc.Truncated(2)})
    model, weigh, batches = network(5)
    opt = torch.optim.SGD(model.parameters(), lr=0.05)
    for x, y in batches[:3]:
        opt.zero_grad()
        (torch.sigmoid(weigh.detach()) * (model(x)[:, 0] - y).square()).mean().backward()
        opt.step()
    assert apart(found, gradient(last, (model, weigh, batches[3:]))) < 1e-12


@pytest.mark.parametrize("optimizer", ["SGD", "Adam"])
def test_differences_follow_the_unroll_and_honour_stopped_values(optimizer: str) -> None:
    fn = reweighted(optimizer)
    assert apart(gradient(fn, network(4), {"inner": mlc.FiniteDifference()}), gradient(fn, network(4))) < 1e-6


def test_first_order_keeps_what_the_update_reads() -> None:
    def tuned(model: nn.Module, lr: Tensor, batches: Any) -> Tensor:
        opt = torch.optim.SGD(model.parameters(), lr=lr)
        with mlc.level("inner", response=mlc.FirstOrder()):
            for x, y in batches:
                opt.zero_grad()
                (model(x)[:, 0] - y).square().mean().backward()
                opt.step()
        x, y = batches[0]
        return (model(x)[:, 0] - y).square().mean()

    model, _, batches = network(3)
    lr = torch.tensor(0.1, dtype=D, requires_grad=True)
    found = gradient(tuned, (model, lr, batches))
    model, _, batches = network(3)
    total = [torch.zeros_like(p) for p in model.parameters()]
    for x, y in batches:
        gs = torch.autograd.grad((model(x)[:, 0] - y).square().mean(), list(model.parameters()))
        with torch.no_grad():
            for p, g, t in zip(model.parameters(), gs, total, strict=True):
                p -= 0.1 * g
                t += g
    x, y = batches[0]
    ct = torch.autograd.grad((model(x)[:, 0] - y).square().mean(), list(model.parameters()))
    assert apart(found, -sum((c * t).sum() for c, t in zip(ct, total, strict=True))) < 1e-12  # type: ignore[arg-type]


# ---- estimates


@pytest.mark.parametrize("response", [mlc.ForwardGradient(4), mlc.Evolution(sigma=1e-4, samples=4)], ids=str)
def test_estimates_are_unbiased(response: mlc.Response) -> None:
    made, _ = quadratic(3.0, n=3)
    exact = gradient(on_quadratic, made)
    cf = mlc.compile(on_quadratic, backend="interpreter", flows={"inner": response})
    found = []
    for seed in range(200):
        made, _ = quadratic(3.0, n=3)
        loss = cf(*made)
        torch.manual_seed(1000 + seed)
        loss.backward()
        found.append(made[1].grad.clone())
    each = torch.stack(found)
    error = each.std(0) / len(found) ** 0.5
    assert ((each.mean(0) - exact).abs() < 3 * error).all()
    assert cf.report is not None and cf.report.variances["inner"] > 0
    spread = float((each - exact).square().sum(1).mean())
    assert 0.6 < spread / ((3 + 1) * float(exact.square().sum()) / 4) < 1.6  # (n + 1) |g|^2 / samples


def test_estimates_repeat_with_the_generator() -> None:
    cf = mlc.compile(on_quadratic, backend="interpreter", flows={"inner": mlc.ForwardGradient()})
    found = []
    for _ in range(2):
        made, _ = quadratic(3.0, n=3)
        torch.manual_seed(5)
        cf(*made).backward()
        found.append(made[1].grad)
    assert torch.equal(*found)


def test_two_first_order_runs_come_closer_with_the_penalty() -> None:
    def fit(w: Tensor, eta: Tensor, h: Tensor, lr: float) -> Tensor:
        opt = torch.optim.SGD([w], lr=lr)
        with mlc.level("inner"):
            for _ in range(60):
                opt.zero_grad()
                (0.5 * w @ h @ w - eta @ w + 0.01 * w.pow(4).sum()).backward()
                opt.step()
        return (w - 1).square().sum()

    exact = gradient(fit, quadratic(3.0, n=3)[0], {"inner": mlc.Implicit("cg", tol=1e-13)})
    errors = [apart(gradient(fit, quadratic(3.0, n=3)[0], {"inner": mlc.FullyFirstOrder(p)}), exact)
              for p in (10.0, 1000.0, 100000.0)]  # fmt: skip
    assert errors[1] < 0.02 * errors[0] + 1e-9 and errors[2] < 1e-5
