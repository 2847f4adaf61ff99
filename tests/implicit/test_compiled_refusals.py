"""What is refused, or warned of, where a root stands inside a compiled function."""

import warnings
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import mlc
from mlc.errors import RootWarning
from tests.implicit.problems import (
    D,
    ridge,
    ridge_condition,
)
from tests.implicit.referee import gradient
from tests.implicit.ridges import P, X, Y, agree, closed, fit, validation


def test_a_wrong_solution_warns_there_too() -> None:
    wrong = mlc.root(ridge_condition)(lambda p, x, y: 1.1 * closed(p, x, y))
    loss = mlc.compile(lambda p: validation(wrong(p, X, Y)))(P.clone().requires_grad_())
    with pytest.warns(RootWarning, match="of its size"):
        loss.backward()


def test_solvers_that_change_what_was_there_are_refused() -> None:
    state = torch.zeros(5, dtype=D)

    def warm(p: Tensor) -> Tensor:
        state.copy_(closed(p, X, Y))
        return state

    def by_numpy(p: Tensor) -> np.ndarray:
        a = state.numpy()
        a[:] = ridge(p, X, Y)
        return a

    for solve in (warm, by_numpy):
        state.zero_()
        root = mlc.root(lambda w, p: ridge_condition(w, p, X, Y))(solve)
        with pytest.raises(mlc.CaptureError, match=r"(?s)in place.*test_compiled_refusals\.py.*work on a copy"):
            mlc.compile(lambda p, root=root: validation(root(p)))(P.clone().requires_grad_())


@pytest.mark.parametrize(
    "condition",
    [
        lambda w, p: ridge_condition(w, p, X, Y) if float(p.sum()) > 0 else w,
        lambda w, p: ridge_condition(w, p, X, Y) if p.sum() > 0 else w,
        lambda w, p: ridge_condition(w, p + float(p.detach().sum().numpy()), X, Y),
    ],
)
def test_conditions_that_decide_by_values_are_refused(condition: Any) -> None:
    def solve(p: Tensor) -> Tensor:
        return closed(p, X, Y)

    with pytest.raises(mlc.CaptureError, match=r"(?s)takes a decision.*test_compiled_refusals\.py"):
        mlc.compile(lambda p: validation(mlc.root(condition)(solve)(p)))(P.clone().requires_grad_())


def test_what_is_wrong_names_the_users_line() -> None:
    bad = mlc.root(lambda w, p: (w - p).sum())(lambda p: p)
    with pytest.raises(mlc.MlcError, match=r"(?s)test_compiled_refusals\.py:\d+.*one equation for each element"):
        mlc.compile(lambda p: bad(p).sum())(P.clone().requires_grad_())
    with pytest.raises(mlc.CaptureError, match=r"(?s)without running.*test_compiled_refusals\.py:\d+"):
        mlc.trace(lambda p: validation(fit(p, X, Y)), P.clone().requires_grad_(), fake=True)


def test_an_error_of_the_solver_leaves_everything_as_it_was() -> None:
    @mlc.root(ridge_condition)
    def moody(p: Tensor, x: Tensor, y: Tensor) -> np.ndarray:
        if float(p[0]) > 1.0:
            raise ValueError("too stiff")
        return ridge(p, x, y)

    compiled = mlc.compile(lambda p: validation(moody(p, X, Y)))
    compiled(P.clone().requires_grad_())
    with pytest.raises(ValueError, match="too stiff"):
        compiled((P + 1).requires_grad_())
    agree(compiled, lambda p: validation(closed(p, X, Y)), [P])


def test_solutions_of_another_size_are_recorded_anew() -> None:
    """How many numbers a solver gives may depend on values."""

    @mlc.root(lambda x, a: x * a.sum() - 1.0)
    def solve(a: Tensor) -> Tensor:
        return (1.0 / a.sum()).expand(2 if float(a.sum()) > 5 else 3)

    compiled = mlc.compile(lambda a: (solve(a) ** 2).sum())
    for scale in (1.0, 3.0, 1.0):
        a = P * scale
        n = 2 if float(a.sum()) > 5 else 3
        agree(compiled, lambda a, n=n: n / a.sum() ** 2, [a])


def test_no_warning_where_all_is_well() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        compiled = mlc.compile(lambda p: validation(fit(p.exp(), X, Y)))
        for _ in range(2):
            gradient(compiled, P)
