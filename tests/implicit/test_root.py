"""Gradients through solvers by their optimality conditions, in eager PyTorch, against differences of the solver."""

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import mlc
from tests.implicit.problems import D, data, ridge, ridge_condition
from tests.implicit.referee import differences, error, gradient

X, Y, X_VAL, Y_VAL = data()


def validation(w: Tensor) -> Tensor:
    return ((X_VAL @ w - Y_VAL) ** 2).mean()


def closed(penalty: Tensor) -> Tensor:
    return torch.linalg.solve(X.T @ X + torch.diag(penalty.expand(5)), X.T @ Y)


@pytest.mark.parametrize("solver", ["cg", "gmres", "bicgstab", "normal_cg", "direct", "neumann"])
def test_ridge_by_every_solver(solver: str) -> None:
    options = {"steps": 5000} if solver == "neumann" else {}
    fit = mlc.root(ridge_condition, solver, **options)(ridge)
    penalty = torch.tensor([0.3, 1.0, 2.0, 0.5, 4.0], dtype=D)
    found = gradient(lambda p: validation(fit(p, X, Y)), penalty)
    assert error(found, gradient(lambda p: validation(closed(p)), penalty)) < 1e-9
    assert error(found, differences(lambda p: validation(torch.tensor(ridge(p, X, Y))), penalty)) < 1e-8
    assert fit.last is not None and fit.last.converged and fit.last.residual <= 1e-10


def test_nystrom_with_every_column_is_exact_up_to_its_damping() -> None:
    fit = mlc.root(ridge_condition, "nystrom", rank=5, damping=1e-9)(ridge)
    penalty = torch.tensor([0.3, 1.0, 2.0, 0.5, 4.0], dtype=D)
    found = gradient(lambda p: validation(fit(p, X, Y)), penalty)
    assert error(found, gradient(lambda p: validation(closed(p)), penalty)) < 1e-7


def test_every_argument_gets_its_gradient() -> None:
    fit = mlc.root(ridge_condition)(ridge)
    args = [torch.tensor(0.7, dtype=D), X, Y]
    live = [a.clone().requires_grad_() for a in args]
    found = torch.autograd.grad(validation(fit(*live)), live)
    for i, g in enumerate(found):

        def of(a: Tensor, i: int = i) -> Tensor:
            return validation(torch.tensor(ridge(*args[:i], a, *args[i + 1 :])))

        assert g.shape == args[i].shape
        assert error(g, differences(of, args[i])) < 1e-8


def test_derivatives_of_every_order() -> None:
    fit = mlc.root(ridge_condition)(ridge)

    def ladder(solve: Any) -> list[Tensor]:
        p = torch.tensor([0.3, 1.0, 2.0, 0.5, 4.0], dtype=D, requires_grad=True)
        out = [validation(solve(p))]
        for _ in range(3):
            (g,) = torch.autograd.grad((out[-1] ** 2).sum(), p, create_graph=True)
            out.append(g)
        return out

    for a, b in zip(ladder(lambda p: fit(p, X, Y)), ladder(closed), strict=True):
        assert error(a, b) < 1e-10


def test_second_order_in_what_is_no_hyperparameter_too() -> None:
    """A root that is not linear in x: the second derivative sees how the Jacobian depends on x."""

    @mlc.root(lambda x, a: x**3 + a * x - 1.0)
    def cubic(a: Tensor) -> np.ndarray:
        return np.array([np.roots([1.0, 0.0, v, -1.0]).real[np.abs(np.roots([1.0, 0.0, v, -1.0]).imag) < 1e-9][0]
                         for v in a.numpy()])  # fmt: skip

    a = torch.tensor([0.5, 1.5, 3.0], dtype=D)

    def slope(p: Tensor) -> Tensor:
        p = p if p.requires_grad else p.clone().requires_grad_()
        (g,) = torch.autograd.grad(torch.sin(cubic(p)).sum(), p, create_graph=True)
        return (g * torch.arange(1.0, 4.0, dtype=D)).sum()

    assert error(gradient(slope, a), differences(slope, a)) < 1e-7


def test_solutions_of_several_parts_and_kinds() -> None:
    """Tuples, dicts, keyword arguments, Python numbers, 0-d parts."""

    def condition(v: dict[str, Any], c: Tensor, *, strength: float) -> dict[str, Any]:
        a, (b, s) = v["a"], v["rest"]
        return {"a": strength * a + b.sum() - c[:2], "rest": (3 * b - c * s, s**3 + s - c.sum())}

    @mlc.root(condition, "gmres")
    def solve(c: Tensor, *, strength: float) -> dict[str, Any]:
        s = torch.tensor(0.0, dtype=D)
        for _ in range(100):
            s = s - (s**3 + s - c.sum()) / (3 * s**2 + 1)
        b = c * s / 3
        return {"a": ((c[:2] - b.sum()) / strength).numpy(), "rest": (b, float(s))}

    def loss(c: Tensor) -> Tensor:
        v = solve(c, strength=2.0)
        assert set(v) == {"a", "rest"} and v["rest"][1].shape == ()
        return (v["a"] ** 2).sum() + (v["rest"][0] * v["rest"][1]).sum()

    c = torch.tensor([0.3, -0.2, 0.9], dtype=D)
    assert error(gradient(loss, c), differences(loss, c)) < 1e-8


@pytest.mark.parametrize("computed", [False, True])
def test_what_the_condition_reads_by_closure_gets_its_gradient(computed: bool) -> None:
    torch.manual_seed(0)
    net = nn.Linear(3, 5).double()
    z = torch.randn(3, dtype=D)
    params = list(net.parameters())

    def loss(implicit: bool) -> Tensor:
        outside = net(z).exp()
        if not implicit:
            return validation(closed(outside))

        def condition(w: Tensor) -> Tensor:
            return X.T @ (X @ w - Y) + (outside if computed else net(z).exp()) * w

        return validation(mlc.root(condition)(lambda: closed(net(z).exp()))())

    for create in (False, True):
        found, expected = (torch.autograd.grad(loss(i), params, create_graph=create) for i in (True, False))
        assert max(map(error, found, expected)) < 1e-10
    second = [torch.autograd.grad(sum((g**2).sum() for g in gs), params) for gs in (found, expected)]
    assert max(map(error, *second)) < 1e-9


def test_a_module_as_an_argument() -> None:
    torch.manual_seed(0)
    net = nn.Linear(3, 5).double()
    z = torch.randn(3, dtype=D)
    fit = mlc.root(lambda w, m: X.T @ (X @ w - Y) + m(z).exp() * w)(lambda m: closed(m(z).exp()))
    found = torch.autograd.grad(validation(fit(net)), list(net.parameters()))
    expected = torch.autograd.grad(validation(closed(net(z).exp())), list(net.parameters()))
    assert max(map(error, found, expected)) < 1e-10


def test_values_by_closure_that_depend_on_each_other_count_once() -> None:
    a = torch.tensor([0.5, 1.0], dtype=D, requires_grad=True)
    b = a**2

    def loss() -> Tensor:
        x = mlc.root(lambda x: (a + b) * x - 1.0)(lambda: 1.0 / (a + b))()
        return (x**2).sum()

    (found,) = torch.autograd.grad(loss(), a, retain_graph=True)
    (expected,) = torch.autograd.grad(((1.0 / (a + b)) ** 2).sum(), a)
    assert error(found, expected) < 1e-12


def test_a_root_of_a_root() -> None:
    fit = mlc.root(ridge_condition)(ridge)
    inverse = mlc.root(lambda q, w: q**3 + q - (w**2).sum(), "direct")(_cubic_root)

    def loss(p: Tensor) -> Tensor:
        w = fit(p, X, Y)
        return validation(fit(inverse(w).expand(5) + p, X, Y))

    p = torch.tensor([0.3, 1.0, 2.0, 0.5, 4.0], dtype=D)
    assert error(gradient(loss, p), differences(loss, p)) < 1e-8


def _cubic_root(w: Tensor) -> Tensor:
    q = torch.tensor(1.0, dtype=D)
    for _ in range(60):
        q = q - (q**3 + q - (w**2).sum()) / (3 * q**2 + 1)
    return q


def test_gradients_as_conditions_in_two_spellings() -> None:
    def objective(w: Tensor, p: Tensor) -> Tensor:
        return 0.5 * ((X @ w - Y) ** 2).sum() + 0.5 * (p * w**2).sum()

    def by_autograd(w: Tensor, p: Tensor) -> Tensor:
        return torch.autograd.grad(objective(w, p), w, create_graph=True)[0]

    p = torch.tensor([0.3, 1.0, 2.0, 0.5, 4.0], dtype=D)
    expected = gradient(lambda p: validation(closed(p)), p)
    for condition in (by_autograd, torch.func.grad(objective)):
        fit = mlc.root(condition)(closed)
        assert error(gradient(lambda p, fit=fit: validation(fit(p)), p), expected) < 1e-10


def test_dtypes_and_devices_follow_the_arguments() -> None:
    fit = mlc.root(ridge_condition)(ridge)
    p = torch.tensor(0.5, requires_grad=True)
    w = fit(p, X.float(), Y.float())
    assert w.dtype == torch.float32 and w.requires_grad
    (g,) = torch.autograd.grad(((X_VAL.float() @ w - Y_VAL.float()) ** 2).mean(), p)
    assert error(g, gradient(lambda p: validation(closed(p)), p.double())) < 1e-4


def test_without_anything_to_differentiate_it_is_the_solver() -> None:
    fit = mlc.root(ridge_condition)(ridge)
    assert not fit(torch.tensor(0.5, dtype=D), X, Y).requires_grad
    with torch.no_grad():
        assert not fit(torch.tensor(0.5, dtype=D, requires_grad=True), X, Y).requires_grad


def test_a_solver_of_the_users_own() -> None:
    def lu(matvec: Any, b: Tensor) -> Tensor:
        return torch.linalg.solve(torch.stack([matvec(e) for e in torch.eye(len(b), dtype=b.dtype)], 1), b)

    fit = mlc.root(ridge_condition, lu)(ridge)
    p = torch.tensor([0.3, 1.0, 2.0, 0.5, 4.0], dtype=D)
    found = gradient(lambda p: validation(fit(p, X, Y)), p)
    assert error(found, gradient(lambda p: validation(closed(p)), p)) < 1e-10


def test_it_keeps_the_solvers_name_and_works_on_methods() -> None:
    class Model:
        def __init__(self, x: Tensor, y: Tensor) -> None:
            self.x, self.y = x, y

        def condition(self, w: Tensor, p: Tensor) -> Tensor:
            return ridge_condition(w, p, self.x, self.y)

        def fit(self, p: Tensor) -> np.ndarray:
            """Fit it."""
            return ridge(p, self.x, self.y)

    m = Model(X, Y)
    fit = mlc.root(m.condition)(m.fit)
    assert fit.__name__ == "fit" and fit.__doc__ == "Fit it."
    p = torch.tensor(0.5, dtype=D)
    assert error(gradient(lambda p: validation(fit(p)), p), gradient(lambda p: validation(closed(p)), p)) < 1e-10
