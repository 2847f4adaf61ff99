"""Sizes and times, read and written."""

from typing import Any

import pytest

import mlc
from mlc.units import parse_memory, size_text, time_text


@pytest.mark.parametrize(
    ("given", "size"),
    [(None, None), ("min", "min"), (7, 7), ("800MiB", 800 * 2**20), ("2 GB", 2 * 10**9), ("1.5KiB", 1536)],
)
def test_a_budget(given: Any, size: Any) -> None:
    assert parse_memory(given) == size


@pytest.mark.parametrize("given", [0, -1, "much", "", True, "-2GiB", 1.5, [1]])
def test_what_is_no_budget_is_refused(given: Any) -> None:
    with pytest.raises(mlc.PlanError, match="is not a size"):
        parse_memory(given)


def test_texts() -> None:
    assert [size_text(n) for n in (0, 1023, 2048, 5 * 2**30, 3 << 40)] == [
        "0 B",
        "1023 B",
        "2.0 KiB",
        "5.0 GiB",
        "3.0 TiB",
    ]
    assert [time_text(s) for s in (2, 0.01, 3e-6)] == ["2.00 s", "10.0 ms", "3 us"]
