"""Bilevel problems whose hypergradient has a closed form, float64, and what theory says that approximations reach.

Lower: theta = argmin L(theta, eta); upper: U(theta) = |theta - 1|^2. With H the Hessian of L at the solution and M the
derivative of its gradient by eta, dU/deta = -M' H^-1 v with v = 2 (theta - 1). An approximation of H^-1 v is a vector
that dense linear algebra can compute as well: those here are written from the definitions, not from any solver.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

D = torch.float64


@dataclass(frozen=True)
class Closed:
    """A problem at its solution.

    Attributes:
        name: With what makes it hard.
        loss: (theta, eta) to the lower loss, a scalar.
        star: The solution, (n,).
        eta: Its meta-parameters.
        hessian: At the solution, (n, n).
        mixed: Derivative of the lower gradient by eta, (n, numel of eta).
    """

    name: str
    loss: Callable[[Tensor, Tensor], Tensor]
    star: Tensor
    eta: Tensor
    hessian: Tensor
    mixed: Tensor

    @property
    def pull(self) -> Tensor:
        """v, the derivative of the upper loss."""
        return 2 * (self.star - 1)

    @property
    def largest(self) -> float:
        return float(torch.linalg.eigvalsh(self.hessian).max())

    @property
    def condition(self) -> float:
        return float(torch.linalg.cond(self.hessian))

    def hypergradient(self, x: Tensor) -> Tensor:
        """What follows if ``x`` is taken for H^-1 v."""
        return -self.mixed.mT @ x

    def error(self, found: Tensor) -> float:
        """Relative, in the Euclidean norm."""
        exact = self.hypergradient(torch.linalg.solve(self.hessian, self.pull))
        return float((found - exact).norm() / exact.norm())


def upper(theta: Tensor) -> Tensor:
    return (theta - 1).square().sum()


def quadratic(condition: float, n: int = 40) -> Closed:
    """L = theta' A theta / 2 - eta' theta, eigenvalues of A from 1 to the condition number in equal ratios."""
    generator = torch.Generator().manual_seed(0)
    q, _ = torch.linalg.qr(torch.randn(n, n, dtype=D, generator=generator))
    a = q @ torch.diag(torch.logspace(0, math.log10(condition), n, dtype=D)) @ q.mT
    a = (a + a.mT) / 2
    eta = torch.randn(n, dtype=D, generator=generator)
    star = torch.linalg.solve(a, eta)
    return Closed(
        f"quadratic, condition {condition:g}",
        lambda w, u: 0.5 * w @ a @ w - u @ w, star, eta, a, -torch.eye(n, dtype=D),
    )  # fmt: skip


def logistic(penalty: float, n: int = 20, examples: int = 200) -> Closed:
    """Logistic regression on separable labels with noise, one log penalty per weight."""
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(examples, n, dtype=D, generator=generator)
    truth = torch.randn(n, dtype=D, generator=generator)
    y = (x @ truth + torch.randn(examples, dtype=D, generator=generator) > 0).to(D)
    eta = torch.full((n,), math.log(penalty), dtype=D)

    def loss(w: Tensor, u: Tensor) -> Tensor:
        return F.binary_cross_entropy_with_logits(x @ w, y) + 0.5 * (u.exp() * w.square()).sum()

    star = torch.zeros(n, dtype=D)
    for _ in range(50):  # Newton's method
        g = torch.func.grad(loss)(star, eta)
        star = star - torch.linalg.solve(torch.func.hessian(loss)(star, eta), g)
    mixed = torch.func.jacrev(torch.func.grad(loss), 1)(star, eta)
    return Closed(f"logistic, penalty {penalty:g}", loss, star, eta, torch.func.hessian(loss)(star, eta), mixed)


PROBLEMS: dict[str, Callable[[], Closed]] = {
    "quadratic7": lambda: quadratic(7.0),
    "quadratic650": lambda: quadratic(650.0),
    "logistic1": lambda: logistic(1.0),
    "logistic001": lambda: logistic(0.01),
}


# ---- what theory says of x after k products


def krylov(p: Closed, k: int) -> Tensor:
    """An orthonormal basis of span(v, H v, ..., H^(k-1) v), as far as it grows."""
    basis = (p.pull / p.pull.norm())[:, None]
    for _ in range(k - 1):
        w = p.hessian @ basis[:, -1]
        for _ in range(2):
            w = w - basis @ (basis.mT @ w)
        if w.norm() < 1e-13 * p.largest:
            break
        basis = torch.cat([basis, (w / w.norm())[:, None]], 1)
    return basis


def cg(p: Closed, k: int) -> Tensor:
    """The point of the Krylov space nearest to the solution in the norm of H (Hestenes and Stiefel 1952)."""
    q = krylov(p, k)
    return q @ torch.linalg.solve(q.mT @ p.hessian @ q, q.mT @ p.pull)


def gmres(p: Closed, k: int) -> Tensor:
    """The point of the Krylov space with the smallest residual (Saad and Schultz 1986)."""
    q = krylov(p, k)
    return q @ torch.linalg.lstsq(p.hessian @ q, p.pull[:, None], driver="gelsd").solution[:, 0]


def neumann(p: Closed, k: int, scale: float | None = None) -> Tensor:
    """s sum over j < k of (I - s H)^j v, by eigenvalues: (1 - (1 - s h)^k) / h (Lorraine et al. 2020)."""
    values, q = torch.linalg.eigh(p.hessian)
    s = 1 / p.largest if scale is None else scale
    return q @ ((1 - (1 - s * values) ** k) / values * (q.mT @ p.pull))


def nystrom(p: Closed, k: int, damping: float) -> Tensor:
    """(C W^+ C' + damping)^-1 v with C the first k columns of a fixed random order (Hataya and Yamada 2023)."""
    n = len(p.star)
    places = torch.randperm(n, generator=torch.Generator().manual_seed(0))[:k]
    c = p.hessian[:, places]
    low = c @ torch.linalg.pinv(c[places], hermitian=True) @ c.mT
    return torch.linalg.solve(low + damping * torch.eye(n, dtype=D), p.pull)
