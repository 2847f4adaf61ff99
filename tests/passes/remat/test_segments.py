"""Rematerialisation in a region: exact, worth its price, and less of it the more often a region runs."""

import pytest
import torch
from torch import Tensor

from mlc.ir.core import Eqn, Region
from mlc.ir.origin import Origin
from mlc.ir.verify import verify
from mlc.passes.autodiff.policy import Policy
from mlc.passes.cost.memory import region_peak
from mlc.passes.remat.segments import Trade, rematerialise
from tests.passes.regions import joint, recorded, run, values_for
from tests.passes.remat.test_residuals import METER

LAYERS = 8
X = torch.rand(64, 64, dtype=torch.float64)


def stacked(x: Tensor, *weights: Tensor) -> Tensor:
    for w in weights:
        x = (x @ w).tanh() * x
    return x.sum()


REGION = joint(recorded(stacked, X, *[X] * LAYERS), Policy("reverse"))
UNIT = METER.rates.unit


def anchor(e: Eqn) -> bool:
    return e.origin is not Origin.RECOMPUTED


def made(price: float, times: int = 1) -> Region:
    return rematerialise(REGION, anchor, Trade(price * UNIT, times), METER)


def again(region: Region) -> int:
    return sum(e.origin is Origin.RECOMPUTED for e in region.eqns)


def worth(region: Region, price: float, times: int) -> float:
    return price * UNIT * region_peak(region) + times * METER.region(region).seconds


@pytest.mark.parametrize("price", [1.0, 30.0, 1000.0])
def test_numbers_are_the_same(price: float) -> None:
    region, at = made(price), values_for(REGION)
    verify(region)
    assert again(region) > 0 or price == 1.0
    for a, b in zip(run(region, at), run(REGION, at), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


def test_the_peak_falls_with_the_price() -> None:
    peaks = [region_peak(made(price)) for price in (0.0, 30.0, 1000.0)]
    assert peaks[0] > peaks[1] >= peaks[2] and peaks[2] < 0.95 * peaks[0]


@pytest.mark.parametrize("times", [1, 3, 10, 30, 100])
@pytest.mark.parametrize("price", [3.0, 10.0, 30.0, 100.0, 300.0])
def test_what_is_computed_again_is_worth_its_seconds_in_all_runs(price: float, times: int) -> None:
    """A body that runs a hundred times pays for every trip; the bytes are saved once."""
    assert worth(made(price, times), price, times) <= worth(made(0.0), price, times) * (1 + 1e-12)


def test_what_runs_often_is_computed_again_less() -> None:
    assert again(made(300.0, 1)) > again(made(300.0, 10000)) == 0
