"""Roots inside compiled functions: one node, called again at every call, differentiated in every mode."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import mlc
from mlc.ir.parse import parse
from tests.implicit.problems import (
    D,
    data,
    lasso,
    lasso_update,
    qp,
    qp_condition,
    ridge,
    ridge_condition,
    svm,
    svm_update,
)
from tests.implicit.referee import differences, error, gradient
from tests.implicit.ridges import X_VAL, P, X, Y, agree, calls, closed, fit, validation


def test_one_node_called_again_with_the_values_of_each_call(capsys: pytest.CaptureFixture[str]) -> None:
    @mlc.compile
    def outer(p: Tensor, x: Tensor, y: Tensor) -> Tensor:
        return validation(fit(p.exp(), x, y))

    for k in range(3):
        x, y, _, _ = data(seed=k)
        agree(outer, lambda p, x, y: validation(closed(p.exp(), x, y)), [P - k, x, y])
        assert capsys.readouterr().out.count("solved") == 1
    assert outer.recordings == 1 and calls(outer) == 1


def test_the_gradient_is_that_of_the_function() -> None:
    @mlc.compile
    def outer(p: Tensor) -> Tensor:
        return validation(fit(p.exp(), X, Y))

    assert error(gradient(outer, P), differences(lambda p: validation(torch.tensor(ridge(p.exp(), X, Y))), P)) < 1e-8


@pytest.mark.parametrize("second", [False, True])
def test_inside_an_inner_gradient(second: bool, capsys: pytest.CaptureFixture[str]) -> None:
    """The root stands in a loss that an inner level differentiates, and that level is differentiated."""

    def train(solve: Any) -> Callable[[Tensor], Tensor]:
        def run(p: Tensor) -> Tensor:
            model = nn.Linear(5, 1).double()
            with torch.no_grad():
                model.weight.copy_(torch.linspace(-1, 1, 5)[None])
                model.bias.fill_(0.1)
            opt = torch.optim.Adam(model.parameters(), lr=0.05, eps=1e-3)
            for _ in range(3):
                opt.zero_grad()
                w = solve(p.exp() + model.weight[0] ** 2, X, Y)
                loss = validation(w) + model(X_VAL).pow(2).mean()
                if second:
                    (g,) = torch.autograd.grad(loss, model.weight, create_graph=True)
                    loss = loss + (g**2).sum()
                loss.backward()
                opt.step()
            return validation(solve(p.exp() + model.weight[0] ** 2, X, Y))

        return run

    expected = differences(train(closed), P)
    for options in ({}, {"flows": "reverse"}) if second else ({"memory": "min"}, {"levers": {"slots": 1}}):
        compiled = mlc.compile(train(fit), **options)
        for _ in range(2):
            capsys.readouterr()
            found = gradient(compiled, P)
            assert capsys.readouterr().out.count("solved") == 4  # none in the backward pass
            assert error(found, expected) < 1e-7
        assert compiled.recordings == 1 and calls(compiled) == 2  # three steps are one loop


def test_forward_mode_falls_back_or_is_right() -> None:
    for p in (P, torch.tensor(0.4, dtype=D)):
        compiled = mlc.compile(lambda p: validation(fit(p.exp(), X, Y)), flows="forward")
        agree(compiled, lambda p: validation(closed(p.exp(), X, Y)), [p])


@pytest.mark.slow
def test_inductor_leaves_the_node_alone() -> None:
    compiled = mlc.compile(lambda p: torch.tanh(validation(fit(p.exp() * 2 + 1, X, Y)) * 3), backend="inductor")
    for _ in range(2):
        agree(compiled, lambda p: torch.tanh(validation(closed(p.exp() * 2 + 1, X, Y)) * 3), [P])


def test_unrolled_training_through_what_a_solver_gave() -> None:
    """The solution starts an inner training."""

    def run(p: Tensor, solve: Any) -> Tensor:
        w = solve(p.exp(), X, Y)
        for _ in range(3):
            (g,) = torch.autograd.grad(((X @ w - Y).abs() ** 3).mean() + (w**2).sum(), w, create_graph=True)
            w = w - 0.05 * g
        return validation(w)

    agree(mlc.compile(lambda p: run(p, fit)), lambda p: run(p, closed), [P])


def test_conditions_and_solvers_that_read_by_closure() -> None:
    """Modules, arguments of the compiled function, values computed in it: read anew at every call."""
    torch.manual_seed(0)
    net = nn.Linear(3, 5).double()

    def run(x: Tensor, y: Tensor, z: Tensor, implicit: bool) -> Tensor:
        scale = y.abs().mean()

        def condition(w: Tensor) -> Tensor:
            return x.T @ (x @ w - y) + scale * net(z).exp() * w

        def solve() -> Tensor:
            return closed(scale * net(z).exp(), x, y)

        return validation(mlc.root(condition)(solve)() if implicit else solve())

    compiled = mlc.compile(run)
    for k in range(3):
        x, y, _, _ = data(seed=k)
        z = torch.full((3,), 0.1 * k + 0.1, dtype=D)
        found, expected = (torch.autograd.grad(f(x, y, z, i), list(net.parameters()))
                           for f, i in ((compiled, True), (run, False)))  # fmt: skip
        assert max(map(error, found, expected)) < 1e-9
        with torch.no_grad():
            net.weight.mul_(1.5)
    assert compiled.recordings == 3  # the solver is made in the call, and may hold anything


def test_global_tensors_that_the_solver_reads_become_inputs() -> None:
    x, y, _, _ = data(seed=3)

    @mlc.root(lambda w, p: ridge_condition(w, p, x, y))
    def solve(p: Tensor) -> np.ndarray:
        return ridge(p, x, y)

    compiled = mlc.compile(lambda p: validation(solve(p.exp())))
    agree(compiled, lambda p: validation(closed(p.exp(), x, y)), [P])
    with torch.no_grad():
        x.mul_(1.3)
    agree(compiled, lambda p: validation(closed(p.exp(), x, y)), [P])
    x, y = data(seed=4)[:2]
    agree(compiled, lambda p: validation(closed(p.exp(), x, y)), [P])
    assert compiled.recordings == 1


def test_folds_of_a_cross_validation() -> None:
    """Solvers that read a loop variable by closure: each keeps its own."""
    folds = [data(seed=k)[:2] for k in range(3)]

    def run(p: Tensor, implicit: bool = True) -> Tensor:
        total = torch.zeros((), dtype=D)
        for k in range(3):
            x, y = folds[k]

            def solve(p: Tensor) -> Tensor:
                return closed(p, *folds[k])  # noqa: B023

            def condition(w: Tensor, p: Tensor, x: Tensor = x, y: Tensor = y) -> Tensor:
                return ridge_condition(w, p, x, y)

            total = total + validation(mlc.root(condition)(solve)(p.exp()) if implicit else solve(p.exp()))
        return total

    compiled = mlc.compile(run)
    for k in range(2):
        agree(compiled, lambda p: run(p, False), [P + k])
    for options in ({"memory": "min"}, {"verify": "gradient"}):
        agree(mlc.compile(run, **options), lambda p: run(p, False), [P])


def test_numbers_and_arrays_as_arguments() -> None:
    @mlc.root(
        lambda w, p, x, y, power: torch.as_tensor(x).T @ (torch.as_tensor(x) @ w - torch.as_tensor(y)) + p**power * w
    )
    def solve(p: Tensor, x: Any, y: Any, power: float) -> np.ndarray:
        return ridge(p**power, torch.as_tensor(x), torch.as_tensor(y))

    def plain(p: Tensor, x: np.ndarray, power: float) -> Tensor:
        return validation(closed(p**power, torch.as_tensor(x), Y))

    compiled = mlc.compile(lambda p, x, power: validation(solve(p, x, Y, power)))
    x = X.numpy().copy()
    agree(compiled, plain, [P, x, 2.0])
    agree(compiled, plain, [P, x, 1.5])
    x *= 2
    agree(compiled, plain, [P, x, 1.5])


def test_a_number_read_from_a_tensor_as_argument() -> None:
    @mlc.root(lambda w, p, extra: ridge_condition(w, p + extra, X, Y))
    def solve(p: Tensor, extra: float) -> Tensor:
        return closed(p + extra, X, Y)

    compiled = mlc.compile(lambda p, e: validation(solve(p, e.item())))
    for v in (0.5, 3.0):
        agree(compiled, lambda p, e: validation(closed(p + e, X, Y)), [P, torch.tensor(v, dtype=D)])


def test_a_number_read_from_a_tensor_by_closure() -> None:
    def run(p: Tensor, e: Tensor) -> Tensor:
        extra = e.item()
        extra = 2 * extra

        @mlc.root(lambda w, p: ridge_condition(w, p + extra, X, Y))
        def solve(p: Tensor) -> Tensor:
            return closed(p + extra, X, Y)

        return validation(solve(p))

    compiled = mlc.compile(run)
    for v in (0.5, 3.0):
        agree(compiled, lambda p, e: validation(closed(p + 2 * e, X, Y)), [P, torch.tensor(v, dtype=D)])


def test_lasso_support_vectors_and_a_quadratic_program() -> None:
    sparse = mlc.fixed_point(lasso_update)(lasso)
    p = torch.tensor([2.0, 3.0, 40.0, 1.0, 6.0], dtype=D)
    compiled = mlc.compile(lambda p: validation(sparse(p.exp(), X, Y)))
    agree(compiled, lambda p: validation(sparse(p.exp(), X, Y)), [p.log()])
    g = torch.Generator().manual_seed(1)
    x = torch.randn(12, 2, generator=g, dtype=D)
    y = torch.sign(x[:, 0] + 0.5 * torch.randn(12, generator=g, dtype=D))
    machine = mlc.fixed_point(svm_update)(svm)

    def margin(h: Tensor) -> Tensor:
        return (torch.tanh(machine(h[0], h[1], x, y)) * torch.linspace(0, 1, 12, dtype=D)).sum()

    agree(mlc.compile(margin), margin, [torch.tensor([0.8, 2.0], dtype=D)], 1e-7)
    program = mlc.root(qp_condition, "gmres")(qp)
    q, b, h = torch.eye(4, dtype=D) * 2, torch.tensor([1.0], dtype=D), torch.tensor([0.2, 5.0, 0.3, 5.0], dtype=D)

    def cost(c: Tensor) -> Tensor:
        v = program(q, c, b, h)
        return (v["x"] ** 3).sum() + v["equal"].sum()

    agree(mlc.compile(cost), cost, [torch.tensor([-0.5, 0.2, -1.0, 0.1], dtype=D)])


def test_conditions_with_gradients_in_them() -> None:
    def objective(w: Tensor, p: Tensor) -> Tensor:
        return 0.25 * (w**4).sum() + 0.5 * ((X @ w - Y) ** 2).sum() + 0.5 * (p * w**2).sum()

    def newton(p: Tensor) -> Tensor:
        w = torch.zeros(5, dtype=D)
        for _ in range(40):
            h = X.T @ X + torch.diag(p + 3 * w**2)
            w = w - torch.linalg.solve(h, w**3 + X.T @ (X @ w - Y) + p * w)
        return w

    def by_autograd(w: Tensor, p: Tensor) -> Tensor:
        return torch.autograd.grad(objective(w, p), w, create_graph=True)[0]

    solve = mlc.root(by_autograd)(newton)
    compiled = mlc.compile(lambda p: validation(solve(p.exp())))
    expected = differences(lambda p: validation(newton(p.exp())), P)
    for _ in range(2):
        assert error(gradient(compiled, P), expected) < 1e-8


def test_the_text_of_the_program_and_what_check_says() -> None:
    def outer(p: Tensor) -> Tensor:
        return validation(fit(p.exp(), X, Y))

    compiled = mlc.compile(outer)
    compiled(P.clone().requires_grad_())
    text = str(compiled.program)
    assert 'call[title="fit"' in text and str(parse(text)) == text
    assert compiled.plan is not None and compiled.plan.explain()
    report = mlc.check(outer, P.clone().requires_grad_())
    assert report.ok, str(report)


def test_the_solvers_time_is_in_the_plan() -> None:
    import time

    @mlc.root(ridge_condition)
    def slow(p: Tensor, x: Tensor, y: Tensor) -> np.ndarray:
        time.sleep(0.2)
        return ridge(p, x, y)

    compiled = mlc.compile(lambda p: validation(slow(p, X, Y)))
    compiled(P.clone().requires_grad_())
    assert compiled.plan is not None and compiled.plan.seconds >= 0.2
