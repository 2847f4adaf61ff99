"""Dead parts of loops go, what a needed value of a later trip reads stays."""

import torch
from torch import Tensor

from mlc.ir.core import Loop, Region
from mlc.passes.remat.prune import prune
from tests.passes.regions import loop_of, run, values_for

X = torch.rand(3, dtype=torch.float64)


def chain(a: Tensor, b: Tensor, c: Tensor, d: Tensor, k: Tensor, m: Tensor, s: Tensor, u: Tensor) -> tuple[Tensor, ...]:
    """`a` reads `b`, which reads `c` a trip earlier; `d` and what it reads lead nowhere."""
    return a + b.sin(), c * k, c + s, d * m * u, a * 2, d + u


def pruned(*kept: int) -> tuple[Loop, Region]:
    region = loop_of(chain, [X] * 4, [X] * 2, [X] * 2, trips=4, n_emit=2)
    region = Region(region.inputs, region.eqns, tuple(region.outputs[i] for i in kept))
    out = prune(region)
    at = values_for(region)
    for x, y in zip(run(out, at), run(region, at), strict=True):
        torch.testing.assert_close(x, y)
    (e,) = out.eqns
    assert isinstance(e.op, Loop)
    return e.op, out


def test_a_carry_that_is_read_two_trips_later_stays() -> None:
    op, _ = pruned(0)
    assert (op.n_carry, op.n_const, op.n_seq, op.n_emit) == (3, 1, 1, 0)


def test_what_leads_nowhere_goes() -> None:
    assert pruned(2)[0].n_carry == 1
    assert pruned(3)[0].n_carry == 1
    op, _ = pruned(3, 5)
    assert (op.n_carry, op.n_const, op.n_seq, op.n_emit) == (1, 1, 1, 1)


def test_a_loop_that_nobody_reads_goes() -> None:
    region = loop_of(chain, [X] * 4, [X] * 2, [X] * 2, trips=4, n_emit=2)
    assert not prune(Region(region.inputs, region.eqns, region.inputs[:1])).eqns
