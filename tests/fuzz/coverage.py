"""How much of the grammar a set of programs exercises: choices, and pairs of choices, seen of those that are possible.

A pair is possible when it was seen, or when some valid program can hold both; the latter is estimated by drawing a
large number of specs, which costs no more than a few seconds since nothing runs.
"""

from __future__ import annotations

from collections.abc import Iterable
from functools import cache
from itertools import combinations

from tests.fuzz.generate import spec_of
from tests.fuzz.spec import Spec

Choice = tuple[str, str]


def choices(spec: Spec) -> list[Choice]:
    """Every choice of a program, with its axis."""
    return sorted((axis, name) for axis, names in spec.features().items() for name in names)


def pairs(specs: Iterable[Spec]) -> set[tuple[Choice, Choice]]:
    """Pairs of choices that some program has."""
    return {pair for spec in specs for pair in combinations(choices(spec), 2)}


@cache
def possible(drawn: int = 60_000) -> frozenset[tuple[Choice, Choice]]:
    """Pairs that any of many drawn specs has."""
    return frozenset(pairs(spec_of(seed) for seed in range(drawn)))


def covered(specs: list[Spec], drawn: int = 60_000) -> dict[str, int]:
    """Counts of choices and of pairs, seen and possible."""
    seen, among = pairs(specs), possible(drawn)
    single = {choice for spec in specs for choice in choices(spec)}
    every = {choice for pair in among for choice in pair}
    return {
        "choices": len(single),
        "choices_possible": len(every | single),
        "pairs": len(seen),
        "pairs_possible": len(among | seen),
    }
