"""A part of a long table of cases in the default suite, all of it in `make test-all`."""

from collections.abc import Callable, Iterable
from typing import Any

import pytest


def every(n: int, cases: Iterable[Any], name: Callable[[Any], str] = str) -> list[Any]:
    """Cases for `parametrize`: each `n`-th runs always, the others are slow."""
    return [pytest.param(c, id=name(c), marks=() if i % n == 0 else pytest.mark.slow) for i, c in enumerate(cases)]
