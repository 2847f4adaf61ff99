"""Residuals: whatever is kept, the numbers are the same; a loop is paired with its own adjoint and no other."""

import pytest
import torch
from torch import Tensor

from mlc.ir.builder import Builder
from mlc.ir.core import Loop, Region, Var
from mlc.ir.types import SeqType, TensorType
from mlc.ir.verify import verify
from mlc.passes.autodiff.policy import Policy
from mlc.passes.cost.equations import Meter
from mlc.passes.cost.memory import held_at
from mlc.passes.cost.rates import Rates
from mlc.passes.remat.residuals import Pair, keep_residuals, pairs
from mlc.passes.remat.states import replays, sparse_states
from tests.passes.regions import emit, grad_of, joint, recorded, run, values_for

RATES = Rates(flops={2: 1e10, 4: 1e10, 8: 1e10}, near=1e10, far=1e9, cache=2**19, special={2: 1e8, 4: 1e8, 8: 1e8},
              start=1e-6, strain=1.0, threads=1)  # fmt: skip
METER = Meter(RATES)
X = torch.rand(4, dtype=torch.float64)
T = TensorType.of(X)
SEQ = SeqType(T, 5)


def loss(p: Tensor, m: Tensor, w: Tensor, each: Tensor) -> Tensor:
    return (((p * w).tanh() * each).exp() * p).sum() + (m * p).square().mean()


def training() -> Region:
    """Five steps with momentum on a loss with data, whose gradient is differentiated; and its hypergradient."""
    b = Builder()
    p, m, w, each = (b.input(T) for _ in range(4))
    (value,) = b.inline(recorded(loss, X, X, X, X), [p, m, w, each])
    (g,) = grad_of(b, value, [p])
    m2 = emit(b, "add", emit(b, "mul", m, 0.9, overload="Tensor"), g, overload="Tensor")
    p2 = emit(b, "sub", p, m2, overload="Tensor", alpha=0.1)
    body = b.region([p2, m2])
    outer = Builder()
    ins = (outer.input(T), outer.input(T), outer.input(T), outer.input(SEQ))
    end = outer.emit(Loop(body, 2, 1, 5, label="train"), ins, (T, T))
    return joint(outer.region([emit(outer, "mul", *end, overload="Tensor")]), Policy("mixed"))


REGION = training()
AT = values_for(REGION)
EXPECTED = run(REGION, AT)


def same(region: Region) -> None:
    verify(region)
    for a, b in zip(run(region, AT), EXPECTED, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-11, atol=1e-13)


def emissions(region: Region) -> int:
    return sum(e.op.n_emit for e in region.eqns if isinstance(e.op, Loop) and e.tag != "adjoint")


@pytest.mark.parametrize("price", [0.0, 1e-12, 1e-9, 1e-7, 1.0])
def test_at_every_price_the_numbers_are_the_same(price: float) -> None:
    same(keep_residuals(REGION, price, METER))


def test_less_is_kept_where_bytes_are_dear() -> None:
    free, dear = (emissions(keep_residuals(REGION, price, METER)) for price in (0.0, 1.0))
    assert free > emissions(REGION) >= dear == 2


def test_at_no_price_the_adjoint_makes_nothing_of_the_sweep_again() -> None:
    """Every primal value that the sweep has is read from there: the bodies have no function of the inputs in common."""
    region = keep_residuals(REGION, 0.0, METER)
    (pair,) = pairs(region)
    adjoint = region.eqns[pair.adjoint].op
    assert isinstance(adjoint, Loop)
    assert not any("tanh.default" in str(e.op) or "exp.default" in str(e.op) for e in adjoint.body.eqns)


@pytest.mark.parametrize("price", [0.0, 1e-9, 1.0])
@pytest.mark.parametrize("slots", [1, 2, 3, 4])
def test_states_that_are_replayed_are_the_same(slots: int, price: float) -> None:
    region = sparse_states(keep_residuals(REGION, price, METER), slots, price, METER)
    loops = [e.op for e in region.eqns if isinstance(e.op, Loop) and e.op.replay is not None]
    assert [op.replay.slots for op in loops if op.replay is not None] == [slots]
    same(region)


def test_as_many_states_as_trips_are_all_kept() -> None:
    assert not any(isinstance(e.op, Loop) and e.op.replay for e in sparse_states(REGION, 5, 1e-9, METER).eqns)


def test_replays_are_counted_per_trip() -> None:
    assert replays(5, 1) == (0 + 1 + 2 + 3 + 4) / 5
    assert replays(4, 4) == 0
    for trips, slots in ((9, 2), (16, 3), (33, 4)):  # what is replayed once serves the trips to come
        alone = sum(t - max(h for h in held_at(trips, slots) if h <= t) for t in range(trips))
        assert replays(trips, slots) * trips < 0.6 * alone


def test_an_adjoint_is_paired_with_its_own_loop() -> None:
    """It reads emissions of a loop before, too: those of another label, or run in its own direction."""

    def loop(
        label: str, inputs: tuple[Var, ...], n_carry: int, reverse: bool = False, derived: tuple[str, ...] = ()
    ) -> tuple[Var, ...]:
        inner = Builder()
        ins = [inner.input(T) for _ in inputs]
        out = emit(inner, "mul", ins[0], ins[-1], overload="Tensor")
        op = Loop(inner.region([*[out] * n_carry, out]), n_carry, 0, 5, reverse, label, derived=derived)
        return b.emit(op, inputs, [*[T] * n_carry, SEQ], tag=" ".join(derived))

    for first in (("loop", False), ("train", True)):
        b = Builder()
        x, data = b.input(T), b.input(SEQ)
        _, drawn = loop(first[0], (x, data), 1, first[1])
        _, made = loop("train", (x, drawn), 1)
        _, grads = loop("train", (x, drawn, made), 1, True, ("adjoint",))
        assert pairs(b.region([grads])) == [Pair(1, 2)]
