"""Seconds, flops and bytes of equations by hand, on a device whose rates are round numbers."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from mlc.ir.builder import Builder
from mlc.ir.core import Loop, Region, Replay
from mlc.ir.types import TensorType
from mlc.passes.cost.equations import Cost, Meter, device_of, flops
from mlc.passes.cost.rates import Rates
from tests.passes.regions import emit, loop_of, recorded

# 1 Gflop/s, 100 MB/s far and 1 GB/s near, 10 M exponentials a second, a start of a microsecond.
RATES = Rates(flops={2: 1e9, 4: 1e9, 8: 5e8}, near=1e9, far=1e8, cache=10_000, special={2: 1e7, 4: 1e7, 8: 5e6},
              start=1e-6, strain=1.0, threads=1)  # fmt: skip


def seconds(region: Region, rates: Rates = RATES) -> float:
    return Meter(rates).region(region).seconds


def one(name: str, *shapes: tuple[int, ...], dtype: torch.dtype = torch.float32, overload: str = "default") -> Region:
    b = Builder()
    ins = [b.input(TensorType.of(torch.empty(s, dtype=dtype))) for s in shapes]
    return b.region([emit(b, name, *ins, overload=overload)])


def test_a_product_takes_its_arithmetic() -> None:
    region = one("mm", (20, 30), (30, 10))
    assert flops(region.eqns[0]) == 2 * 20 * 30 * 10
    assert seconds(region) == pytest.approx(1e-6 + 12e-6)
    assert Meter(RATES).region(region) == Cost(12_000, 4 * (600 + 300 + 200), seconds(region))
    assert seconds(one("mm", (20, 30), (30, 10), dtype=torch.float64)) == pytest.approx(1e-6 + 24e-6)


def test_a_sum_takes_its_traffic_near_or_far() -> None:
    assert seconds(one("add", (500,), (500,), overload="Tensor")) == pytest.approx(1e-6 + 6_000 / 1e9)
    assert seconds(one("add", (5000,), (5000,), overload="Tensor")) == pytest.approx(1e-6 + 60_000 / 1e8)


def test_exponentials_take_longer_than_their_traffic() -> None:
    assert seconds(one("exp", (500,))) == pytest.approx(1e-6 + 500 / 1e7)
    assert seconds(one("gelu", (500,))) == pytest.approx(1e-6 + 5 * 500 / 1e7)


def test_a_view_takes_its_start_only() -> None:
    assert Meter(RATES).region(one("t", (500, 500))) == Cost(0, 0, 1e-6)


def test_a_real_sequence_of_operators_is_slower() -> None:
    region = one("exp", (500,))
    assert seconds(region, RATES.model_copy(update={"strain": 2.0})) == pytest.approx(2 * seconds(region))


def test_a_loop_takes_its_trips_and_its_replays() -> None:
    x = torch.rand(500)
    region = loop_of(lambda c: c.exp(), [x], trips=7)
    once = 1e-6 + 500 / 1e7
    assert seconds(region) == pytest.approx(7 * once)
    (e,) = region.eqns
    assert isinstance(e.op, Loop)
    op = replace(e.op, replay=Replay(e.op.body, (0,), (), (), (), 1))
    sparse = Region(region.inputs, (e.with_(op=op),), region.outputs)
    assert seconds(sparse) == pytest.approx((7 + 6 + 5 + 4 + 3 + 2 + 1) * once)


def test_a_body_is_measured_where_it_stands() -> None:
    """Two loops of one meter do not share what they cost."""

    def body(c: Tensor) -> Tensor:
        return c.exp().exp()

    meter = Meter(RATES)
    a, b = loop_of(lambda c: c.exp(), [torch.rand(500)]), loop_of(body, [torch.rand(500)])
    assert meter.region(b).seconds == pytest.approx(2 * meter.region(a).seconds)


def test_what_fuses_is_what_is_no_library_call() -> None:
    region = recorded(lambda x, w: ((x @ w).exp() * 2).exp().t(), torch.rand(4, 4), torch.rand(4, 4))
    saved, kinds = Meter(RATES).fusible(region)
    parts = [Meter(RATES)(e).seconds for e in region.eqns if "exp" in str(e.op) or "mul" in str(e.op)]
    assert kinds == 2 and saved == pytest.approx(sum(parts)) and len(parts) == 3


def test_a_region_computes_on_its_accelerator() -> None:
    assert device_of(one("exp", (3,))) == torch.device("cpu")
    t = TensorType(torch.float32, (3,), (1,), torch.device("cuda", 1))
    b = Builder()
    b.input(TensorType.of(torch.empty(3)))
    b.input(t)
    assert device_of(b.region([])) == torch.device("cuda", 1)
