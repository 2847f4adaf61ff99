"""States held sparsely: each is rebuilt as it was, from the nearest set before it; a written one is noticed."""

import pytest
import torch
from torch import Tensor

import mlc
from mlc.ir.core import Loop, Region, Replay
from mlc.runtime.interpreter.interpreter import compile_region
from mlc.runtime.interpreter.states import Rebuilt, States
from tests.passes.regions import recorded

TRIPS = 9


def made(slots: int, host: bool = False) -> tuple[States, list[Tensor]]:
    """States of a loop ``c * k + x``, and what they must be."""
    x = torch.rand(3, dtype=torch.float64)
    step = recorded(lambda c, k, x: c * k + x, x, x, x)
    body = Region(step.inputs, step.eqns, (*step.outputs, step.inputs[0]))
    op = Loop(body, 1, 1, TRIPS, replay=Replay(step, (0,), (0,), (0,), (), slots))
    k, xs = torch.rand(3).double(), [torch.rand(3).double() for _ in range(TRIPS)]
    states = States(op, compile_region(step, lambda e: None), [k], [xs], [[]], host)
    c, want = torch.rand(3).double(), []
    for t in range(TRIPS):
        want.append(c.clone())
        states.offer(t, [c])
        c = c * k + xs[t]
    states.settle()
    return states, want


@pytest.mark.parametrize("host", [False, True])
@pytest.mark.parametrize("slots", [1, 2, 3, 5, TRIPS])
def test_every_state_comes_back(slots: int, host: bool) -> None:
    states, want = made(slots, host)
    seq = Rebuilt(states, 0)
    assert seq.length == TRIPS
    for t in reversed(range(TRIPS)):
        assert torch.equal(seq[t], want[t]), t


def test_a_state_that_is_written_is_noticed() -> None:
    states, _ = made(2)
    held = states._held[0]
    assert isinstance(held, tuple)
    held[0][0].add_(1)
    with pytest.raises(mlc.DifferentiationError, match="in-place"):
        for t in reversed(range(TRIPS)):
            states.take(t, 0)
