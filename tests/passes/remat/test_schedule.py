"""Order on demand: anchors as they were, everything else just before its first reader."""

import torch

from mlc.ir.builder import Builder
from mlc.ir.core import Random, Region, aten
from mlc.ir.types import TensorType
from mlc.ir.verify import verify
from mlc.passes.cost.memory import region_peak
from mlc.passes.remat.schedule import on_demand
from tests.passes.regions import emit

T = TensorType.of(torch.rand(1000))


def sweep(n: int) -> Region:
    """`n` values made first, read one by one afterwards."""
    b = Builder()
    x = b.input(T)
    made = [emit(b, "mul", x, float(i), overload="Tensor") for i in range(n)]
    total = x
    for v in made:
        total = emit(b, "add", total, emit(b, "sin", v), overload="Tensor")
    return b.region([total])


def test_a_value_is_made_where_it_is_needed() -> None:
    region = sweep(8)
    ordered = on_demand(region, lambda e: e.op is aten("add", "Tensor"))
    verify(ordered)
    assert set(ordered.eqns) == set(region.eqns)
    assert region_peak(ordered) < 0.6 * region_peak(region)
    adds = [e for e in region.eqns if e.op is aten("add", "Tensor")]
    assert [e for e in ordered.eqns if e in adds] == adds
    position = {v: i for i, e in enumerate(ordered.eqns) for v in e.outs}
    for i, e in enumerate(ordered.eqns):
        if e.op is aten("sin"):
            assert position[e.inputs[0]] == i - 1


def test_operands_keep_their_order() -> None:
    b = Builder()
    x = b.input(T)
    one, two = emit(b, "sin", x), emit(b, "cos", x)
    region = b.region([emit(b, "sub", two, one, overload="Tensor")])
    assert on_demand(region, lambda e: e.op is aten("sub", "Tensor")).eqns == region.eqns


def test_draws_are_not_moved() -> None:
    b = Builder(merge=False)
    x = b.input(T)
    layout = (T.shape, T.stride, T.dtype, T.device)
    draws = [b.emit(Random(aten("uniform_"), fill=True), (*layout, 0, 1), (T,))[0] for _ in range(2)]
    late = emit(b, "sub", draws[1], x, overload="Tensor")
    region = b.region([late, draws[0]])
    assert on_demand(region, lambda e: e.op is aten("sub", "Tensor")) is region
