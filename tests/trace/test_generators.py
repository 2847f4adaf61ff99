"""Generators of three libraries: taken, put back, and no state where there is none."""

import random

import numpy as np
import torch

from mlc.trace.generators import is_generator, kept, put_state, state_of

MADE = [torch.Generator(), np.random.default_rng(1), np.random.RandomState(1), random.Random(1),
        np.random.Generator(np.random.SFC64(2))]  # fmt: skip


def draw(g: object) -> float:
    if isinstance(g, torch.Generator):
        return float(torch.rand((), generator=g))
    return float(g.random())  # type: ignore[attr-defined]


def test_what_was_drawn_comes_again() -> None:
    for g in MADE:
        assert is_generator(g)
        state = state_of(g)
        first = [draw(g) for _ in range(3)]
        put_state(g, state)
        assert [draw(g) for _ in range(3)] == first


def test_kept_puts_back_shared_and_own_generators() -> None:
    with kept(MADE):
        inside = [torch.rand(()).item(), np.random.rand(), random.random(), *map(draw, MADE)]
    assert [torch.rand(()).item(), np.random.rand(), random.random(), *map(draw, MADE)] == inside


def test_the_systems_randomness_has_no_state() -> None:
    assert not is_generator(random.SystemRandom())
