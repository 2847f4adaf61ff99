"""Code that ran in a call: what a walk follows once a call has been watched (:mod:`mlc.trace.python.reads`)."""

from __future__ import annotations

import types
from dataclasses import dataclass
from types import CodeType
from typing import Any

from mlc.trace.python.places import Path

__all__ = ["Found"]


@dataclass(frozen=True, eq=False)
class Found:
    """Code that ran in a call. Equal when the same code ran on the same namespaces.

    Attributes:
        codes: Code of the user's and its globals, in the order of the source.
        executed: The same, for membership.
        loads: Attributes that this code loads.
        functions: Functions that ran and are reached by no path: closures in objects of C.
        objects: Objects there before the call whose methods ran and that are reached by no path.
        libraries: Code of libraries that ran, by the name of the package.
        copied: Identities of objects that were copied whole (``copy``, ``dataclasses``): all of them was read.
        dynamic: The code may read every attribute of objects (``vars``).
        changed: Where lists that look like batches stood which the call changed: their length counts.
    """

    codes: tuple[tuple[CodeType, dict[str, Any]], ...]
    executed: frozenset[CodeType]
    loads: frozenset[str]
    functions: tuple[types.FunctionType, ...] = ()
    objects: tuple[Any, ...] = ()
    libraries: tuple[tuple[str, frozenset[CodeType]], ...] = ()
    copied: frozenset[int] = frozenset()
    dynamic: bool = False
    changed: frozenset[Path] = frozenset()

    def _identity(self) -> tuple[Any, ...]:
        return (
            self.changed,
            tuple((c, id(g)) for c, g in self.codes),
            tuple(map(id, self.functions)),
            tuple(map(id, self.objects)),
        )

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Found) and self._identity() == other._identity()

    def __hash__(self) -> int:
        return hash(self._identity())
