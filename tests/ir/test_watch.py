"""A mark is no part of what a loop is, and keeps to its carries."""

import torch

from mlc.ir.core import Eqn, Loop, Region, Var, aten
from mlc.ir.types import TensorType
from mlc.ir.watch import Watch
from mlc.passes.remat.prune import prune

VEC = TensorType(torch.float32, (2,), (1,), torch.device("cpu"))


def test_marks_compare_equal_and_follow_carries_that_are_left() -> None:
    a, b, out = Var(VEC), Var(VEC), Var(VEC)
    body = Region((a, b), (Eqn(aten("neg"), (b,), (out,)),), (a, out))
    mark = Watch("L1", "adjoint", (1,), True)
    plain, marked = (Loop(body, 2, 0, 3, watch=w) for w in ((), (mark,)))
    assert plain == marked and hash(plain) == hash(marked)
    x, y, unread, result = (Var(VEC) for _ in range(4))
    kept = prune(Region((x, y), (Eqn(marked, (x, y), (unread, result)),), (result,)))
    op = kept.eqns[0].op
    assert isinstance(op, Loop) and op.n_carry == 1
    assert op.watch == (Watch("L1", "adjoint", (0,), True),)
