"""Responses as values: what they accept, how they print, their way through JSON."""

import json

import pytest

import mlc
from mlc.ir.lowered.responses import read, written

ALL = [
    mlc.Unroll(),
    mlc.Truncated(3),
    mlc.FirstOrder(),
    mlc.FiniteDifference(),
    mlc.FiniteDifference(eps=1e-4),
    mlc.Implicit("gmres", steps=7, tol=1e-9, damping=0.5, data="all"),
    mlc.ForwardGradient(samples=4),
    mlc.Evolution(sigma=0.1, samples=2, persistent=True),
    mlc.FullyFirstOrder(penalty=3.0),
]


@pytest.mark.parametrize("response", ALL, ids=str)
def test_a_response_comes_back_from_json(response: mlc.Response) -> None:
    again = read(json.loads(json.dumps(written(response))))
    assert again == response and hash(again) == hash(response) and type(again) is type(response)


def test_only_unroll_is_exact() -> None:
    assert [r.exact for r in ALL] == [True] + [False] * 8


def test_a_response_prints_what_is_not_the_default() -> None:
    assert str(mlc.Implicit("cg", steps=20)) == "Implicit('cg', steps=20)"
    assert (
        str(mlc.Implicit("gmres", tol=0.1)) == "Implicit('gmres', tol=0.1)" and str(mlc.Implicit()) == "Implicit('cg')"
    )
    assert str(mlc.Truncated(3)) == "Truncated(steps=3)"
    assert str(mlc.Unroll()) == "Unroll()"


WRONG = [
    (lambda: mlc.Truncated(0), "steps"),
    (lambda: mlc.Truncated(True), "steps"),
    (lambda: mlc.Truncated(2.0), "steps"),
    (lambda: mlc.FiniteDifference(eps=0.0), "eps"),
    (lambda: mlc.Implicit("lu"), "solver"),
    (lambda: mlc.Implicit(steps=0), "steps"),
    (lambda: mlc.Implicit(tol=float("nan")), "tol"),
    (lambda: mlc.Implicit(damping=-1.0), "damping"),
    (lambda: mlc.Implicit(data="first"), "data"),
    (lambda: mlc.ForwardGradient(0), "samples"),
    (lambda: mlc.Evolution(sigma=0), "sigma"),
    (lambda: mlc.Evolution(persistent=1), "persistent"),
    (lambda: mlc.FullyFirstOrder(penalty="1"), "penalty"),
]


@pytest.mark.parametrize(("make", "name"), WRONG)
def test_settings_that_make_no_sense_are_refused_by_name(make: object, name: str) -> None:
    with pytest.raises(mlc.PlanError, match=name):
        make()  # type: ignore[operator]


@pytest.mark.parametrize("data", [{"kind": "Lu"}, {"steps": 3}, {"kind": "Truncated", "steps": 2, "x": 1}])
def test_what_is_no_response_is_refused(data: dict[str, object]) -> None:
    with pytest.raises(mlc.PlanError, match="no response"):
        read(data)
