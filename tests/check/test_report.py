"""The verdict of a check, from numbers made by hand."""

import math
from dataclasses import replace
from typing import Any

import pytest

from mlc.check.policyreport import PolicyCheck
from mlc.check.report import CheckReport, Difference, MetaError, Tolerances, best_pair, worst

GOOD = Difference("direction 1", 2.0, 2.0, 1e-9, 1e-10, 1e-4)
REPORT = CheckReport("train", (MetaError("w", 1.0, 1e-12),), (GOOD,), 0.0, 0.0, True, "the function itself",
                     Tolerances.of(1e-16))  # fmt: skip


def test_everything_agrees() -> None:
    assert REPORT.ok and REPORT.disagreeing == () and REPORT.rel_err == 1e-12
    assert "NOT ok" not in str(REPORT)


WRONG: dict[str, dict[str, Any]] = {
    "the unroll": {"metas": (MetaError("w", 1.0, 1e-3),)},
    "the differences": {"differences": (replace(GOOD, error=0.01),)},
    "the values": {"value_err": 1e-3},
    "the final state": {"state_err": 1e-3},
    "no number": {"wrong": ("w",)},
    "a value that is no number": {"value_err": math.nan},
    "nobody to ask": {"unrolled": False, "metas": (MetaError("w", 1.0, None),), "differences": ()},
    "differences that say nothing": {
        "unrolled": False, "metas": (MetaError("w", 1.0, None),), "differences": (replace(GOOD, spread=1.0),),
    },
}  # fmt: skip


@pytest.mark.parametrize("name", WRONG)
def test_one_disagreement_is_enough(name: str) -> None:
    report = replace(REPORT, **WRONG[name])
    assert not report.ok and "NOT ok" in str(report)


@pytest.mark.parametrize("responses", [(), ("FirstOrder() of level inner",)])
@pytest.mark.parametrize(("cosine", "norm", "ok"), [(0.9999, 1.0, True), (0.5, 1.0, False), (0.9999, 1.3, False)])
def test_a_policy_counts_beside_exact_and_approximate_responses(
    responses: tuple[str, ...], cosine: float, norm: float, ok: bool
) -> None:
    cost = PolicyCheck("'bf16'", cosine, norm, 0.01, "float64", {"w": 0.01})
    report = replace(REPORT, responses=responses, precision=cost)
    assert report.ok is ok
    assert f"cosine {cosine:.6f}" in str(report) and ("NOT ok" in str(report)) is not ok


def test_a_difference_is_believed_as_far_as_it_is_determined() -> None:
    assert not replace(GOOD, error=2e-4).ok
    assert replace(GOOD, error=2e-4, spread=1e-4).ok  # kinks: five times their own distance
    assert not replace(GOOD, error=6e-4, spread=1e-4).ok
    assert replace(GOOD, error=0.5, spread=0.02).ok and not replace(GOOD, spread=0.02).conclusive
    assert replace(GOOD, error=0.5, informs=True).ok


def test_the_two_steps_that_agree_best_count() -> None:
    assert best_pair([1.0, 2.0, 2.1, 5.0]) == (pytest.approx(2.05), pytest.approx(0.1))
    assert best_pair([math.nan, 2.0, 2.5, math.inf]) == (2.25, 0.5)
    assert math.isnan(best_pair([math.nan, 1.0])[0])
    assert worst([0.1, 0.3, 0.2]) == 0.3 and math.isnan(worst([0.1, math.nan, 0.2]))
