"""Adjoints of levels: their norms against autograd, and when a trend is worth a warning."""

import warnings
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

import mlc
from mlc.compiled.adjoints import Adjoints

A = torch.tensor([[2.0, 0.3], [0.3, 1.0]], dtype=torch.float64)


def start() -> tuple[Tensor, Tensor]:
    return torch.tensor([0.4, -0.3], dtype=torch.float64), torch.ones(2, dtype=torch.float64, requires_grad=True)


def descend(x0: Tensor, m: Tensor) -> Tensor:
    x = x0.clone().requires_grad_()
    opt = torch.optim.SGD([x], lr=0.1)
    for _ in range(3):
        for _ in range(2):
            opt.zero_grad()
            ((m * x).sin() @ A @ x).backward()
            opt.step()
    return (x**3).sum()


def reference() -> list[float]:
    x, m = start()
    x.requires_grad_()
    states = []
    for _ in range(6):
        (g,) = torch.autograd.grad((m * x).sin() @ A @ x, x, create_graph=True)
        x = x - 0.1 * g
        states.append(x)
    loss = (x**3).sum()
    return [float(torch.autograd.grad(loss, s, retain_graph=True)[0].norm()) for s in reversed(states)]


@pytest.mark.parametrize("options", [{"flows": "mixed"}, {"flows": "reverse", "levers": {"slots": 2}}])
def test_norms_are_those_of_autograd(options: dict[str, object]) -> None:
    compiled = mlc.compile(descend, backend="interpreter", **options)  # type: ignore[arg-type]
    loss = compiled(*start())
    assert not compiled.report.adjoints
    loss.backward(retain_graph=True)
    loss.backward()  # told once, not twice
    found = compiled.report.adjoints["L1"]
    assert found.runs == (tuple(found),)  # epochs belong to one run
    torch.testing.assert_close(list(found), reference(), rtol=1e-12, atol=0)
    assert "adjoint" in str(compiled.report) and compiled.report.as_dict()["adjoints"]["L1"]["norms"] == list(found)


def test_tangents_are_those_of_forward_mode() -> None:
    compiled = mlc.compile(descend, backend="interpreter", flows="forward")
    compiled(*start()).backward()
    x, m = start()
    x = x.requires_grad_()
    for _ in range(6):
        (g,) = torch.autograd.grad((m * x).sin() @ A @ x, x, create_graph=True)
        x = x - 0.1 * g
    jacobian = torch.stack([torch.autograd.grad(v, m, retain_graph=True)[0] for v in x])
    found = compiled.report.adjoints["L1"]
    assert found.kind == "tangent" and found[0] == pytest.approx(float(jacobian.norm()), rel=1e-12)


def iterate(r: Tensor, x0: Tensor, steps: int, rate: float, loss: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
    x = x0.clone().requires_grad_()
    opt = torch.optim.SGD([x], lr=rate)
    for _ in range(steps):
        opt.zero_grad()
        loss(x, r).sum().backward()
        opt.step()
    return x.sum()


def logistic(x: Tensor, r: Tensor) -> Tensor:
    return x * x / 2 - r * (x * x / 2 - x**3 / 3)  # a step of rate 1 is x <- r x (1 - x)


def bowl(x: Tensor, r: Tensor) -> Tensor:
    return (x - r).square() / 2


CASES = [
    (24, 1.0, logistic, 3.9, "mixed", "grows", 1.6),
    (24, 1.0, logistic, 3.9, "forward", "grows", 1.8),
    (20, 0.5, bowl, 3.9, "mixed", "vanishes", 0.5),
    (20, 0.05, bowl, 3.9, "mixed", None, 0.95),
    (6, 0.9, bowl, 3.9, "mixed", None, 0.1),  # too short for a trend
]


@pytest.mark.parametrize(("steps", "rate", "loss", "r", "flows", "trend", "factor"), CASES)
def test_exponential_trends_are_warned_of(
    steps: int, rate: float, loss: Callable[[Tensor, Tensor], Tensor], r: float, flows: str, trend: str, factor: float
) -> None:
    compiled = mlc.compile(
        lambda r, x0: iterate(r, x0, steps, rate, loss), backend="interpreter", flows=flows, verify=None
    )
    given = torch.tensor(r, dtype=torch.float64, requires_grad=True), torch.tensor([0.3], dtype=torch.float64)
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always", mlc.AdjointWarning)
        for _ in range(2):
            compiled(*given).backward()
    messages = [str(w.message) for w in said if w.category is mlc.AdjointWarning]
    found = compiled.report.adjoints["L1"]
    assert found.trend == trend and found.rate == pytest.approx(factor, rel=0.15)
    assert len(messages) == (trend is not None)
    if trend:
        assert f"gradient {trend} exponentially" in messages[0] and f"factor of {found.rate:.3g} a" in messages[0]
        assert "mlc.Truncated" in messages[0] and "test_adjoints.py" in messages[0]


def test_plateaus_jumps_and_overflows() -> None:
    def trend(norms: list[float]) -> str | None:
        return Adjoints("L1", "adjoint", (tuple(norms),)).trend

    assert trend([10.0 ** -min(k, 4) for k in range(40)]) is None  # falls fast, then stays
    assert trend([1.0] * 20 + [1e5] * 20) is None  # one jump
    assert trend([3.0**k for k in range(20)] + [float("inf")] * 5) == "grows"
    assert trend([0.1**k for k in range(12)] + [0.0] * 30) == "vanishes"
    assert trend([float("nan")] * 20) is None and Adjoints("L1", "adjoint", ()).rate is None


def test_inner_gradients_report_the_runs_of_a_level_below() -> None:
    def tuned(x0: Tensor, decay: Tensor, m: Tensor) -> Tensor:
        top = torch.optim.SGD([decay], lr=0.1)
        for _ in range(2):
            x = x0.clone().requires_grad_()
            opt = torch.optim.SGD([x], lr=0.1)
            with mlc.level("inner"):
                for _ in range(3):
                    opt.zero_grad()
                    (decay.exp() * x.square().sum() + (m * x).sum()).backward()
                    opt.step()
            top.zero_grad()
            (x**3).sum().backward()
            top.step()
        return (decay * m).sum()

    x0, m = start()
    compiled = mlc.compile(tuned, backend="interpreter", flows="mixed")
    compiled(x0, torch.zeros((), dtype=torch.float64, requires_grad=True), m).backward()
    found = compiled.report.adjoints["inner"]
    assert found.kind == "inner" and [len(run) for run in found.runs] == [3, 3]
    assert compiled.report.adjoints["L1"].kind == "adjoint"
