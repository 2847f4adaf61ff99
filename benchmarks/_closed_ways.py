"""The hypergradients of closed-form problems by mlc, TorchOpt and Betty, each through its public interface.

Each way: (problem, products) to (hypergradient, facts). All start at the solution of the lower problem.
"""

from collections.abc import Callable
from typing import Any

import torch
from _closed import Closed, upper
from torch import Tensor, nn

import mlc

STEPS = 50  # of the inner loops that are unrolled, for their responses
Found = tuple[Tensor, dict[str, Any]]
Way = Callable[[Closed, int], Found]


def by_mlc(p: Closed, response: mlc.Response, steps: int = 3) -> Found:
    """``steps`` of gradient descent at rate 1 / (largest eigenvalue), from the solution, under a response."""
    w, eta = nn.Parameter(p.star.clone()), p.eta.clone().requires_grad_()
    opt = torch.optim.SGD([w], lr=1 / p.largest)

    def fit(w: Tensor, eta: Tensor) -> Tensor:
        with mlc.level("inner"):
            for _ in range(steps):
                opt.zero_grad()
                p.loss(w, eta).backward()
                opt.step()
        return upper(w)

    f = mlc.compile(fit, flows={"inner": response}, backend="interpreter")
    (found,) = torch.autograd.grad(f(w, eta), [eta])
    solve = f.report.solves.get("inner")
    return found, {} if solve is None else {"products": solve.products, "residual": solve.residual}


def implicit(solver: str, **options: Any) -> Way:
    return lambda p, k: by_mlc(p, mlc.Implicit(solver, steps=k, tol=0.0, **options))


def torchopt(solver: str) -> Way:
    """``torchopt.diff.implicit.custom_root`` with its CG, or its Neumann series at rate 1 / (largest eigenvalue)."""

    def call(p: Closed, k: int) -> Found:
        import torchopt

        solve = {
            "cg": lambda: torchopt.linear_solve.solve_cg(maxiter=k, rtol=0.0),
            "neumann": lambda: torchopt.linear_solve.solve_inv(ns=True, maxiter=k, alpha=1 / p.largest),
        }[solver]()
        root = torchopt.diff.implicit.custom_root(torch.func.grad(p.loss), argnums=1, solve=solve)
        eta = p.eta.clone().requires_grad_()
        star = root(lambda w, eta: w.detach().clone())(p.star, eta)
        return torch.autograd.grad(upper(star), [eta])[0], {}

    return call


def betty(kind: str) -> Way:
    """Betty's hypergradient, as its engine leaves it in ``.grad`` before the upper step."""

    def call(p: Closed, k: int) -> Found:
        import _betty
        from betty.configs import Config

        class Held(nn.Module):
            def __init__(self, x: Tensor) -> None:
                super().__init__()
                self.x = nn.Parameter(x.clone())

        settings = {
            "darts": {},
            "cg": {"cg_iterations": k},
            "neumann": {"neumann_iterations": k, "neumann_alpha": 1 / p.largest},
        }[kind]
        low, up, seen = Held(p.star), Held(p.eta), []
        nothing = [(torch.zeros(1),)]
        lower = _betty.problem(
            "low", low, torch.optim.SGD(low.parameters(), lr=1 / p.largest), lambda b: p.loss(low.x, up.x), nothing,
            Config(type=kind, unroll_steps=1, **settings),
        )  # fmt: skip
        top = _betty.problem(
            "up", up, torch.optim.SGD(up.parameters(), lr=0.0), lambda b: upper(low.x), nothing,
            Config(retain_graph=True), lambda grads: seen.append(grads[0].clone()),
        )  # fmt: skip
        _betty.engine(lower, top).run()
        return seen[0], {}

    return call
