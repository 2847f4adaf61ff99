"""Formulas that PyTorch gets wrong, one by one: what mlc does instead agrees with float64 central differences."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from mlc.ir.builder import Builder
from mlc.ir.core import Region, Var
from mlc.passes.autodiff.adjoint import Policy
from mlc.passes.autodiff.forward import pushforward
from mlc.passes.autodiff.reverse import pullback
from mlc.passes.rules import legality
from tests.passes.regions import agrees, dot, recorded, run, slope

A: Any = torch.ops.aten
M = torch.rand(3, 3, generator=torch.Generator().manual_seed(5), dtype=torch.float64) + 2 * torch.eye(3).double()
V = torch.rand(4, generator=torch.Generator().manual_seed(6), dtype=torch.float64) + 0.3


def unpool2(x: Tensor) -> Tensor:
    """Equal places would have no derivative: the last write counts, PyTorch's reverse rule gives to every one."""
    return A.max_unpool2d(x.reshape(1, 2, 2), (torch.arange(4) * 2).reshape(1, 2, 2), [2, 4])  # type: ignore[no-any-return]


def unpool3(x: Tensor) -> Tensor:
    where = (torch.arange(4) * 2).reshape(1, 1, 2, 2)
    return A.max_unpool3d(x.reshape(1, 1, 2, 2), where, [1, 2, 4], [1, 2, 2], [0] * 3)  # type: ignore[no-any-return]


FORWARD: dict[Any, tuple[Callable[[Tensor], Tensor], Tensor]] = {
    A.cholesky_inverse.default: (lambda m: torch.cholesky_inverse(m.tril()), M),
    A.logcumsumexp.default: (lambda x: torch.logcumsumexp(x * 300, 0), V),
    A.triangular_solve.default: (lambda m: torch.triangular_solve(m[:, :2] * 1.0, m.tril(), upper=False)[0], M),
    A._linalg_det.default: (torch.linalg.det, M),
    A.max_unpool2d.default: (unpool2, V),
    A.max_unpool3d.default: (unpool3, V),
}
SECOND: dict[Any, tuple[Callable[[Tensor], Tensor], Tensor]] = {
    A._linalg_slogdet.default: (lambda m: torch.linalg.slogdet(m)[1], M),
    A._linalg_solve_ex.default: (lambda m: torch.linalg.solve(m, m[:, :2].sin()), M),
    A.cumprod.default: (lambda x: x.cumprod(0), V),
}


@pytest.fixture(autouse=True)
def double() -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(before)


def weights(t: Any) -> Tensor:
    return torch.linspace(0.5, 1.5, max(t.numel, 1), dtype=torch.float64).reshape(t.shape)


def inlined(b: Builder, region: Region) -> tuple[Var, Var]:
    x = b.input(region.inputs[0].type)
    env = {region.inputs[0]: x}
    for e in region.eqns:
        b.copy_eqn(e, env)
    return x, env[region.outputs[0]]


def first(region: Region) -> Region:
    """``(x, weights) -> weights . df/dx``."""
    b = Builder(policy=Policy("reverse"))
    x, y = inlined(b, region)
    seed = b.input(y.type)
    return b.region([pullback(b, list(b.eqns), {y: seed}, [x])[x]])


def test_the_tables_name_nothing_that_is_not_tested_here() -> None:
    assert set(FORWARD) == legality._FORWARD_WRONG
    assert set(SECOND) == legality.SECOND_ORDER_FORMULA
    for op in FORWARD:
        assert not legality.forward_formula_trusted(op, (), ())
    assert not legality.forward_formula_trusted(A.scatter_reduce.two, (0, 0, 0, 0, "prod"), ())
    assert legality.forward_formula_trusted(A.scatter_reduce.two, (0, 0, 0, 0, "sum"), ())


@pytest.mark.parametrize("op", FORWARD, ids=str)
def test_a_forward_formula_that_is_not_trusted_is_not_used(op: Any) -> None:
    f, at = FORWARD[op]
    region = recorded(f, at)
    assert any(e.op is op for e in region.eqns)
    b = Builder(policy=Policy("reverse"))
    x, y = inlined(b, region)
    tangent = b.input(x.type)
    made = b.region([pushforward(b, list(b.eqns), {x: tangent})[y]])
    along = torch.randn(at.shape)
    (t,) = run(made, [at, along])
    w = weights(y.type)
    assert agrees(dot(t, w), slope(lambda p: dot(f(p[0]), w), [at], [along]), 1e-6)


@pytest.mark.parametrize("op", SECOND, ids=str)
def test_a_formula_for_one_order_is_not_differentiated(op: Any) -> None:
    """The second derivative, of the reverse rule's own equations, against differences of PyTorch's first."""
    f, at = SECOND[op]
    region = recorded(f, at)
    assert any(e.op is op for e in region.eqns)
    once = first(region)
    b = Builder(policy=Policy("reverse"))
    ins = [b.input(v.type) for v in once.inputs]
    (g,) = b.inline(once, ins)
    seed = b.input(g.type)
    twice = b.region([pullback(b, list(b.eqns), {g: seed}, [ins[0]])[ins[0]]])
    w, u, along = weights(region.outputs[0].type), torch.randn(at.shape), torch.randn(at.shape)

    def gradient(x: Tensor) -> Tensor:
        x = x.detach().requires_grad_()
        return torch.autograd.grad((f(x) * w).sum(), x)[0]

    torch.testing.assert_close(run(once, [at, w])[0], gradient(at))
    (found,) = run(twice, [at, w, u])
    assert agrees(dot(found, along), slope(lambda p: dot(gradient(p[0]), u), [at], [along]), 1e-6)
