"""The shares of `tests/share.py`: of tests that are there, and always of some cases."""

import re
from pathlib import Path

from tests.share import SHARE, left_out

TESTS = Path(__file__).parent


def test_every_share_is_of_a_test_with_cases() -> None:
    for file, shares in SHARE.items():
        text = (TESTS / f"{file}.py").read_text()
        for name, share in shares.items():
            assert re.search(rf"^def {name}\(", text, re.M), f"{file}: {name} is gone: take it off the table"
            assert share > 1


def test_a_share_leaves_some_cases_and_not_by_their_order() -> None:
    file, (test, share) = next((f, t) for f, shares in SHARE.items() for t in shares.items())
    names = [f"tests/{file}.py::{test}[{i}-{flag}]" for i in range(10 * share) for flag in ("a", "b")]
    left = left_out([*names, "tests/other.py::test_one[1]"])
    kept = [n for n in names if n not in left]
    assert len(kept) == 20
    assert {n[-2] for n in kept} == {"a", "b"}
    assert left == left_out(reversed([*names, "tests/other.py::test_one[1]"]))
