"""Loops run trip by trip, in both directions, and what they emit has the order of the trips."""

import pytest
import torch
from torch import Tensor

from mlc.ir.core import Loop
from mlc.runtime.interpreter.interpreter import compile_region
from mlc.runtime.interpreter.loop import LoopRunner
from tests.passes.regions import loop_of, run

X = torch.rand(3, dtype=torch.float64)


def step(c: Tensor, k: Tensor, each: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    new = c * k + each
    return new, new - each, c


@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("trips", [0, 1, 5])
def test_trips_carry_and_emit(trips: int, reverse: bool) -> None:
    region = loop_of(step, [X], [X], [X], trips=trips, n_emit=2, reverse=reverse)
    c, k, each = torch.rand(3).double(), torch.rand(3).double(), [torch.rand(3).double() for _ in range(trips)]
    last, one, two = run(region, [c, k, each])
    want: dict[int, tuple[Tensor, Tensor]] = {}
    for t in reversed(range(trips)) if reverse else range(trips):
        new, a, b = step(c, k, each[t])
        want[t], c = (a, b), new
    torch.testing.assert_close(last, c)
    assert len(one) == len(two) == trips
    for t in range(trips):
        torch.testing.assert_close(one[t], want[t][0])
        torch.testing.assert_close(two[t], want[t][1])


def test_a_loop_of_open_length_runs_as_long_as_what_it_reads() -> None:
    (e,) = loop_of(step, [X], [X], [X], trips=2, n_emit=2).eqns
    assert isinstance(e.op, Loop)
    op = Loop(e.op.body, 1, 1, None)
    runner = LoopRunner(op, compile_region(op.body, lambda e: None))
    each = [torch.rand(3).double() for _ in range(4)]
    last, one, _ = runner([X, X, each])
    assert len(one) == 4
    c = X
    for x in each:
        c = c * X + x
    torch.testing.assert_close(last, c)
