"""Keep or recompute: the cut against every possible choice on small graphs."""

import itertools
import random
from collections.abc import Sequence

import pytest
import torch

from mlc.ir.core import Eqn, Var, aten
from mlc.ir.types import TensorType
from mlc.passes.remat.mincut import Infeasible, choose, needed_for

TYPE = TensorType(torch.float32, (4,), (1,), torch.device("cpu"))
Prices = dict[Var, float | None]
Seconds = dict[Eqn, float | None]


def graph(seed: int) -> tuple[list[Var], list[Eqn], list[Var], Prices, Seconds]:
    """Inputs, six equations of up to two results and operands, what is demanded, and what all of it costs."""
    pick = random.Random(seed)
    inputs = [Var(TYPE) for _ in range(2)]
    values, eqns = list(inputs), []
    for _ in range(6):
        outs = tuple(Var(TYPE) for _ in range(pick.choice((1, 1, 1, 2))))
        eqns.append(Eqn(aten("add", "Tensor"), tuple(pick.choices(values, k=2)), outs))
        values += outs
    demanded = pick.sample(values[2:], 2)
    prices: Prices = {v: pick.choice((None, 1.0, 3.0, 8.0, 20.0)) for v in values}
    prices.update(dict.fromkeys(inputs, 0.0))
    return inputs, eqns, demanded, prices, {e: pick.choice((None, 2.0, 5.0, 9.0)) for e in eqns}


def cost(eqns: list[Eqn], demanded: list[Var], kept: set[Var], prices: Prices, seconds: Seconds) -> float:
    """Seconds of a choice, a value that is kept without need included; infinite when it cannot be."""
    again = needed_for(eqns, demanded, kept)
    read: Sequence[Var] = [*demanded, *[v for e in again for v in e.inputs]]
    made = {v for e in again for v in e.outs}
    if any(v not in kept and v not in made for v in read):
        return float("inf")
    parts = [prices[v] for v in kept] + [seconds[e] for e in again]
    return float("inf") if None in parts else sum(x for x in parts if x is not None)


@pytest.mark.parametrize("seed", range(60))
def test_the_choice_is_the_cheapest_of_all(seed: int) -> None:
    inputs, eqns, demanded, prices, seconds = graph(seed)
    values = [*inputs, *[v for e in eqns for v in e.outs]]
    every = itertools.chain.from_iterable(itertools.combinations(values, n) for n in range(len(values) + 1))
    least = min(cost(eqns, demanded, {*inputs, *kept}, prices, seconds) for kept in every)
    if least == float("inf"):
        with pytest.raises(Infeasible):
            choose(eqns, demanded, prices.__getitem__, seconds.__getitem__)
        return
    kept = choose(eqns, demanded, prices.__getitem__, seconds.__getitem__)
    assert cost(eqns, demanded, {*inputs, *kept}, prices, seconds) == pytest.approx(least)


@pytest.mark.parametrize("number", [1, 2, 5])
def test_what_can_be_neither_kept_nor_made_has_no_choice(number: int) -> None:
    with pytest.raises(Infeasible):
        choose([], [Var(TYPE) for _ in range(number)], lambda v: None, lambda e: 1.0)
