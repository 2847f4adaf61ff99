"""Marks on loops follow their carries through the passes."""

import torch
from torch import Tensor

import mlc
from mlc.ir.core import Loop
from mlc.ir.watch import Watch
from mlc.passes.autodiff.watching import marked, watched
from tests.compiled.test_adjoints import start


def descend(x0: Tensor, m: Tensor) -> Tensor:
    x, batches = x0.clone().requires_grad_(), [torch.ones(2, dtype=x0.dtype), torch.zeros(2, dtype=x0.dtype)]
    opt = torch.optim.SGD([x], lr=0.1)
    for _ in range(3):
        for b in batches:
            opt.zero_grad()
            (m * (x - b)).square().sum().backward()
            opt.step()
        with torch.no_grad():
            x.mul_(0.9)  # so that epochs stay a loop of their own
    return x.sum()


def test_the_inner_loop_is_measured_and_the_outer_one_begins_the_run() -> None:
    program = marked(mlc.trace(descend, *start()))
    found = [w for e in program.region.walk() if isinstance(e.op, Loop) for w in e.op.watch]
    assert found == [Watch("L1", "state", (), True), Watch("L1", "state", (0,), False)]


def test_only_carries_with_a_derivative_are_measured() -> None:
    program = marked(mlc.trace(descend, *start()))
    inner = [e.op for e in program.region.walk() if isinstance(e.op, Loop) and e.op.watch][-1]
    assert watched(inner, [0], "tangent", first=3) == (Watch("L1", "tangent", (3,), False),)
    assert watched(inner, [], "adjoint") == ()


def test_a_program_without_levels_has_no_marks() -> None:
    def plain(x: Tensor, m: Tensor) -> Tensor:
        return (x * m).sum()

    program = mlc.trace(plain, *start())
    assert marked(program) is program
