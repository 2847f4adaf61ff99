"""What the user's objects hold from call to call: edited lists, generators and iterators of their own, plain values."""

from __future__ import annotations

import array
import datetime
import decimal
import fractions
import itertools
import pathlib
import random
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

import mlc


class Box:
    """Something with attributes."""


class Counter:
    """An iterator of the user's."""

    def __init__(self) -> None:
        self.i = 0

    def __next__(self) -> float:
        self.i += 1
        return float(self.i)


def step(p: Tensor, s: Tensor, by: Any = 1.0) -> Tensor:
    (g,) = torch.autograd.grad((s * p * by).square().sum(), p)
    with torch.no_grad():
        p -= 0.1 * g
    return p.detach().clone()


def trimmed(p, s, held):
    held.append(step(p, s))
    del held[:-2]


def popped(p, s, held):
    held.append(step(p, s))
    if len(held) > 2:
        held.pop(0)
    with torch.no_grad():
        p.copy_(sum(held) / len(held))


def in_front(p, s, held):
    held.insert(0, step(p, s))


def replaced(p, s, held):
    held[:] = [{"p": step(p, s)}]


def both_ends(p, s, held):
    held.append(step(p, s) * 2)
    held[0] = p.detach().clone()


def turned(p, s, held):
    held.append(step(p, s))
    held.reverse()


def inner(p, s, held):
    if not held:
        held.append([])
    held[0][:] = [step(p, s)]


LISTS = [trimmed, popped, in_front, replaced, both_ends, turned, inner]
DRAWN: dict[str, Callable[[], tuple[Any, Callable[[Any], Any]]]] = {
    "numpy generator": lambda: (np.random.default_rng(0), lambda r: r.random()),
    "numpy state": lambda: (np.random.RandomState(0), lambda r: r.permutation(4)[0] + 1.0),
    "python random": lambda: (random.Random(0), lambda r: r.random()),
    "iterator": lambda: (boxed(it=iter([torch.tensor(float(i)) for i in range(1, 9)])), lambda b: next(b.it)),
    "loader": lambda: (boxed(it=iter(DataLoader(torch.arange(1.0, 9.0), batch_size=1))), lambda b: next(b.it)),
    "count": lambda: (boxed(it=itertools.count(1)), lambda b: next(b.it)),
    "own": lambda: (boxed(it=Counter()), lambda b: next(b.it)),
}
VALUES = {
    "fraction": (fractions.Fraction(1), fractions.Fraction(2), float),
    "decimal": (decimal.Decimal(1), decimal.Decimal(2), float),
    "time": (datetime.timedelta(seconds=1), datetime.timedelta(seconds=2), lambda t: t.total_seconds()),
    "path": (pathlib.Path("a"), pathlib.Path("ab"), lambda p: float(len(p.name))),
    "array": (array.array("d", [1.0]), array.array("d", [2.0]), lambda a: a[0]),
}


def boxed(**attributes: Any) -> Box:
    box = Box()
    vars(box).update(attributes)
    return box


def numbers(x: Any) -> Any:
    if isinstance(x, (list, dict)):
        return [numbers(v) for v in (x.values() if isinstance(x, dict) else x)]
    return round(x.item(), 9)


def new() -> tuple[Tensor, Tensor]:
    return nn.Parameter(torch.ones(1, dtype=torch.float64)), nn.Parameter(torch.tensor(0.7, dtype=torch.float64))


@pytest.mark.parametrize("where", ["argument", "attribute"])
@pytest.mark.parametrize("edit", LISTS, ids=lambda f: f.__name__)
def test_edited_lists(edit: Callable[..., None], where: str) -> None:
    def train(p: Tensor, s: Tensor, held: Any) -> Tensor:
        edit(p, s, held if where == "argument" else held.list)
        return (p * s).sum()

    found = []
    for f in (train, mlc.compile(train)):
        (p, s), held = new(), []
        given = held if where == "argument" else boxed(list=held)
        found.append([(numbers(f(p, s, given)), numbers(held), numbers(p)) for _ in range(5)])
    assert found[1] == found[0]


@pytest.mark.parametrize("name", DRAWN)
def test_generators_and_iterators_of_the_users(name: str) -> None:
    draw = DRAWN[name]()[1]

    def train(p: Tensor, s: Tensor, held: Any) -> Tensor:
        step(p, s, draw(held))
        return (p * s).sum()

    found = []
    for f in (train, mlc.compile(train)):
        (p, s), (held, _) = new(), DRAWN[name]()
        values = [numbers(f(p, s, held)) for _ in range(4)]
        found.append((values, float(draw(held))))
    assert found[1] == found[0]


@pytest.mark.parametrize("name", VALUES)
def test_plain_values_without_attributes(name: str) -> None:
    one, two, number = VALUES[name]

    def train(p: Tensor, s: Tensor, held: Any) -> Tensor:
        step(p, s, number(held))
        return (p * s).sum()

    found = []
    for f in (train, mlc.compile(train)):
        p, s = new()
        found.append([numbers(f(p, s, held)) for held in (one, two, one)])
    assert found[1] == found[0]
