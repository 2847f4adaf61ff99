"""The proof that examples do not meet: kinds of values, and random regions split and not."""

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from mlc.ir.core import Eqn, Region, Var, aten
from mlc.ir.lowered.contract import Refused
from mlc.ir.types import TensorType
from mlc.ir.verify import verify
from mlc.passes.cost.memory import region_peak
from mlc.passes.microbatch.dependence import MIXED, SAME, SUM, Shard
from mlc.passes.microbatch.independence import Analysis, batchwise
from mlc.passes.microbatch.split import microbatch
from mlc.record.retype import shared
from tests.ir.regions import tensor
from tests.passes.regions import run

N = 4
RETYPE = shared()


class Regions:
    """A region written equation by equation, with types found out."""

    def __init__(self, *shapes: tuple[int, ...], dtype: torch.dtype = torch.float64) -> None:
        self.inputs = tuple(Var(tensor(*s, dtype=dtype)) for s in shapes)
        self.eqns: list[Eqn] = []

    def __call__(self, name: str, *args: Any, overload: str = "default", **kw: Any) -> Var:
        op = aten(name, overload)
        outs = tuple(map(Var, RETYPE.types(op, args, tuple(kw.items()))))
        self.eqns.append(Eqn(op, args, outs, tuple(kw.items())))
        return outs[0]

    def end(self, *outs: Var) -> Region:
        return Region(self.inputs, tuple(self.eqns), outs)


def values_for(region: Region) -> list[Tensor]:
    torch.manual_seed(0)
    return [torch.randn(v.type.shape, dtype=torch.float64) for v in region.inputs]


def compare(region: Region, k: int) -> None:
    split = microbatch(region, k)
    assert isinstance(split, Region), split
    verify(split)
    values = values_for(region)
    for a, b in zip(run(region, values), run(split, values), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


def linear(r: Regions) -> tuple[Var, Var, Var]:
    x, w = r.inputs[:2]
    return x, w, r("mm", x, w)


def test_kinds_of_values() -> None:
    r = Regions((N, 6), (6, 6))
    x, w, h = linear(r)
    grad = r("mm", r("t", x), h)
    step = r("sub", w, grad, overload="Tensor")
    square = r("mul", step, step, overload="Tensor")
    a = batchwise(r.end(square, h))
    assert isinstance(a, Analysis) and a.n == N and a.seeds == {x: Shard(0)}
    assert [a.kinds[v] for v in (w, h, grad, step, square)] == [SAME, Shard(0), SUM, MIXED, MIXED]


@pytest.mark.parametrize("outer", [False, True])
def test_flattened_tokens_are_examples_with_several_entries(outer: bool) -> None:
    r = Regions((3, N, 6) if outer else (N, 3, 6), (6, 5))
    x, w = r.inputs
    flat = r("view", x, [3 * N, 6])
    h = r("mm", flat, w)
    back = r("view", h, [*x.type.shape[:2], 5])  # type: ignore[union-attr]
    region = r.end(r("sum", back, [0, 1], overload="dim_IntList"), back)
    a = batchwise(region, data=[x], parts=2)
    assert isinstance(a, Analysis) and a.n == N
    assert a.kinds[h] == Shard(0, 3 if outer else 1) and a.kinds[back] == Shard(int(outer))
    compare(region, 2)


def test_copies_of_a_batch_behind_one_another() -> None:
    r = Regions((N, 6), (6, 5))
    x, w = r.inputs
    twice = r("cat", [x, r("neg", x)])
    h = r("mm", twice, w)
    first, second = r("slice", h, 0, 0, N, overload="Tensor"), r("slice", h, 0, N, 2 * N, overload="Tensor")
    region = r.end(r("mul", first, second, overload="Tensor"), h)
    a = batchwise(region)
    assert isinstance(a, Analysis) and a.kinds[h] == Shard(0, 2) and a.kinds[second] == Shard(0)
    compare(region, 2)


def test_an_operator_without_a_rule_is_never_assumed_to_keep_examples_apart() -> None:
    r = Regions((N, 6, 6), (6, 6))
    x, w = r.inputs
    h = r("bmm", x, r("expand", w, [N, 6, 6]))
    inverse = r("linalg_inv_ex", h)
    refused = batchwise(r.end(r("bmm", inverse, x)), data=[x])
    assert isinstance(refused, Refused) and "linalg_inv_ex" in refused.reason


def test_sums_of_half_precision_are_kept_in_single() -> None:
    r = Regions((N, 6), (6, 6), dtype=torch.bfloat16)
    x, _, h = linear(r)
    split = microbatch(r.end(r("mm", r("t", x), h)), 2)
    assert isinstance(split, Region)
    (loop,) = [e for e in split.eqns if e.tag == "micro" and e.op.name == "loop"]  # type: ignore[union-attr]
    total = loop.outs[0].type
    assert isinstance(total, TensorType) and total.dtype == torch.float32
    assert split.outputs[0].type.dtype == torch.bfloat16  # type: ignore[union-attr]


def test_the_peak_falls_with_the_number_of_parts() -> None:
    r = Regions((64, 256), (256, 256))
    _, w, h = linear(r)
    for _ in range(6):
        h = r("mm", r("tanh", h), w)
    region = r.end(r("sum", h))
    for k in (2, 4, 8):
        split = microbatch(region, k)
        assert isinstance(split, Region)
        assert region_peak(split) < 1.1 * region_peak(region) / k


# ---- random regions

STEPS = ("tanh", "affine", "weigh", "transpose", "softmax", "flatten", "norm", "attend", "double", "centre", "shift")


@st.composite
def regions(draw: Any) -> Region:
    """A few layers on (N, 6) or (N * 2, 3), a mean or sum at the end, and a gradient-like product."""
    r = Regions((N, 6), (6, 6), (6,), (N, 1))
    x, w, b, weight = r.inputs
    h = r("mm", x, w)
    for step in draw(st.lists(st.sampled_from(STEPS), max_size=5)):
        h = grown(r, h, step, w, b, weight)
    loss = r(draw(st.sampled_from(["sum", "mean"])), h)
    grad = r("mm", r("t", x), r("mul", h, r("sub", weight, 1.0, overload="Scalar"), overload="Tensor"))
    more = r("mul", r("add", grad, w, overload="Tensor"), r("neg", grad), overload="Tensor")
    return r.end(loss, more, h, r("mul", grad, loss, overload="Tensor"))


def grown(r: Regions, h: Var, step: str, w: Var, b: Var, weight: Var) -> Var:
    """Another layer; (N, 6) stays (N, 6)."""
    if step == "affine":
        return r("addmm", b, h, w)
    if step == "weigh":
        return r("mul", h, r("sigmoid", weight), overload="Tensor")
    if step == "transpose":
        return r("t", r("mm", r("t", w), r("t", h)))
    if step == "softmax":
        return r("_softmax", h, 1, False)
    if step == "flatten":
        three = r("view", r("sin", r("view", h, [2 * N, 3])), [N, 2, 3])
        return r("view", r("clone", three), [N, 6])
    if step == "norm":
        return r("native_layer_norm", h, [6], b, None, 1e-5)
    if step == "attend":
        three = r("view", h, [N, 2, 3])
        score = r("bmm", three, r("transpose", three, 1, 2, overload="int"))
        return r("view", r("bmm", r("_softmax", score, -1, False), three), [N, 6])
    if step == "double":
        both = r("cat", [h, r("neg", h)])
        return r("slice", r("tanh", r("mm", both, w)), 0, N, 2 * N, overload="Tensor")
    if step == "centre":
        share = r("sub", weight, r("mean", weight, [0], True, overload="dim"), overload="Tensor")
        return r("add", h, share, overload="Tensor")
    if step == "shift":
        return r("add", h, r("mean", h, [1], True, overload="dim"), overload="Tensor")
    return r(step, h)


@settings(max_examples=40, deadline=None)
@given(regions(), st.sampled_from([2, 4]))
def test_random_regions_give_the_same_in_parts(region: Region, k: int) -> None:
    compare(region, k)


@settings(max_examples=15, deadline=None)
@given(st.lists(st.sampled_from(STEPS), max_size=2), st.sampled_from(["centred", "other", "gram"]))
def test_random_regions_whose_examples_meet_are_refused(steps: list[str], how: str) -> None:
    r = Regions((N, 6), (6, 6), (6,), (N, 1))
    x, w, b, weight = r.inputs
    h = r("mm", x, w)
    for step in steps:
        h = grown(r, h, step, w, b, weight)
    if how == "centred":
        h = r("sub", h, r("mean", h, [0], True, overload="dim"), overload="Tensor")
    elif how == "other":
        h = r("add", h, r("flip", h, [0]), overload="Tensor")
    else:
        h = r("mm", r("mm", h, r("t", h)), h)
    assert isinstance(microbatch(r.end(r("sum", r("mm", h, w))), 2), Refused)
