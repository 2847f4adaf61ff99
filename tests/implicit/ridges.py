"""A ridge as a root inside compiled functions, and what it is compared with."""

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor

import mlc
from mlc.ir.opaque.call import Call
from tests.implicit.problems import (
    D,
    data,
    ridge,
    ridge_condition,
)
from tests.implicit.referee import error

X, Y, X_VAL, Y_VAL = data()
P = torch.tensor([0.3, 1.0, 2.0, 0.5, 4.0], dtype=D)


def validation(w: Tensor) -> Tensor:
    return ((X_VAL @ w - Y_VAL) ** 2).mean()


def closed(penalty: Tensor, x: Tensor, y: Tensor) -> Tensor:
    return torch.linalg.solve(x.T @ x + torch.diag(penalty.expand(x.shape[1])), x.T @ y)


@mlc.root(ridge_condition)
def fit(penalty: Tensor, x: Tensor, y: Tensor) -> np.ndarray:
    print("solved")
    return ridge(penalty, x, y)


def calls(compiled: Any) -> int:
    return sum(isinstance(e.op, Call) for e in compiled.program.region.walk())


def agree(compiled: Any, plain: Callable[..., Tensor], args: list[Any], bound: float = 1e-9) -> Tensor:
    """Value and gradient by the first argument are those of a plain function."""
    p, q = (args[0].detach().clone().requires_grad_() for _ in range(2))
    a, b = compiled(p, *args[1:]), plain(q, *args[1:])
    a.backward()
    b.backward()
    assert error(a, b) < bound
    assert p.grad is not None and q.grad is not None
    assert error(p.grad, q.grad) < bound
    return p.grad
