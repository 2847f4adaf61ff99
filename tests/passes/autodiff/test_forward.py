"""Forward mode over equations against central differences in float64."""

import pytest
import torch
from torch import Tensor

from mlc.ir.builder import Builder
from mlc.ir.core import Index, Pack, Region, Var
from mlc.ir.types import SeqType, TensorType
from mlc.passes.autodiff.adjoint import Policy
from mlc.passes.autodiff.forward import pushforward
from tests.passes.autodiff.test_reverse import FUNCTIONS, X, stopped
from tests.passes.regions import agrees, dot, emit, loop_of, recorded, run, slope, values_for


def pushed(region: Region, *, passing: bool = False) -> Region:
    """``(*inputs, *tangents) -> tangents of results``."""
    b = Builder(policy=Policy("reverse"))
    env: dict[Var, Var] = {v: b.input(v.type) for v in region.inputs}
    tangents = {env[v]: b.input(v.type) for v in region.inputs}
    for e in region.eqns:
        b.copy_eqn(e, env)
    found = pushforward(b, list(b.eqns), tangents, passes=lambda e: passing)
    return b.region([found[env[v]] if env[v] in found else b.zero(v.type) for v in region.outputs])


def check(region: Region, made: Region | None = None) -> None:
    at, along = values_for(region), values_for(region, 1)
    found = run(made or pushed(region), [*at, *along])
    for k, v in enumerate(region.outputs):
        weights = torch.linspace(0.5, 1.5, max(v.type.numel, 1)).double().reshape(v.type.shape)  # type: ignore[union-attr]
        expected = slope(lambda x, k=k, w=weights: dot(run(region, x)[k], w), at, along)  # type: ignore[misc]
        assert agrees(dot(found[k], weights), expected), k


@pytest.mark.parametrize("name", FUNCTIONS)
def test_tangents_are_those_of_differences(name: str) -> None:
    f, like = FUNCTIONS[name]
    check(recorded(f, *like))


def test_the_root_of_an_optimizer() -> None:
    check(recorded(lambda x: x.sqrt() * x, X, safe_sqrt=True))
    root = pushed(recorded(lambda x: x.sqrt(), X, safe_sqrt=True))
    (t,) = run(root, [torch.tensor([0.0, 4.0, 0.0, 1.0]).double(), torch.ones(4).double()])
    assert t.tolist() == [0.0, 0.25, 0.0, 0.5]


def test_sequences() -> None:
    b = Builder(merge=False)
    t = TensorType.of(X)
    x, y = b.input(t), b.input(t)
    (packed,) = b.emit(Pack(), (x, emit(b, "sin", y)), (SeqType(t, 2),))
    picked = [b.emit(Index(i), (packed,), (t,))[0] for i in (0, 1)]
    check(b.region([emit(b, "mul", *picked, overload="Tensor")]))


def test_a_stop_lets_a_tangent_pass_where_it_is_told_to() -> None:
    region = stopped(None)
    check(region, pushed(region, passing=True))
    at, along = values_for(region), values_for(region, 1)
    (t,) = run(pushed(region), [*at, *along])
    torch.testing.assert_close(t, at[0].sin() * along[0])


def test_tangents_that_are_given_add_to_those_that_are_found() -> None:
    b = Builder()
    x, more = b.input(TensorType.of(X)), b.input(TensorType.of(X))
    y = emit(b, "sin", x)
    z = emit(b, "cos", y)
    found = pushforward(b, list(b.eqns), {x: more}, extra={y: more})
    at, t = torch.rand(4).double(), torch.rand(4).double()
    (made,) = run(b.region([found[z]]), [at, t])
    torch.testing.assert_close(made, -at.sin().sin() * (at.cos() * t + t))


@pytest.mark.parametrize("reverse", [False, True])
def test_a_loop_is_pushed_in_its_own_direction(reverse: bool) -> None:
    def step(c: Tensor, k: Tensor, each: Tensor) -> tuple[Tensor, Tensor]:
        new = (c * k + each).sin()
        return new, new * each

    region = loop_of(step, [X], [X], [X], trips=4, n_emit=1, reverse=reverse)
    whole = Builder()
    ins = [whole.input(v.type) for v in region.inputs]
    last, emitted = whole.inline(region, ins)
    picked = [whole.emit(Index(i), (emitted,), (TensorType.of(X),))[0] for i in (0, 2)]
    check(whole.region([last, *picked]))
