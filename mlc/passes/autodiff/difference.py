"""FiniteDifference: a second-order product as a central difference of gradients.

With v the cotangent of an inner gradient g = dL/dtheta, and h = eps / |v|,

    (d/dtheta, d/du) <v, g>  ~  (grad_{theta,u} L(theta + h v) - grad_{theta,u} L(theta - h v)) / (2 h)

(Pearlmutter 1994, section 2; DARTS, Liu et al. 2019, eq. 8).  Two gradients instead of a forward sweep over one; the
error is h^2 |v|^3 L'''' / 6 and rounding over h.  Stopped values are inputs of L: they stay what they are at theta.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch

from mlc.errors import PlanError
from mlc.ir.builder import Builder
from mlc.ir.core import Loop, Stop, Var, aten
from mlc.ir.origin import Origin
from mlc.passes.autodiff.norm import norm, scalar
from mlc.passes.autodiff.policy import GradRecord
from mlc.passes.autodiff.reverse import pullback

__all__ = ["difference"]


def difference(b: Builder, rec: GradRecord, eps: float | None, directions: Mapping[Var, Var],
               ends: tuple[Sequence[Var], Sequence[Var]], cts: dict[Var, Var], active: set[Var]) -> None:  # fmt: skip
    """The product of one inner gradient, added to ``cts``.

    Args:
        b: Where equations go.
        rec: The gradient.
        eps: Length of the step; None: chosen from the precision and the length of the parameters.
        directions: Cotangents of the gradient, by what it was taken by.
        ends: What it was taken by, and what else its loss reads.
        cts: Cotangents.
        active: Values that carry a derivative.
    """
    _refuse_stops_in_loops(rec)
    h = _step(b, eps, directions)
    targets = [v for v in (*ends[0], *ends[1]) if v in active]
    sides = [_side(b, rec, h, directions, targets, sign) for sign in (1.0, -1.0)]
    double = b.emit(aten("mul", "Tensor"), (h, 2.0), (h.type,))[0]
    up, down = sides
    for v in targets:
        if v in up[0] and v in down[0]:
            cts[v] = b.add(cts.get(v), _quotient(b, up[0][v], down[0][v], double))
    for i, seed in enumerate(rec.seeds):
        if seed in active:
            cts[seed] = b.add(cts.get(seed), _quotient(b, up[1][i], down[1][i], double))


def _refuse_stops_in_loops(rec: GradRecord) -> None:
    loops = [e for e in rec.slice if isinstance(e.op, Loop)]
    for e in loops:
        if any(isinstance(x.op, Stop) for x in e.op.body.walk()):  # type: ignore[union-attr]
            raise PlanError(
                "FiniteDifference: the level's loss goes through a loop that holds constants of its own", loc=e.loc,
                advice="use mlc.Unroll(), or move detach() out of that loop",
            )  # fmt: skip


def _step(b: Builder, eps: float | None, directions: Mapping[Var, Var]) -> Var:
    """h, a number: the length of the step over that of the direction."""
    thetas = list(directions)
    kind = scalar(thetas[0].type)
    size = norm(b, list(directions.values()))
    tiny = torch.finfo(kind.dtype).tiny ** 0.5
    (size,) = b.emit(aten("clamp_min"), (size, tiny), (kind,))
    if eps is not None:
        return b.emit(aten("mul", "Tensor"), (b.emit(aten("reciprocal"), (size,), (kind,))[0], eps), (kind,))[0]
    root = float(torch.finfo(kind.dtype).eps) ** (1 / 3)
    (longer,) = b.emit(aten("add", "Scalar"), (norm(b, thetas), 1.0), (kind,))
    (length,) = b.emit(aten("mul", "Tensor"), (longer, root), (kind,))
    return b.emit(aten("div", "Tensor"), (length, size), (kind,))[0]


def _side(b: Builder, rec: GradRecord, h: Var, directions: Mapping[Var, Var], targets: Sequence[Var], sign: float
          ) -> tuple[dict[Var, Var], list[Var]]:  # fmt: skip
    """Gradients by ``targets``, and losses, a step away."""
    inside = {v for e in rec.slice for v in e.outs}
    held = {v for e in rec.slice if e in rec.cut for v in e.outs}
    env: dict[Var, Var] = {v: v for e in rec.slice for v in e.inputs if v not in inside}
    env.update((v, v) for v in held)
    env.update((v, v) for v in targets if v not in inside)
    env.update((v, v) for v in (*rec.losses, *rec.wrt) if v not in inside)
    for v, d in directions.items():
        if v not in inside:
            env[v] = _moved(b, v, d, h, sign)
    start, still = len(b.eqns), []
    for e in rec.slice:
        if e in rec.cut:
            continue
        if all(env[v] is v for v in e.inputs):  # it does not move
            env.update((v, v) for v in e.outs)
            still.append(e)
            continue
        if isinstance(e.op, Stop):
            env[e.outs[0]] = env[e.args[0]]
            continue
        b.copy_eqn(e, env)
        for v in e.outs:
            if v in directions:
                env[v] = _moved(b, env[v], directions[v], h, sign)
    seeds: dict[Var, Var] = {}
    for loss, seed in zip(rec.losses, rec.seeds, strict=True):
        seeds[env[loss]] = b.add(seeds.get(env[loss]), seed)
    found = pullback(b, [*still, *b.eqns[start:]], seeds, [env[v] for v in targets], cut=frozenset())
    return {v: found[env[v]] for v in targets if env[v] in found}, [env[v] for v in rec.losses]


def _moved(b: Builder, v: Var, d: Var, h: Var, sign: float) -> Var:
    t = v.type
    (by,) = b.emit(aten("mul", "Tensor"), (d, h), (d.type,))
    op = aten("add", "Tensor") if sign > 0 else aten("sub", "Tensor")
    return b.emit(op, (v, by), (t,))[0]


def _quotient(b: Builder, up: Var, down: Var, double: Var) -> Var:
    (apart,) = b.emit(aten("sub", "Tensor"), (up, down), (up.type,))
    return b.emit(aten("div", "Tensor"), (apart, double), (up.type,), tag=Origin.TANGENT)[0]
