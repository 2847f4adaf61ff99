"""Solvers as a user has them, with the conditions that their answers satisfy."""

import numpy as np
import scipy.optimize
import torch
from torch import Tensor

D = torch.float64


def data(n: int = 24, d: int = 5, seed: int = 0) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Training and validation data of a linear model: X, y, X_val, y_val."""
    g = torch.Generator().manual_seed(seed)
    w = torch.randn(d, generator=g, dtype=D)
    x, x_val = torch.randn(n, d, generator=g, dtype=D), torch.randn(12, d, generator=g, dtype=D)
    noise = [0.5 * torch.randn(k, generator=g, dtype=D) for k in (n, 12)]
    return x, x @ w + noise[0], x_val, x_val @ w + noise[1]


def ridge_condition(w: Tensor, penalty: Tensor, x: Tensor, y: Tensor) -> Tensor:
    return x.T @ (x @ w - y) + penalty * w


def ridge(penalty: Tensor, x: Tensor, y: Tensor) -> np.ndarray:
    a = x.numpy()
    return np.linalg.solve(a.T @ a + np.diag(np.broadcast_to(penalty.numpy(), a.shape[1])), a.T @ y.numpy())


def soft(v: Tensor, t: Tensor) -> Tensor:
    return torch.sign(v) * torch.relu(v.abs() - t)


def lasso_update(w: Tensor, penalty: Tensor, x: Tensor, y: Tensor) -> Tensor:
    """One proximal gradient step."""
    step = 1.0 / (x**2).sum()
    return soft(w - step * x.T @ (x @ w - y), step * penalty)


def lasso(penalty: Tensor, x: Tensor, y: Tensor) -> Tensor:
    """Coordinate descent."""
    w, square = torch.zeros(x.shape[1], dtype=x.dtype), (x**2).sum(0)
    gram, right = x.T @ x, x.T @ y
    for _ in range(60):
        for j in range(len(w)):
            w[j] = soft(right[j] - gram[j] @ w + square[j] * w[j], penalty[j]) / square[j]
    return w


def box(a: Tensor, c: Tensor) -> Tensor:
    return torch.minimum(torch.clamp(a, min=0.0), c)


def svm_kernel(x: Tensor, y: Tensor, width: Tensor) -> Tensor:
    d = ((x[:, None] - x[None]) ** 2).sum(-1)
    return (torch.exp(-d / width) + 1.0) * y[:, None] * y[None]


def svm_update(a: Tensor, c: Tensor, width: Tensor, x: Tensor, y: Tensor) -> Tensor:
    """One projected gradient step on the dual of a support vector machine (bias in the kernel)."""
    q = svm_kernel(x, y, width)
    return box(a + 0.05 * (1.0 - q @ a), c)


def svm(c: Tensor, width: Tensor, x: Tensor, y: Tensor) -> np.ndarray:
    q = svm_kernel(x, y, width).numpy()
    found = scipy.optimize.minimize(
        lambda a: 0.5 * a @ q @ a - a.sum(), np.full(len(q), 0.5 * float(c)), jac=lambda a: q @ a - 1.0,
        bounds=[(0.0, float(c))] * len(q), method="L-BFGS-B", options={"ftol": 1e-15, "gtol": 1e-12, "maxiter": 5000},
    )  # fmt: skip
    return found.x


def qp_condition(v: dict[str, Tensor], q: Tensor, c: Tensor, b: Tensor, h: Tensor) -> dict[str, Tensor]:
    """KKT conditions of min x'Qx/2 + c'x with sum(x) = b and x <= h: the multipliers are part of the solution."""
    x, equal, bound = v["x"], v["equal"], v["bound"]
    return {
        "x": q @ x + c + equal + bound,
        "equal": x.sum(0, keepdim=True) - b,
        "bound": bound * (x - h),
    }


def qp(q: Tensor, c: Tensor, b: Tensor, h: Tensor) -> dict[str, Tensor]:
    """By enumeration of the active sets."""
    n = len(c)
    for mask in range(2**n):
        active = [i for i in range(n) if mask >> i & 1]
        m = len(active)
        kkt = torch.zeros(n + 1 + m, n + 1 + m, dtype=q.dtype)
        kkt[:n, :n] = q
        kkt[:n, n] = kkt[n, :n] = 1.0
        for k, i in enumerate(active):
            kkt[i, n + 1 + k] = kkt[n + 1 + k, i] = 1.0
        right = torch.cat([-c, b, h[active]])
        if torch.linalg.matrix_rank(kkt) < len(kkt):
            continue
        found = torch.linalg.solve(kkt, right)
        bound = torch.zeros(n, dtype=q.dtype)
        bound[active] = found[n + 1 :]
        if bool((bound >= 0).all()) and bool((found[:n] <= h + 1e-12).all()):
            return {"x": found[:n], "equal": found[n : n + 1], "bound": bound}
    raise AssertionError("infeasible")
