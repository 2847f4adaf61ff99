"""Pieces of the grammar: one choice on one axis, what it needs beside it, and how it writes itself.

A registry is one axis (models, losses, extras, ...). A piece writes its lines into a `Draft`. Two pieces that take
the same place (say, the step) exclude each other; `fits` states what else must hold of the whole `Spec`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tests.fuzz.draft import Draft
    from tests.fuzz.spec import Spec

Write = Callable[["Draft"], None]


@dataclass(frozen=True)
class Piece:
    """One choice.

    Attributes:
        name: As it stands in a `Spec`.
        write: Adds its lines to a draft.
        traits: Facts that other pieces ask for (`"bn"`, `"class"`, `"once"`, ...).
        takes: Places of the program that it fills; no two pieces may take the same.
        fits: Whether it can stand in a program.
        weight: How often it is drawn, compared with its neighbours.
    """

    name: str
    write: Write
    traits: frozenset[str] = frozenset()
    takes: frozenset[str] = frozenset()
    fits: Callable[[Spec], bool] = lambda spec: True
    weight: float = 1.0


class Axis(dict[str, Piece]):
    """All choices on one axis, by name."""

    def __init__(self, name: str) -> None:
        super().__init__()
        self.name = name

    def put(self, name: str, write: Write, traits: str = "", takes: str = "", **more: Any) -> None:
        """Register a piece; `traits` and `takes` are words."""
        assert name not in self, name
        self[name] = Piece(name, write, frozenset(traits.split()), frozenset(takes.split()), **more)

    def add(self, traits: str = "", takes: str = "", **more: Any) -> Callable[[Write], Write]:
        """Register the function under its own name."""

        def keep(write: Write) -> Write:
            self.put(write.__name__.rstrip("_"), write, traits, takes, **more)
            return write

        return keep

    def having(self, trait: str) -> Iterator[str]:
        """Names of the pieces with a trait."""
        return (name for name, piece in self.items() if trait in piece.traits)
