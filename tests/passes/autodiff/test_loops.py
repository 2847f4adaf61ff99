"""Loops under differentiation against float64 differences: every role of a value, both directions, nested."""

from typing import Any

import pytest
import torch
from torch import Tensor

from mlc.ir.builder import Builder
from mlc.ir.core import Index, Loop, Region
from mlc.ir.types import TensorType
from mlc.passes.autodiff.adjoint import Policy
from mlc.passes.autodiff.reverse import loop_activity
from tests.passes.regions import check_adjoint, loop_of

X = torch.rand(4, dtype=torch.float64)
T = TensorType.of(X)


def step(c: Tensor, d: Tensor, k: Tensor, each: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Two carries that swap roles, a constant and a sequence; what is emitted is no carry."""
    new = (c * k + each).sin()
    return d * k, new, new * each + c


def unrolled(c: Tensor, d: Tensor, k: Tensor, each: Any, reverse: bool) -> tuple[Tensor, Tensor, list[Tensor]]:
    n = len(each)
    emitted: list[Any] = [None] * n
    for t in reversed(range(n)) if reverse else range(n):
        c, d, emitted[t] = step(c, d, k, each[t])
    return c, d, emitted


def finished(region: Region, *picks: int) -> Region:
    """The loop's carries and some of the elements that it emits."""
    b = Builder()
    *carries, emitted = b.inline(region, [b.input(v.type) for v in region.inputs])
    return b.region([*carries, *[b.emit(Index(i), (emitted,), (T,))[0] for i in picks]])


@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("trips", [1, 4])
def test_every_role_has_its_cotangent(trips: int, reverse: bool) -> None:
    region = loop_of(step, [X, X], [X], [X], trips=trips, n_emit=1, reverse=reverse)

    def f(at: list[Any]) -> list[Tensor]:
        c, d, emitted = unrolled(*at, reverse)
        return [c, d, emitted[0], emitted[-1]]

    check_adjoint(finished(region, 0, -1), f, Policy("reverse"))


def test_what_is_only_emitted_has_its_cotangent() -> None:
    region = loop_of(step, [X, X], [X], [X], trips=3, n_emit=1)
    whole = finished(region, 1)
    alone = Region(whole.inputs, whole.eqns, whole.outputs[2:])
    check_adjoint(alone, lambda at: [unrolled(*at, False)[2][1]], Policy("reverse"))


def test_loops_in_loops() -> None:
    inner = loop_of(lambda c, k: (c * k).sin() + k, [X], [X], trips=3)
    b = Builder()
    c, k = b.input(T), b.input(T)
    (out,) = b.inline(inner, [c, k])
    body = b.region([out])
    outer = Builder()
    ins = [outer.input(T), outer.input(T)]
    region = outer.region(list(outer.emit(Loop(body, 1, 1, 2, label="loop"), tuple(ins), (T,))))

    def f(at: list[Any]) -> list[Tensor]:
        c, k = at
        for _ in range(6):
            c = (c * k).sin() + k
        return [c]

    check_adjoint(region, f, Policy("reverse"))


def test_a_carry_that_only_the_end_needs_has_no_cotangent() -> None:
    """A running mean beside the training: nothing is kept for it, and its start has no gradient."""

    def both(c: Tensor, mean: Tensor) -> tuple[Tensor, Tensor]:
        new = c.sin()
        return new, mean * 0.9 + new * 0.1

    region = loop_of(both, [X, X], trips=3)
    alone = Region(region.inputs, region.eqns, region.outputs[:1])
    check_adjoint(alone, lambda at: [at[0].sin().sin().sin()], Policy("reverse"))


def test_a_carry_depends_on_what_reaches_it_after_some_trips() -> None:
    region = loop_of(lambda a, b, c, d: (a + b, b + c, c.sin(), d * 2), [X] * 4, trips=5)
    (e,) = region.eqns
    a, b, c, d = region.inputs
    assert [loop_activity(e, {v}, False)[0] for v in (a, b, c, d)] == [[0], [0, 1], [0, 1, 2], [3]]
    check_adjoint(Region(region.inputs, region.eqns, region.outputs[:1]),
                  lambda at: [at[0] + 5 * at[1] + sum_of_sums(at[2])], Policy("reverse"))  # fmt: skip


def sum_of_sums(c: Tensor) -> Tensor:
    """What five trips of ``a + b, b + c, sin c`` add to `a`."""
    a = b = torch.zeros_like(c)
    for _ in range(5):
        a, b, c = a + b, b + c, c.sin()
    return a
