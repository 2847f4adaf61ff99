"""The model of scaling against arithmetic by hand, and its plans against what it would cost to do otherwise."""

import pytest

from mlc.passes.formulas.scaling import Cluster, Inner, candidates, changes, gathers, scaled

INNER, CLUSTER = Inner(), Cluster()


def test_bytes_and_seconds_by_hand() -> None:
    x = scaled(INNER, CLUSTER, 8, 8)
    assert x is not None
    assert (x.way, x.place) == ("done again", "device")
    assert x.memory["state"] == pytest.approx(28 * 7e9 / 8)
    assert x.memory["saved"] == pytest.approx(8 * 2 * 7e9 / 8)
    assert x.seconds["compute"] == pytest.approx(8 * 11.1 * 2 * 7e9 * 8192 / (0.4 * 989e12))
    assert x.seconds["collectives"] == pytest.approx(8 * 7 * (2 * 7e9 * 7 / 8 / 450e9 + 7 * 10e-6))


def test_the_plan_is_the_fastest_that_fits_and_changes_where_it_is_said() -> None:
    for g in (8, 512):
        found = changes(INNER, CLUSTER, g, 400)
        for t in (1, 2, 15, 16, 142, 143, 400):
            x = scaled(INNER, CLUSTER, g, t)
            assert x is not None
            assert x.total == min(y.total for y in candidates(INNER, CLUSTER, g, t) if y.fits)
            _, said = [c for c in found if c[0] <= t][-1]
            assert said is not None
            assert (said.way, said.place) == (x.way, x.place)


def test_what_does_not_fit() -> None:
    assert scaled(INNER, Cluster(memory=20e9), 8, 8) is None
    tight = scaled(INNER, Cluster(disk=1e12), 8, 1000)
    assert tight is None or tight.place != "disk"


def test_collectives_are_the_bound_below_the_tokens_that_are_said() -> None:
    tokens = gathers(INNER, CLUSTER, 512)["tokens"]
    for b, bound in ((int(tokens * 0.9), "collectives"), (int(tokens * 1.1), "compute")):
        x = next(
            y for y in candidates(Inner(tokens=b), CLUSTER, 512, 1) if (y.way, y.place) == ("done again", "device")
        )
        assert x.bound == bound
