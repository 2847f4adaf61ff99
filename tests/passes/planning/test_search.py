"""The search: which candidate is worth its time, fronts, and a bisection that finds the first that fits."""

from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor

import mlc
from mlc.ir.lowered.contract import Levers
from mlc.passes.planning.planned import joint_of
from mlc.passes.planning.search import Search, _first, _slots, front, thrift


@dataclass(frozen=True)
class Point:
    seconds: float
    peak: int


def test_half_the_memory_is_worth_half_as_much_time_again_but_not_twice() -> None:
    """`memory="min"`: a percent of memory is worth 0.8 percent of time."""
    whole: Any = Point(1.0, 1000)
    assert thrift(Point(1.5, 500)) < thrift(whole) < thrift(Point(2.0, 500))  # type: ignore[arg-type]
    assert thrift(Point(2.5, 250)) < thrift(whole) < thrift(Point(4.0, 250))  # type: ignore[arg-type]


def test_a_front_is_sorted_and_has_nothing_that_another_beats() -> None:
    a, b, c, d = Point(1, 9), Point(2, 9), Point(3, 1), Point(1, 10)
    assert front([c, b, d, a]) == [a, c]  # type: ignore[list-item]


@pytest.mark.parametrize("first", range(8))
def test_the_first_that_fits_is_found(first: int) -> None:
    ladder = [Levers(float(i)) for i in range(7)]
    assert _first(ladder, lambda x: x.price >= first) == (first if first < 7 else None)


def test_sets_of_states_grow_slower_than_trips() -> None:
    assert [_slots(n) for n in (1, 2, 4, 9, 100)] == [(None, None), (2, 1), (2, 1), (3, 2), (10, 5)]


def training(w: Tensor, xs: list[Tensor]) -> Tensor:
    p = torch.ones(8, 8, dtype=torch.float64, requires_grad=True)
    opt = torch.optim.Adam([p], lr=0.1, eps=1e-3)
    for x in xs:
        opt.zero_grad()
        ((p @ w).tanh() * x).square().mean().backward()
        opt.step()
    return (p @ w).square().mean()


@pytest.fixture(scope="module")
def search() -> Search:
    w = torch.rand(8, 8, dtype=torch.float64, requires_grad=True)
    program = mlc.trace(training, w, [torch.rand(8, 8, dtype=torch.float64) for _ in range(5)])
    plan = mlc.plan(program, flows="mixed")
    return Search("mixed", joint_of(program, plan))


def test_under_a_budget_the_fastest_that_was_seen_is_taken(search: Search) -> None:
    least, most = search.smallest().peak, search.at(search.ladder()[0]).peak
    for share in (0.0, 0.5):
        budget = int(least + share * (most - least))
        found = search.fastest(budget)
        assert found is not None and found.peak <= budget
        assert all(c.seconds >= found.seconds for c in search.found.values() if c.peak <= budget)
    assert search.fastest(least - 1) is None


def test_a_ladder_goes_from_fast_to_small(search: Search) -> None:
    rungs = [search.at(x) for x in search.ladder()]
    assert rungs[0].seconds == min(c.seconds for c in rungs)
    assert min(c.peak for c in rungs[-3:]) < 0.6 * rungs[0].peak
    assert search.trips == 5


def test_frugal_is_between_fast_and_small(search: Search) -> None:
    found = search.frugal()
    assert thrift(found) == min(thrift(c) for c in search.found.values())
    assert found.peak < search.at(search.ladder()[0]).peak
