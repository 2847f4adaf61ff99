"""A hash of a program: equal for equal structure, whatever objects, names and places it came from."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from typing import Any

from mlc.ir.core import Custom, EffectCall, Eqn, Feed, Loop, NestedEffects, Region, Var
from mlc.ir.literals import Objects, literal_text, type_text
from mlc.ir.problem import Problem

__all__ = ["digest"]


class _Words:
    """Collects the words of a program; values are numbered region by region."""

    def __init__(self) -> None:
        self.out: list[str] = []
        self.objects = Objects()

    def region(self, r: Region) -> None:
        names: dict[Var, str] = {}

        def name(v: Var) -> str:
            return names.setdefault(v, f"%{len(names)}")

        def typed(vs: Iterable[Var]) -> str:
            return ",".join(f"{name(v)}:{type_text(v.type)}" for v in vs)

        self.out.append(f"({typed(r.inputs)})")
        for e in r.eqns:
            args = self.args(e.args, e.kwargs, name)
            self.out.append(f"{typed(e.outs)}={self.op(e)}{args}")
        self.out.append("return " + ",".join(map(name, r.outputs)))

    def op(self, e: Eqn) -> str:
        op = e.op
        if isinstance(op, Loop):
            self.region(op.body)
            replay = ""
            if op.replay is not None:
                self.region(op.replay.body)
                r = op.replay
                replay = f",{r.carries},{r.consts},{r.seqs},{r.dense},{r.slots}"
            host = f",host{op.host}" if op.host else ""
            return f"loop[{op.n_carry},{op.n_const},{op.trips},{op.reverse}{replay}{host}]"
        if isinstance(op, Custom):
            self.region(op.backward)
            return f"custom[{op.title},{op.n_in},{op.n_out},{op.present}]"
        if isinstance(op, Feed):
            return f"feed[{op.trips},{self.effects(op.effects)}]"
        return str(op)

    def effects(self, effects: Any) -> str:
        parts = []
        for x in effects:
            if isinstance(x, NestedEffects):
                parts.append(f"nested[{x.trips},{self.effects(x.effects)}]")
            else:
                assert isinstance(x, EffectCall)
                types = ",".join(map(type_text, x.types))
                parts.append(f"{x.op}{self.args(x.args, x.kwargs, None)}:{types}")
        return ";".join(parts)

    def args(self, args: Any, kwargs: Any, name: Any) -> str:
        """Literals as text; objects by the order in which they are met."""
        parts = [literal_text(a, name, self.objects) for a in args]
        parts += [f"{k}={literal_text(v, name, self.objects)}" for k, v in kwargs]
        return "(" + ",".join(parts) + ")"


def digest(p: Problem) -> str:
    """SHA-256 of the program's structure, hexadecimal."""
    words = _Words()
    words.out += [str(p.n_outputs), *[x.role for x in p.inputs]]
    words.region(p.region)
    return hashlib.sha256("\n".join(words.out).encode()).hexdigest()
