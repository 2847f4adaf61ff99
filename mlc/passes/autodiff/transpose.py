"""Forward rules by transposition: a reverse rule is linear in its cotangent, and its transpose pushes tangents.

The "double-backward trick" (Townsend, 2017): J v = d/du <J^T u, v>.
"""

from __future__ import annotations

from mlc.errors import DifferentiationError
from mlc.ir.builder import Builder
from mlc.ir.core import Alias, Eqn, Var
from mlc.passes.autodiff.reverse import pullback
from mlc.passes.rules import recorded
from mlc.passes.rules.recorded import Given, NoRule, Rule, differentiable_outs, reverse_rule

__all__ = ["forward_rule", "transposed"]


def forward_rule(e: Eqn, active: Given) -> Rule:
    """Forward rule of ``e``, from PyTorch's formula or by transposition; see :func:`.recorded.forward_rule`."""
    return recorded.forward_rule(e, active, transposed)


def transposed(e: Eqn, active: Given) -> Rule:
    """Forward rule from the reverse rule, by differentiating the latter in its cotangent (linear in it)."""
    given = tuple([v.type if d else None for v, d in zip(e.outs, differentiable_outs(e), strict=True)])
    back = reverse_rule(e, tuple([a is not None for a in active]), given)
    b = Builder()
    ins = [b.input(v.type) for v in (*e.inputs, *e.outs)]
    tangents = [b.input(a) for a in active if a is not None]
    probes = [b.emit(Alias(), (b.zero(g),), (g,))[0] for g in given if g is not None]
    start = len(b.eqns)
    outs = b.inline(back.region, [*ins, *probes])
    seeds: dict[Var, Var] = {}
    for o, t in zip(outs, [t for t, p in zip(tangents, back.present, strict=True) if p], strict=True):
        seeds[o] = b.add(seeds.get(o), t)
    try:
        found = pullback(b, b.eqns[start:], seeds, probes)
    except DifferentiationError as err:
        raise NoRule(str(err)) from err
    probe = iter(probes)
    results = [found.get(next(probe)) if g is not None else None for g in given]
    return Rule(b.region([r for r in results if r is not None]), tuple([r is not None for r in results]))
