"""A fault: one place of mlc's source that is replaced, and the tests that must notice."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

__all__ = ["ROOT", "Fault", "Misplanted", "table"]

ROOT = Path(__file__).parents[2]


class Misplanted(Exception):
    """What a fault replaces is not in its module exactly once: the module changed, and the fault has to follow it."""


@dataclass(frozen=True)
class Fault:
    """A wrong line.

    Attributes:
        name: Short; what the compiler does wrong.
        module: Dotted name of the module of mlc.
        find: Source text that stands in the module exactly once.
        put: What stands there instead.
        tests: Files or single tests, from the root of the repository, at least one of which must fail.
    """

    name: str
    module: str
    find: str
    put: str
    tests: tuple[str, ...]

    @property
    def path(self) -> Path:
        """The module's file."""
        return ROOT.joinpath(*self.module.split(".")).with_suffix(".py")

    def planted(self, source: str) -> str:
        """The module's source with the fault.

        Raises:
            Misplanted: unless the text is there exactly once.
        """
        if (count := source.count(self.find)) != 1:
            raise Misplanted(f"{self.name}: {count} places in {self.module} read {self.find!r}")
        return source.replace(self.find, self.put)


def table(module: str, tests: str, rows: Iterable[tuple[str, str, str] | tuple[str, str, str, str]]) -> list[Fault]:
    """Faults of one module.

    Args:
        module: Its name behind ``mlc.``.
        tests: Tests that notice, separated by blanks; a row may name its own.
        rows: (name, find, put) or (name, find, put, tests).
    """
    return [
        Fault(name, f"mlc.{module}", find, put, tuple((own or [tests])[0].split())) for name, find, put, *own in rows
    ]
