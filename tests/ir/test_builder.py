"""Building equations: one that is put in after the fact."""

import torch

from mlc.ir.builder import Builder
from mlc.ir.core import Stop, aten
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
