"""Building equations: equal ones are one, trivial ones none, and one may be put in after the fact."""

import torch

from mlc.ir.builder import Builder
from mlc.ir.core import Random, Stop, aten
from mlc.ir.types import TensorType

T = TensorType(torch.float64, (2,), (1,), torch.device("cpu"))


def test_a_value_is_split_where_it_was_made() -> None:
    """Whoever read it goes on doing so; positions and producers are those of the new order."""
    b = Builder(merge=False)
    x = b.input(T)
    (y,) = b.emit(aten("sin"), (x,), (T,))
    (z,) = b.emit(aten("mul", "Tensor"), (y, y), (T,))
    y.mask = 4
    new = b.split(y, Stop(1), None, "hook")
    assert [e.op for e in b.eqns] == [aten("sin"), Stop(1), aten("mul", "Tensor")]
    assert (b.eqns[0].outs, b.eqns[1].args, b.eqns[1].outs) == ((new,), (new,), (y,))
    assert [b.position[v] for v in (x, new, y, z)] == [-1, 0, 1, 2]
    assert [b.producer(v) for v in (new, y, z)] == b.eqns
    assert new.mask == 4
    assert b.eqns[2].args == (y, y)


def test_equal_equations_are_one_unless_they_draw() -> None:
    b = Builder()
    x = b.input(T)
    assert b.emit(aten("sin"), (x,), (T,)) == b.emit(aten("sin"), (x,), (T,)) != b.emit(aten("cos"), (x,), (T,))
    layout = (T.shape, T.stride, T.dtype, T.device)
    draws = [b.emit(Random(aten("uniform_"), fill=True), (*layout, 0, 1), (T,)) for _ in range(2)]
    assert draws[0] != draws[1]
    assert len(b.region([x]).eqns) == 2  # the draws stay: they move a generator


def test_zeros_simplify_only_what_they_leave_as_it_is() -> None:
    b = Builder()
    x, zero = b.input(T), b.zero(T)
    add, sub, mul = aten("add", "Tensor"), aten("sub", "Tensor"), aten("mul", "Tensor")
    assert b.emit(add, (x, zero), (T,)) == b.emit(add, (zero, x), (T,)) == b.emit(sub, (x, zero), (T,)) == (x,)
    assert b.emit(mul, (x, zero), (T,)) == (zero,) == b.emit(aten("neg"), (zero,), (T,))
    assert b.emit(sub, (zero, x), (T,)) != (x,)  # its negative
    assert b.emit(add, (zero, x), (T,), (("alpha", 2),)) != (x,)
    other = TensorType(torch.float64, (3, 2), (2, 1), T.device)
    assert b.emit(add, (x, b.zero(other)), (other,)) != (x,)  # broadcast
    assert b.add(None, x) is x and b.add(zero, x) is x and b.add(x, zero) is x
