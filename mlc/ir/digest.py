"""A hash of a program: equal for equal structure, whatever objects, names and places in source it came from."""

from __future__ import annotations

import hashlib
from typing import Any

from mlc.ir.core import Custom, EffectCall, Eqn, Feed, Loop, NestedEffects, Region, Var
from mlc.ir.program import Program

__all__ = ["digest"]


def _words(r: Region, out: list[str], outer: dict[Var, str]) -> None:
    names = dict(outer)

    def name(v: Var) -> str:
        return names.setdefault(v, f"%{len(names)}")

    out.append("(" + ",".join(f"{name(v)}:{v.type}" for v in r.inputs) + ")")
    for e in r.eqns:
        out.append(",".join(f"{name(v)}:{v.type}" for v in e.outs) + "=" + _op(e, out) + _args(e, name))
    out.append("return " + ",".join(name(v) for v in r.outputs))


def _op(e: Eqn, out: list[str]) -> str:
    op = e.op
    if isinstance(op, Loop):
        _words(op.body, out, {})
        return f"loop[{op.n_carry},{op.n_const},{op.trips},{op.reverse},{op.emit_every}]"
    if isinstance(op, Custom):
        _words(op.backward, out, {})
        return f"custom[{op.title}]"
    if isinstance(op, Feed):
        return f"feed[{op.trips},{_effects(op.effects)}]"
    return str(op)


def _effects(effects: Any) -> str:
    parts = []
    for x in effects:
        if isinstance(x, NestedEffects):
            parts.append(f"nested[{x.trips},{_effects(x.effects)}]")
        else:
            assert isinstance(x, EffectCall)
            parts.append(f"{x.op}{[str(a) for a in x.args]}{x.types}")
    return ";".join(parts)


def _args(e: Eqn, name: Any) -> str:
    def one(a: Any) -> str:
        if type(a) is Var:
            return str(name(a))
        if isinstance(a, (list, tuple)):
            return "[" + ",".join(one(x) for x in a) + "]"
        return f"{type(a).__name__}:{a!r}"

    return "(" + ",".join(one(a) for a in e.args) + "|" + ",".join(f"{k}={one(v)}" for k, v in e.kwargs) + ")"


def digest(p: Program) -> str:
    """SHA-256 of the program's structure, hexadecimal."""
    words: list[str] = [str(p.n_outputs), *[f"{x.role}" for x in p.inputs]]
    _words(p.region, words, {})
    return hashlib.sha256("\n".join(words).encode()).hexdigest()
