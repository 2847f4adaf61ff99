"""What a user can get wrong: each says what happened and what to write instead."""

import warnings
from typing import Any

import numpy as np
import pytest
import scipy.optimize
import torch
from torch import Tensor, nn

import mlc
from mlc.errors import RootWarning, SolverError, SolverWarning
from tests.implicit.problems import D, data, ridge, ridge_condition
from tests.implicit.referee import error

X, Y, X_VAL, Y_VAL = data()
P = torch.tensor([0.3, 1.0, 2.0, 0.5, 4.0], dtype=D)


def live() -> Tensor:
    return P.clone().requires_grad_()


def square(a: Tensor) -> Tensor:
    return a.sqrt()


# ---- options


@pytest.mark.parametrize(
    "make",
    [
        lambda: mlc.root(ridge_condition, "lu"),
        lambda: mlc.root(ridge_condition, "cg", rank=3),
        lambda: mlc.root(ridge_condition, "cg", stepz=3),
        lambda: mlc.root(ridge_condition, "cg", tol=-1.0),
        lambda: mlc.root(ridge_condition, "cg", steps=0),
        lambda: mlc.root(ridge_condition, lambda matvec, b: b, steps=3),
        lambda: mlc.root(3),  # type: ignore[arg-type]
        lambda: mlc.root(ridge_condition)(3),  # type: ignore[arg-type]
        lambda: mlc.fixed_point("update"),  # type: ignore[arg-type]
    ],
)
def test_options_that_make_no_sense(make: Any) -> None:
    with pytest.raises(mlc.PlanError) as e:
        make()
    assert e.value.advice


# ---- what solver and condition return


@pytest.mark.parametrize(
    ("result", "advice"),
    [
        (lambda: None, "return x alone"),
        (lambda: scipy.optimize.OptimizeResult(x=np.zeros(2)), r"return its \.x"),
        (lambda: "solution", "return x alone"),
        (lambda: torch.zeros(2, dtype=torch.long), "return x alone"),
        (lambda: np.array(["a"]), "return x alone"),
        (lambda: torch.zeros(2, dtype=torch.complex64), "return x alone"),
        (lambda: (), "return x"),
        (lambda: torch.full((2,), float("nan")), "whether it converged"),
    ],
)
def test_solvers_that_return_no_solution(result: Any, advice: str) -> None:
    with pytest.raises(mlc.MlcError, match=advice):
        mlc.root(lambda x, a: x - a)(lambda a: result())(live())


def test_an_estimator_is_no_solution() -> None:
    from sklearn.linear_model import Ridge

    with pytest.raises(mlc.MlcError, match="return its coefficients"):
        mlc.root(lambda x, a: x - a)(lambda a: Ridge().fit(X.numpy(), Y.numpy()))(live())


@pytest.mark.parametrize(
    "condition",
    [
        lambda x, a: ((x**2 - a) ** 2).sum(),
        lambda x, a: (x - a, x),
        lambda x, a: None,
        lambda x, a: (x - a)[:2],
        lambda x, a: {"x": x - a},
        lambda x, a: (x - a).numpy(force=True),
    ],
)
def test_conditions_of_another_shape(condition: Any) -> None:
    with pytest.raises(mlc.MlcError, match="one equation for each element of x"):
        mlc.root(condition)(square)(live())


def test_conditions_that_do_not_depend_on_x() -> None:
    for condition in (lambda x, a: a * 2, lambda x, a: x.detach() - a):
        with pytest.raises(mlc.DifferentiationError, match="does not depend on x"):
            mlc.root(condition)(square)(live())


def test_arguments_that_the_condition_does_not_depend_on() -> None:
    for condition in (lambda x, a: x**2 - a.detach(), lambda x, a: x**2 - float(a.detach()[0])):
        with pytest.raises(mlc.DifferentiationError, match="does not depend on any argument that requires grad"):
            mlc.root(condition)(square)(live())
    a, start = live(), live()
    x = mlc.root(lambda x, a, start: x**2 - a)(lambda a, start: a.sqrt())(a, start)
    x.sum().backward()
    assert start.grad is None and a.grad is not None


def test_conditions_that_are_no_functions() -> None:
    drop, norm = nn.Dropout(), nn.BatchNorm1d(1).double()
    with pytest.raises(mlc.DifferentiationError, match=r"random numbers.*\n.*eval\(\)"):
        mlc.root(lambda x, a: drop(x**2 - a))(square)(live())
    with pytest.raises(mlc.DifferentiationError, match="in place"):
        mlc.root(lambda x, a: norm((x**2 - a)[:, None])[:, 0])(square)(live())
    counter = torch.zeros(1)

    def counting(x: Tensor, a: Tensor) -> Tensor:
        counter.add_(1)
        return x**2 - a

    with pytest.raises(mlc.DifferentiationError, match="in place"):
        mlc.root(counting)(square)(live())


def test_errors_of_the_user_come_through() -> None:
    def broken(a: Tensor) -> Tensor:
        raise KeyError("mine")

    with pytest.raises(KeyError, match="mine"):
        mlc.root(lambda x, a: x - a)(broken)(live())
    with pytest.raises(RuntimeError, match="shapes"):
        mlc.root(lambda x, a: x @ torch.ones(7, 7, dtype=D))(square)(live())


def test_functorch_is_refused() -> None:
    fit = mlc.root(lambda x, a: x**2 - a)(square)
    with pytest.raises(mlc.MlcError, match=r"torch\.func"):
        torch.func.grad(lambda a: fit(a).sum())(P)
    with pytest.raises(mlc.MlcError, match=r"torch\.func"):
        torch.vmap(fit)(P)


# ---- wrong places


def test_a_solution_that_is_none_warns_with_its_distance() -> None:
    fit = mlc.root(ridge_condition)(lambda p, x, y: 1.1 * torch.tensor(ridge(p, x, y)))
    w = fit(live(), X, Y)
    with pytest.warns(RootWarning, match=r"about 0\.0?\d+ of its size.*implicit gradient is wrong"):
        w.sum().backward()


def test_a_forgotten_term_warns() -> None:
    fit = mlc.root(lambda w, p, x, y: x.T @ (x @ w - y) + 2 * p * w)(ridge)
    with pytest.warns(RootWarning):
        fit(live(), X, Y).sum().backward()


@pytest.mark.parametrize("scale", [1e-12, 1.0, 1e12])
def test_the_distance_has_no_units(scale: float) -> None:
    for factor, warns in ((1.0 + 1e-4, False), (1.2, True)):
        fit = mlc.root(lambda w, p: scale * ridge_condition(w, p, X, Y))(
            lambda p, f=factor: f * torch.tensor(ridge(p, X, Y))
        )
        with warnings.catch_warnings(record=True) as seen:
            warnings.simplefilter("always")
            (fit(live()).sum() * scale).backward()
        assert [w.category for w in seen] == [RootWarning] * warns


def test_a_zero_solution_is_a_solution() -> None:
    fit = mlc.root(lambda x, a: x * (1 + x**2) - 0 * a)(torch.zeros_like)
    a = live()
    fit(a).sum().backward()
    assert a.grad is not None and not a.grad.any()


def test_cg_on_a_jacobian_that_is_not_symmetric_warns_and_is_right() -> None:
    g = torch.Generator().manual_seed(0)
    m = 3 * torch.eye(5, dtype=D) + torch.randn(5, 5, generator=g, dtype=D)
    fit = mlc.root(lambda x, a: m @ x - a)(lambda a: torch.linalg.solve(m, a))
    a = live()
    with pytest.warns(SolverWarning, match=r"not symmetric.*GMRES"):
        (fit(a) ** 2).sum().backward()
    b = live()
    (torch.linalg.solve(m, b) ** 2).sum().backward()
    assert a.grad is not None and b.grad is not None and error(a.grad, b.grad) < 1e-9
    with pytest.raises(mlc.DifferentiationError, match="not symmetric"):
        mlc.root(lambda x, a: m @ x - a, "nystrom")(lambda a: torch.linalg.solve(m, a))(live()).sum().backward()


@pytest.mark.parametrize("solver", ["cg", "gmres", "bicgstab", "normal_cg", "direct", "neumann"])
def test_systems_without_a_solution_warn(solver: str) -> None:
    """x1 + x2 is determined, x1 - x2 is not: a loss of that has no derivative."""
    fit = mlc.root(lambda x, a: x.sum().expand(2) - a[0], solver)(lambda a: (a[0] / 2).expand(2))
    with pytest.warns(SolverWarning, match="residual"):
        (fit(live()) * torch.tensor([1.0, -2.0], dtype=D)).sum().backward()


def test_too_few_steps_warn_with_their_number() -> None:
    fit = mlc.root(ridge_condition, steps=2)(ridge)
    with pytest.warns(SolverWarning, match="after 2 iterations"):
        fit(live(), X, Y).sum().backward()
    assert fit.last is not None and not fit.last.converged


def test_nan_is_an_error() -> None:
    fit = mlc.root(lambda x, a: torch.sqrt(x) - a)(torch.zeros_like)
    with pytest.raises((SolverError, mlc.DifferentiationError), match=r"NaN or infinity|not finite"):
        fit(live()).sum().backward()


# ---- changes between the solution and its gradient


def test_what_changed_before_the_gradient_is_an_error() -> None:
    x, y = X.clone(), Y.clone()
    fit = mlc.root(lambda w, p: ridge_condition(w, p, x, y))(lambda p: ridge(p, x, y))
    w = fit(live())
    x.mul_(2)
    with pytest.raises(mlc.DifferentiationError, match="changed in place"):
        w.sum().backward()
    p = live()
    w = fit(p)
    with torch.no_grad():
        p.mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        w.sum().backward()
