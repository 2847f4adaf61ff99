"""Equations are equal only if they compute the same: keyword arguments and the types of literals count."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import mlc
from mlc.ir.builder import Builder
from mlc.ir.core import Eqn, Region, Var, aten
from mlc.ir.keys import equation_key
from mlc.ir.types import TensorType
from mlc.passes.cost.facts import _twice
from mlc.passes.remat.numbering import Numbering
from mlc.passes.rolling.scalars import literal_key, spell_out
from mlc.passes.rules.recorded import signature
from mlc.runtime.inductor.segments import _value_numbers, key_of

F64 = TensorType(torch.float64, (2,), (1,), torch.device("cpu"))
ADD, CLAMP, SCALE = aten("add", "Tensor"), aten("clamp"), aten("mul", "Tensor")

# pairs of calls on (x, y) that are not the same computation
DIFFERENT: list[tuple[Any, Any]] = [
    ((ADD, ("x", "y"), {"alpha": 2}), (ADD, ("x", "y"), {"alpha": 3})),
    ((ADD, ("x", "y"), {}), (ADD, ("x", "y"), {"alpha": 3})),
    ((ADD, ("x", 1), {}), (ADD, ("x", True), {})),
    ((ADD, ("x", 1), {}), (ADD, ("x", 1.0), {})),
    ((SCALE, ("x", 0.0), {}), (SCALE, ("x", -0.0), {})),
    ((SCALE, ("x", complex(0, 0.0)), {}), (SCALE, ("x", complex(0, -0.0)), {})),
    ((CLAMP, ("x",), {"min": 0.5}), (CLAMP, ("x",), {"max": 0.5})),
    ((ADD, ("x", "y"), {}), (ADD, ("y", "x"), {})),
]


def region(*calls: Any) -> tuple[Region, list[Eqn]]:
    x, y = Var(F64), Var(F64)
    names = {"x": x, "y": y}
    eqns = [
        Eqn(op, tuple(names.get(a, a) if isinstance(a, str) else a for a in args), (Var(F64),), tuple(kw.items()))
        for op, args, kw in calls
    ]
    return Region((x, y), tuple(eqns), tuple(e.outs[0] for e in eqns)), eqns


@pytest.mark.parametrize("pair", DIFFERENT)
def test_different_computations_are_nowhere_the_same(pair: Any) -> None:
    r, (a, b) = region(*pair)
    assert equation_key(a, id) != equation_key(b, id)
    assert len(set(Numbering().region(r, {}).values())) == 4
    builder = Builder()
    for e in (a, b):
        builder.emit(e.op, e.args, [F64], e.kwargs, simplify=False)
    assert len(builder.eqns) == 2
    first, second = _value_numbers(r)
    assert first != second
    assert key_of(Region(r.inputs, (a,), a.outs)) != key_of(Region(r.inputs, (b,), b.outs))
    assert not _twice(Region(r.inputs, (a, b.with_(tag="recomputed")), r.outputs))
    if set(map(type, a.args)) != {Var}:
        assert literal_key(a, strict=True) != literal_key(b, strict=True)
        assert signature(a) != signature(b)


def test_the_same_computation_is_the_same() -> None:
    nan = float("nan")
    _, (a, b) = region((CLAMP, ("x",), {"min": nan, "max": 1}), (CLAMP, ("x",), {"max": 1, "min": float("nan")}))
    assert equation_key(a, id) == equation_key(b, id)


def test_zero_plus_a_multiple_is_the_multiple() -> None:
    b = Builder()
    y = b.input(F64)
    (out,) = b.emit(ADD, (b.zero(F64), y), (F64,), (("alpha", 3),))
    assert out is not y


@pytest.mark.parametrize("op", ["add", "sub", "rsub"])
def test_numbers_that_vary_keep_their_alpha(op: str) -> None:
    """A number that differs from trip to trip becomes a tensor; what it is scaled by stays."""
    x = torch.randn(2, dtype=torch.float64)
    v, out = Var(F64), Var(F64)
    call = aten(op, "Scalar")
    b = Builder(merge=True)
    eqns = spell_out(Eqn(call, (v, 5.0, 3.0), (out,)), b)
    env: dict[Var, Any] = {v: x}
    for e in [*b.eqns, *eqns]:
        args = [env[a] if type(a) is Var else a for a in e.args]
        env[e.outs[0]] = e.op(*args, **dict(e.kwargs))  # type: ignore[operator]
    torch.testing.assert_close(env[out], call(x, 5.0, 3.0))


@pytest.mark.parametrize("how", [{"alpha": 2.0}, {"alpha": -1}])
def test_sums_of_different_alpha_in_one_loss(how: dict[str, float]) -> None:
    w = torch.tensor([0.3, -0.7], dtype=torch.float64, requires_grad=True)
    p = torch.tensor([1.0, 0.5], dtype=torch.float64, requires_grad=True)

    def train(lr: float = 0.1) -> torch.Tensor:
        q = p
        for _ in range(2):
            a, b, c = torch.add(q, w), torch.add(q, w, **how), torch.add(q, w, alpha=3)
            (g,) = torch.autograd.grad((a.sin() * b.cos() + c.square() * b).sum(), q, create_graph=True)
            q = q - lr * g
        return q.square().sum()

    want = torch.autograd.grad(train(), w)[0]
    (got,) = torch.autograd.grad(mlc.compile(train)(), w)
    torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-12)
