"""The page of scaling shows what the command prints."""

import re
from pathlib import Path

import pytest

import mlc
from mlc.view.scalingtext import Inner, cluster_of, inner_of, scaling_text

ROOT = Path(__file__).parents[2]


def test_the_page_shows_what_the_command_prints() -> None:
    text = (ROOT / "docs" / "scaling.md").read_text()
    found = re.search(r"<!-- mlc scale -->\n```text\n(.*?)\n```", text, flags=re.DOTALL)
    assert found is not None
    assert found[1] == scaling_text(Inner(), cluster_of(()), (8, 512), (8, 1000)).rstrip()


@pytest.mark.parametrize("text", ["memory", "speed=3", "memory=-1", "memory=nan"])
def test_rates_that_make_no_sense(text: str) -> None:
    with pytest.raises(mlc.PlanError, match="rate"):
        cluster_of([text])
    with pytest.raises(mlc.PlanError):
        inner_of(7e9, 0, 4096, 1)


def test_other_rates() -> None:
    assert cluster_of(["memory=80e9", "node=4"]).node == 4
