"""Solvers that nobody can look into: scikit-learn and SciPy."""

import numpy as np
import pytest
import scipy.optimize
import torch
import torch.nn.functional as F
from sklearn.linear_model import ElasticNet, LogisticRegression, Ridge
from torch import Tensor

import mlc
from tests.implicit.problems import D, data, soft
from tests.implicit.referee import differences, error, gradient

X, Y, X_VAL, Y_VAL = data()


def test_ridge_of_sklearn_with_its_intercept() -> None:
    def condition(v: tuple[Tensor, Tensor], alpha: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
        r = weight * (X @ v[0] + v[1] - Y)
        return X.T @ r + alpha * v[0], r.sum()

    @mlc.root(condition)
    def fit(alpha: Tensor, weight: Tensor) -> tuple[np.ndarray, float]:
        m = Ridge(alpha=float(alpha), tol=1e-12).fit(X.numpy(), Y.numpy(), sample_weight=weight.numpy())
        return m.coef_, m.intercept_

    def loss(h: Tensor) -> Tensor:
        w, b = fit(h[0], h[1:])
        return ((X_VAL @ w + b - Y_VAL) ** 2).mean()

    h = torch.linspace(0.5, 1.5, 25, dtype=D)
    assert error(gradient(loss, h), differences(loss, h)) < 1e-7


def test_logistic_regression_of_sklearn() -> None:
    g = torch.Generator().manual_seed(0)
    x = torch.randn(40, 3, generator=g, dtype=D)
    y = (x[:, 0] + 0.7 * torch.randn(40, generator=g, dtype=D) > 0).to(D)
    x_val, y_val = x[:15] + 0.3, y[:15]

    def objective(w: Tensor, log_c: Tensor, scale: Tensor) -> Tensor:
        z = (x * scale) @ w[:3] + w[3]
        return log_c.exp() * F.binary_cross_entropy_with_logits(z, y, reduction="sum") + 0.5 * (w[:3] ** 2).sum()

    @mlc.root(torch.func.grad(objective))
    def fit(log_c: Tensor, scale: Tensor) -> np.ndarray:
        m = LogisticRegression(C=float(log_c.exp()), tol=1e-12, max_iter=10_000)
        m.fit((x * scale).numpy(), y.numpy())
        return np.append(m.coef_[0], m.intercept_)

    def loss(h: Tensor) -> Tensor:
        w = fit(h[0], h[1:])
        return F.binary_cross_entropy_with_logits((x_val * h[1:]) @ w[:3] + w[3], y_val)

    h = torch.tensor([0.3, 1.0, 0.8, 1.2], dtype=D)
    assert error(gradient(loss, h), differences(loss, h)) < 1e-4  # the referee is right to lbfgs's tolerance


def test_elastic_net_of_sklearn_in_float32() -> None:
    n = len(Y)

    def update(w: Tensor, h: Tensor) -> Tensor:
        step = 1.0 / torch.linalg.matrix_norm(X, 2) ** 2 * n
        smooth = X.T @ (X @ w.to(D) - Y) / n + h[1] * w
        return soft(w - step * smooth, step * h[0])

    @mlc.fixed_point(update)
    def fit(h: Tensor) -> np.ndarray:
        total = float(h.sum())
        m = ElasticNet(alpha=total, l1_ratio=float(h[0]) / total, fit_intercept=False, tol=1e-12, max_iter=100_000)
        return m.fit(X.numpy(), Y.numpy()).coef_.astype(np.float32)

    def loss(h: Tensor) -> Tensor:
        w = fit(h)
        assert w.dtype == h.dtype  # float32 of NumPy becomes the argument's
        return ((X_VAL @ w - Y_VAL) ** 2).mean()

    h = torch.tensor([0.2, 0.1], dtype=D)
    assert error(gradient(loss, h), differences(loss, h)) < 1e-3  # the referee is right to float32


def test_minimize_of_scipy() -> None:
    def objective(x: Tensor, a: Tensor) -> Tensor:
        return ((1 - x[:-1]) ** 2).sum() + (a * (x[1:] - x[:-1] ** 2) ** 2).sum()

    @mlc.root(torch.func.grad(objective))
    def solve(a: Tensor) -> np.ndarray:
        def f(x: np.ndarray) -> tuple[float, np.ndarray]:
            t = torch.tensor(x).requires_grad_()
            with torch.enable_grad():
                value = objective(t, a)
            return float(value.detach()), torch.autograd.grad(value, t)[0].numpy()

        return scipy.optimize.minimize(f, np.zeros(3), jac=True, method="BFGS", options={"gtol": 1e-11}).x

    def loss(a: Tensor) -> Tensor:
        return (solve(a) * torch.tensor([1.0, 2.0, 3.0], dtype=D)).sum() + a.sum()

    a = torch.tensor([2.0, 3.0], dtype=D)
    assert error(gradient(loss, a), torch.ones(2, dtype=D)) < 1e-6  # the minimum does not move
    b = torch.tensor([0.5, 0.2], dtype=D)

    @mlc.root(lambda x, b: torch.func.grad(objective)(x, a) - torch.cat([b, b[:1]]))
    def tilted(b: Tensor) -> np.ndarray:
        def f(x: np.ndarray) -> tuple[float, np.ndarray]:
            t = torch.tensor(x).requires_grad_()
            with torch.enable_grad():
                value = objective(t, a) - (t * torch.cat([b, b[:1]])).sum()
            return float(value.detach()), torch.autograd.grad(value, t)[0].numpy()

        return scipy.optimize.minimize(f, np.zeros(3), jac=True, method="BFGS", options={"gtol": 1e-10}).x

    def tilt(b: Tensor) -> Tensor:
        return (tilted(b) ** 2).sum()

    assert error(gradient(tilt, b), differences(tilt, b)) < 1e-5


@pytest.mark.filterwarnings("ignore:The iteration is not making")
def test_root_of_scipy_not_symmetric() -> None:
    def condition(x: Tensor, a: Tensor) -> Tensor:
        return torch.stack([x[0] + 0.5 * torch.sin(x[1]) - a[0], x[1] ** 3 + x[1] - 2 * x[0] * a[1]])

    @mlc.root(condition, "gmres")
    def solve(a: Tensor) -> np.ndarray:
        return scipy.optimize.root(lambda x: condition(torch.tensor(x), a).numpy(), np.zeros(2), tol=1e-13).x

    def loss(a: Tensor) -> Tensor:
        return (solve(a) ** 2).sum()

    a = torch.tensor([1.0, 0.7], dtype=D)
    assert error(gradient(loss, a), differences(loss, a)) < 1e-7
