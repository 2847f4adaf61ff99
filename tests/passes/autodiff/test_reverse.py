"""Reverse mode over equations against central differences in float64: sums of cotangents, roots, sequences, stops."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from mlc.ir.builder import Builder
from mlc.ir.core import Index, Pack, Region, SafeSqrt, Stop
from mlc.ir.types import SeqType, TensorType
from mlc.passes.autodiff.adjoint import Policy
from mlc.passes.autodiff.reverse import active_vars
from tests.passes.regions import check_adjoint, emit, joint, recorded, run

X, M = torch.rand(4, dtype=torch.float64), torch.rand(3, 4, dtype=torch.float64)
FUNCTIONS: dict[str, tuple[Callable[..., Any], tuple[Tensor, ...]]] = {
    "a value that is read twice": (lambda x: x * x.sin() + x, (X,)),
    "two results of one value": (lambda x: ((y := x.tanh()).sum(), y * y), (X,)),
    "products and means": (lambda m, x: (m @ x).tanh().mean() + m.mean(0).dot(x), (M, X)),
    "broadcasting": (lambda m, x: (m / x).sigmoid().square().sum(1), (M, X)),
    "several results of an operator": (lambda m: (r := torch.var_mean(m, 1))[0] + r[1] * r[1] + m.logsumexp(1), (M,)),
    "views": (lambda m: m.t()[1:3].reshape(-1).cumsum(0) * m.flatten()[:6], (M,)),
}


@pytest.mark.parametrize("name", FUNCTIONS)
def test_cotangents_are_those_of_differences(name: str) -> None:
    f, like = FUNCTIONS[name]

    def values(at: list[Any]) -> list[Tensor]:
        out = f(*at)
        return [out] if isinstance(out, Tensor) else list(out)

    check_adjoint(recorded(f, *like), values, Policy("reverse"))


def test_the_root_of_an_optimizer_is_a_root_away_from_zero_and_flat_at_it() -> None:
    region = recorded(lambda x: x.sqrt() * x, X, safe_sqrt=True)
    assert any(isinstance(e.op, SafeSqrt) for e in region.eqns)
    check_adjoint(region, lambda at: [at[0].sqrt() * at[0]], Policy("reverse"))
    root = recorded(lambda x: x.sqrt(), X, safe_sqrt=True)
    _, slope = run(
        joint(root, Policy("reverse")), [torch.tensor([0.0, 4.0, 0.0, 1.0]).double(), torch.ones(4).double()]
    )
    assert slope.tolist() == [0.0, 0.25, 0.0, 0.5]


def test_sequences_are_taken_apart_and_put_together() -> None:
    b = Builder(merge=False)
    t = TensorType.of(X)
    x, y = b.input(t), b.input(t)
    seq = b.input(SeqType(t, 3))
    (packed,) = b.emit(Pack(), (x, y, emit(b, "mul", x, y, overload="Tensor")), (SeqType(t, 3),))
    picked = [b.emit(Index(i), (s,), (t,))[0] for s, i in ((packed, 0), (packed, 2), (seq, 1), (seq, -1))]
    region = b.region([emit(b, "mul", picked[0], picked[2], overload="Tensor"),
                       emit(b, "mul", picked[1], emit(b, "sin", picked[3]), overload="Tensor")])  # fmt: skip

    def f(at: list[Any]) -> list[Tensor]:
        x, y, seq = at
        return [x * seq[1], x * y * seq[2].sin()]

    check_adjoint(region, f, Policy("reverse"))


def stopped(level: int | None) -> Region:
    b = Builder(merge=False)
    x = b.input(TensorType.of(X))
    (s,) = b.emit(Stop(level), (emit(b, "sin", x),), (TensorType.of(X),))
    return b.region([emit(b, "mul", s, x, overload="Tensor")])


@pytest.mark.parametrize(("level", "stop", "passes"), [(None, "all", False), (None, "inner", False), (1, "all", True),
                                                       (0, "torch", True)])  # fmt: skip
def test_a_stop_holds_for_whom_it_says(level: int | None, stop: str, passes: bool) -> None:
    """A cut that stands in no inner gradient is a constant of the hypergradient; one of a deeper level is none."""
    held = torch.rand(4, generator=torch.Generator().manual_seed(0), dtype=torch.float64) * 0.6 + 0.2

    def whole(at: list[Any]) -> list[Tensor]:
        return [at[0].sin() * at[0]]

    def frozen(at: list[Any]) -> list[Tensor]:
        return [held.sin() * at[0]]

    check_adjoint(stopped(level), whole, Policy("reverse", stop), cut=whole if passes else frozen)


def test_what_depends_on_a_value_is_found_through_every_result() -> None:
    region = recorded(lambda m, x: (torch.var_mean(m, 1)[0] * 2, x.argmax() + 1, (m @ x).round()), M, X)
    m, x = region.inputs
    assert active_vars(region.eqns, [m]) >= {region.outputs[0], region.outputs[2]}
    assert region.outputs[1] not in active_vars(region.eqns, [x])
    assert region.outputs[0] not in active_vars(region.eqns, [x])
