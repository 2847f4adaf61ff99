"""Fixed points and constraints: lasso, the dual of a support vector machine, a quadratic program, equilibria."""

import torch
from torch import Tensor, nn

import mlc
from tests.implicit.problems import D, data, lasso, lasso_update, qp, qp_condition, svm, svm_update
from tests.implicit.referee import differences, error, gradient

X, Y, X_VAL, Y_VAL = data()


def validation(w: Tensor) -> Tensor:
    return ((X_VAL @ w - Y_VAL) ** 2).mean()


def test_lasso_by_its_proximal_step() -> None:
    penalty = torch.tensor([2.0, 3.0, 40.0, 1.0, 6.0], dtype=D)
    w = lasso(penalty, X, Y)
    assert 0 < int((w == 0).sum()) < 5  # some are out, some are in
    expected = differences(lambda p: validation(lasso(p, X, Y)), penalty)
    for solver in ("gmres", "neumann", "normal_cg", "bicgstab", "direct"):
        options = {"steps": 2000} if solver == "neumann" else {}
        fit = mlc.fixed_point(lasso_update, solver, **options)(lasso)
        found = gradient(lambda p, fit=fit: validation(fit(p, X, Y)), penalty)
        assert error(found, expected) < 1e-7
        assert not found[w == 0].any()


def test_support_vector_machine_by_projection() -> None:
    g = torch.Generator().manual_seed(1)
    x = torch.randn(12, 2, generator=g, dtype=D)
    y = torch.sign(x[:, 0] + 0.5 * torch.randn(12, generator=g, dtype=D))
    fit = mlc.fixed_point(svm_update)(svm)
    hyper = torch.tensor([0.8, 2.0], dtype=D)

    def margin(h: Tensor, solve: object = fit) -> Tensor:
        a = torch.as_tensor(solve(h[0], h[1], x, y))  # type: ignore[operator]
        return (torch.tanh(a) * torch.linspace(0, 1, 12, dtype=D)).sum()

    a = torch.as_tensor(svm(hyper[0], hyper[1], x, y))
    kinds = [int((a < 1e-9).sum()), int((a > 0.8 - 1e-9).sum())]
    assert 0 < sum(kinds) < 12
    expected = differences(lambda h: margin(h, lambda *args: svm(*args)), hyper)
    assert error(gradient(margin, hyper), expected) < 1e-5  # the referee is right to L-BFGS-B's tolerance


def test_quadratic_program_by_its_kkt_conditions() -> None:
    g = torch.Generator().manual_seed(2)
    root = torch.randn(4, 4, generator=g, dtype=D)
    q, c = root @ root.T + torch.eye(4, dtype=D), torch.randn(4, generator=g, dtype=D)
    b, h = torch.tensor([1.0], dtype=D), torch.tensor([0.2, 5.0, 0.3, 5.0], dtype=D)
    v = qp(q, c, b, h)
    assert 0 < int((v["bound"] > 0).sum()) < 4
    solve = mlc.root(qp_condition, "gmres")(qp)
    args = [q, c, b, h]
    for i in range(4):

        def loss(t: Tensor, fn: object = solve, i: int = i) -> Tensor:
            given = [*args[:i], t, *args[i + 1 :]]
            if i == 0:
                given[0] = (t + t.T) / 2
            v = fn(*given)  # type: ignore[operator]
            return (v["x"] ** 3).sum() + v["equal"].sum() + 0.1 * (v["bound"] ** 2).sum()

        expected = differences(lambda t, loss=loss: loss(t, qp), args[i])
        assert error(gradient(loss, args[i]), expected) < 1e-7


def test_an_equilibrium_layer_with_second_order() -> None:
    torch.manual_seed(0)
    layer = nn.Linear(6, 6).double()
    with torch.no_grad():
        layer.weight.mul_(0.5 / torch.linalg.matrix_norm(layer.weight, 2))

    def update(z: Tensor, x: Tensor) -> Tensor:
        return torch.tanh(layer(z) + x)

    def iterate(x: Tensor) -> Tensor:
        z = torch.zeros_like(x)
        for _ in range(80):
            z = update(z, x)
        return z

    solve = mlc.fixed_point(update, "neumann")(iterate)
    params = [*layer.parameters()]
    results = []
    for f in (solve, iterate):
        x = torch.linspace(-1, 1, 12, dtype=D).view(2, 6).requires_grad_()
        first = torch.autograd.grad((f(x) ** 2).sum(), [x, *params], create_graph=True)
        second = torch.autograd.grad(sum((g**2).sum() for g in first), [x, *params])
        results.append([*first, *second])
    assert max(map(error, *results)) < 1e-8


def test_newton_steps_as_the_update_need_no_system() -> None:
    """An update that jumps to the solution has a Jacobian of zero in x: one term of the series."""

    def newton(x: Tensor, a: Tensor) -> Tensor:
        return x - (x**2 - a) / (2 * x)

    root = mlc.fixed_point(newton, "neumann")(lambda a: a.sqrt())
    a = torch.tensor([2.0, 3.0], dtype=D)
    assert error(gradient(lambda a: root(a).sum(), a), 0.5 / a.sqrt()) < 1e-12
    assert root.last is not None and root.last.iterations <= 1
