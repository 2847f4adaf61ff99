"""Gradients of gradients against central differences in float64: mixed products, their seeds, penalties, stops."""

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from mlc.ir.builder import Builder
from mlc.ir.core import Alias, Grad, Loop, Region, Stop
from mlc.ir.types import TensorType
from mlc.passes.autodiff.adjoint import Policy
from tests.passes.regions import check_adjoint, emit, grad_of, recorded, values_for

X = torch.rand(4, dtype=torch.float64)
T = TensorType.of(X)
MODES = ("mixed", "reverse")


def loss(p: Tensor, w: Tensor) -> Tensor:
    return ((p * w).sin() * p.exp()).sum() + (p * p * w).mean().square()


def inner(p: Tensor, w: Tensor) -> Tensor:
    """The inner gradient, by PyTorch; differences are taken of what is made of its values."""
    p = p.detach().requires_grad_()
    with torch.enable_grad():
        return torch.autograd.grad(loss(p, w.detach()), p)[0]


def training(steps: int, *, share: bool = False) -> Region:
    """Steps ``p - 0.3 dL/dp``, written out; the value of the last loss, and the end."""
    b = Builder()
    p, w = b.input(T), b.input(T)
    made = recorded(loss, X, X)
    for _ in range(steps):
        (value,) = b.inline(made, [p, w])
        (g,) = grad_of(b, value, [p])
        p = emit(b, "sub", p, g, overload="Tensor", alpha=0.3)
    if share:
        p = emit(b, "mul", p, g, overload="Tensor")
    (value,) = b.inline(made, [p, w])
    return b.region([value, p])


def trained(at: Sequence[Tensor], steps: int, share: bool = False) -> list[Tensor]:
    p, w = at
    for _ in range(steps):
        g = inner(p, w)
        p = p - 0.3 * g
    p = p * g if share else p
    return [loss(p, w), p]


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("share", [False, True])
def test_a_step_is_differentiated_through_its_gradient(mode: str, share: bool) -> None:
    check_adjoint(training(2, share=share), lambda at: trained(at, 2, share), Policy(mode))


@pytest.mark.parametrize("mode", MODES)
def test_a_loop_of_steps(mode: str) -> None:
    b = Builder()
    p, w = b.input(T), b.input(T)
    (value,) = b.inline(recorded(loss, X, X), [p, w])
    (g,) = grad_of(b, value, [p])
    body = b.region([emit(b, "sub", p, g, overload="Tensor", alpha=0.3)])
    outer = Builder()
    ins = (outer.input(T), outer.input(T))
    (end,) = outer.emit(Loop(body, 1, 1, 3, label="train"), ins, (T,))
    region = outer.region([*outer.inline(recorded(loss, X, X), [end, ins[1]]), end])
    check_adjoint(region, lambda at: trained(at, 3), Policy(mode))


@pytest.mark.parametrize("mode", MODES)
def test_a_seed_that_depends_on_what_is_learned(mode: str) -> None:
    """``autograd.grad(loss, p, grad_outputs=w)``: the seed is differentiated as well."""
    b = Builder()
    p, w = b.input(T), b.input(T)
    each = emit(b, "sin", emit(b, "mul", p, w, overload="Tensor"))
    seed = emit(b, "exp", w)
    (g,) = b.emit(Grad(1, 1), (each, p, seed), (T,))
    region = b.region([emit(b, "mul", g, p, overload="Tensor")])
    check_adjoint(region, lambda at: [(at[0] * at[1]).cos() * at[1] * at[1].exp() * at[0]], Policy(mode))


@pytest.mark.parametrize("mode", MODES)
def test_a_penalty_on_a_gradient(mode: str) -> None:
    """A loss that holds a gradient, of which a gradient is taken: three derivatives."""
    b = Builder()
    p, w = b.input(T), b.input(T)
    (value,) = b.inline(recorded(loss, X, X), [p, w])
    (g,) = grad_of(b, value, [p])
    (penalty,) = b.inline(recorded(lambda g, p: (g * g).sum() + p.sum(), X, X), [g, p])
    (g2,) = grad_of(b, penalty, [p])
    region = b.region([emit(b, "sub", p, g2, overload="Tensor", alpha=0.1)])

    def f(at: list[Any]) -> list[Tensor]:
        p, w = at[0].detach().requires_grad_(), at[1].detach()
        with torch.enable_grad():
            (g,) = torch.autograd.grad(loss(p, w), p, create_graph=True)
            (g2,) = torch.autograd.grad((g * g).sum() + p.sum(), p)
        return [(p - 0.1 * g2).detach()]

    check_adjoint(region, f, Policy(mode), rel=1e-6)


def with_stop(level: int | None, depth: int) -> Region:
    """A loss in which a factor is stopped, one step of it, and a second loss that reads the factor as well."""
    b = Builder(merge=False)
    p, w = b.input(T), b.input(T)
    factor = emit(b, "sin", emit(b, "mul", p, w, overload="Tensor"))
    (held,) = b.emit(Stop(level), (factor,), (T,))
    value = emit(b, "sum", emit(b, "mul", held, emit(b, "exp", p), overload="Tensor"))
    (g,) = grad_of(b, value, [p], depth)
    p2 = emit(b, "sub", p, g, overload="Tensor", alpha=0.3)
    return b.region([emit(b, "mul", p2, held, overload="Tensor")])


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize(("level", "depth", "holds"), [(1, 1, True), (0, 1, True), (2, 1, False)])
def test_a_stop_of_a_level_is_a_constant_of_gradients_at_its_depth_only(
    mode: str, level: int, depth: int, holds: bool
) -> None:
    """The inner gradient takes the factor for a constant (or not, outside of its level); the hypergradient passes."""

    def f(at: list[Any]) -> list[Tensor]:
        p, w = at
        s, e = (p * w).sin(), p.exp()
        g = s * e + (0 if holds else (p * w).cos() * w * e)
        return [(p - 0.3 * g) * s]

    check_adjoint(with_stop(level, depth), f, Policy(mode))


@pytest.mark.parametrize("mode", MODES)
def test_under_inner_a_cut_belongs_to_the_gradient_that_it_stands_in(mode: str) -> None:
    """`stop_gradient="inner"`: the inner gradient holds the cut, and what the hypergradient passes is no cut to it."""

    def f(at: list[Any]) -> list[Tensor]:
        p, w = at
        s = (p * w).sin()
        return [(p - 0.3 * s * p.exp()) * s]

    check_adjoint(with_stop(None, 0), f, Policy(mode, "inner"))


@pytest.mark.parametrize("mode", MODES)
def test_a_gradient_by_an_activation_and_by_what_is_below_it(mode: str) -> None:
    """Directions enter at the parameter and at the activation that depends on it."""
    b = Builder(merge=False)
    p, w = b.input(T), b.input(T)
    (h,) = b.emit(Alias(), (emit(b, "tanh", emit(b, "mul", p, w, overload="Tensor")),), (T,))
    (value,) = b.inline(recorded(lambda h, p, w: (h * h * w).sum() + (p.sin() * w * w).sum(), X, X, X), [h, p, w])
    gp, gh = grad_of(b, value, [p, h])
    region = b.region([emit(b, "mul", gp, emit(b, "exp", gh), overload="Tensor")])

    def f(at: list[Any]) -> list[Tensor]:
        p, w = at
        h = (p * w).tanh()
        gh = 2 * h * w
        return [(gh * (1 - h * h) * w + p.cos() * w * w) * gh.exp()]

    check_adjoint(region, f, Policy(mode))


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize(("level", "holds"), [(1, True), (0, True), (2, False), (None, True)])
def test_stops_in_a_loop_that_a_gradient_goes_through(mode: str, level: int | None, holds: bool) -> None:
    """The gradient holds what is stopped in its own level and further out, and passes what deeper levels stop."""
    inner = Builder(merge=False)
    c, w = inner.input(T), inner.input(T)
    (s,) = inner.emit(Stop(level), (emit(inner, "sin", c),), (T,))
    body = inner.region([emit(inner, "mul", emit(inner, "add", c, s, overload="Tensor"), w, overload="Tensor")])
    b = Builder(merge=False)
    p, w = b.input(T), b.input(T)
    (end,) = b.emit(Loop(body, 1, 1, 2, label="loop"), (p, w), (T,))
    (g,) = grad_of(b, emit(b, "sum", emit(b, "exp", end)), [p], 1)
    region = b.region([emit(b, "sub", p, g, overload="Tensor", alpha=0.3)])

    def f(at: list[Any]) -> list[Tensor]:
        p, w = at
        c1 = (p + p.sin()) * w
        c2 = (c1 + c1.sin()) * w
        slope = w * w if holds else w * (1 + c1.cos()) * w * (1 + p.cos())
        return [p - 0.3 * c2.exp() * slope]

    if level is not None:
        check_adjoint(region, f, Policy(mode))
        return
    at = values_for(region)
    s1 = at[0].sin()
    s2 = ((at[0] + s1) * at[1]).sin()  # a cut that the user wrote is a constant of the hypergradient as well

    def cut(at: list[Any]) -> list[Tensor]:
        p, w = at
        return [p - 0.3 * (((p + s1) * w + s2) * w).exp() * w * w]

    check_adjoint(region, f, Policy(mode), cut=cut)
