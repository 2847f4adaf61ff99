"""Stage graphs as readable Python: one line per equation, and behind it what was decided about it.

::

    def backward(kept_0, ct_0):
        with loop("adjoint train", trips=4, reverse=True) as trip:  # 3: 2 values
            v2 = trip.carry(v1)
            v5 = mm(v2, v3)  # 7: f32[8,4] 128 B; recomputed, freed after #9 add; line 38 in model.0

It parses as Python but is for reading; the text form of :mod:`mlc.ir.text` is the one that reads back.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable, Iterator, Sequence

from mlc.ir.core import Custom, Eqn, Grad, Loop, Region, Var
from mlc.ir.literals import Objects, literal_text, type_text
from mlc.ir.origin import Origin
from mlc.passes.cost.facts import Fact, Stage, facts_of, op_name
from mlc.units import size_text

__all__ = ["difference", "listing"]

WIDTH = 64  # comments begin here


def listing(stage: Stage, names: Iterable[str] = ()) -> str:
    """The text of one stage.

    Args:
        stage: From :func:`mlc.passes.cost.facts.stages_of`.
        names: Names of its inputs, as far as they have some.
    """
    return "\n".join(_Writer(facts_of(stage)).stage(stage, list(names))) + "\n"


class _Writer:
    def __init__(self, facts: dict[Eqn, Fact]) -> None:
        self.facts = facts
        self.objects = Objects()
        self.names: dict[Var, str] = {}

    def name(self, v: Var) -> str:
        found = self.names.get(v)
        if found is None:
            found = self.names[v] = f"v{len(self.names)}"
        return found

    def text(self, a: object) -> str:
        """An argument, spelt so that it parses: ``f32`` and ``cpu`` are names, generators numbered."""
        found = literal_text(a, self.name, self.objects)
        return found if re.fullmatch(r"[\w.,\s\[\]()'\"+*/-]*", found) else repr(found)

    def stage(self, stage: Stage, names: Sequence[str]) -> Iterator[str]:
        given = list(names) + [""] * (len(stage.region.inputs) - len(names))
        yield f"def {stage.name}("
        for i, (v, n) in enumerate(zip(stage.region.inputs, given, strict=True)):
            self.names[v] = _identifier(n) or f"in{i}"
            if self.names[v] in list(self.names.values())[:-1]:
                self.names[v] += f"_{i}"
            yield _commented(f"    {self.names[v]},", f"{type_text(v.type)} {n}".strip())
        yield "):"
        yield from self.body(stage.region, "    ")
        yield f"    return {self.listed(stage.region.outputs) or None}"

    def listed(self, values: Iterable[Var]) -> str:
        return ", ".join(self.name(v) for v in values)

    def body(self, region: Region, pad: str) -> Iterator[str]:
        for i, e in enumerate(region.eqns):
            if isinstance(e.op, Loop):
                yield from self.loop(e, e.op, i, pad)
            else:
                yield _commented(pad + self.call(e), self.comment(e, i))

    def call(self, e: Eqn) -> str:
        outs = self.listed(e.outs)
        args = [self.text(a) for a in e.args] + [f"{k}={self.text(v)}" for k, v in e.kwargs]
        op = _identifier(op_name(e)) or "op"
        if isinstance(e.op, Grad):
            args.append(f"n_loss={e.op.n_loss}, n_wrt={e.op.n_wrt}")
        elif isinstance(e.op, Custom):
            args.append(f"n_in={e.op.n_in}")
        return f"{outs} = {op}({', '.join(args)})" if outs else f"{op}({', '.join(args)})"

    def loop(self, e: Eqn, op: Loop, i: int, pad: str) -> Iterator[str]:
        what = [repr(op.title or "loop"), f"trips={op.trips}"] + (["reverse=True"] if op.reverse else [])
        yield _commented(f"{pad}with loop({', '.join(what)}) as trip:", self.comment(e, i))
        inner, kinds = pad + "    ", ["carry"] * op.n_carry + ["const"] * op.n_const + ["each"] * op.n_seq
        for kind, v, a in zip(kinds, op.body.inputs, e.args, strict=True):
            if kind == "const" and type(a) is Var:
                self.names[v] = self.name(a)
            else:
                yield f"{inner}{self.name(v)} = trip.{kind}({self.text(a)})"
        yield from self.body(op.body, inner)
        for k, out in enumerate(op.body.outputs):
            kind = "next" if k < op.n_carry else "emit"
            yield f"{inner}trip.{kind}({self.name(out)})"
        if e.outs:
            yield f"{pad}{self.listed(e.outs)} = trip.results"

    def comment(self, e: Eqn, i: int) -> str:
        fact = self.facts[e]
        made = ", ".join(type_text(v.type) for v in e.outs[:2]) + (", ..." if len(e.outs) > 2 else "")
        size = f" {size_text(fact.bytes)}" if fact.bytes else ""
        parts = [f"{made}{size}".strip(), fact.fate.text, *_place(e)]
        return f"{i}: " + "; ".join(p for p in parts if p)


def _place(e: Eqn) -> list[str]:
    if e.loc is None:
        return []
    return [f"line {e.loc.line}" + (f" in {e.loc.module or e.loc.function}" if e.loc.module or e.loc.function else "")]


def _identifier(name: str) -> str:
    found = re.sub(r"\W+", "_", name).strip("_")
    return f"_{found}" if found[:1].isdigit() else found


def _commented(code: str, comment: str) -> str:
    return f"{code:<{WIDTH}}  # {comment}" if comment else code


# ---- between passes


def difference(before: Stage, after: Stage, names: tuple[str, str]) -> str:
    """What a pass changed, as a unified diff of equations without the names of their values."""
    old, new = ([*_bare(s.region)] for s in (before, after))
    return "\n".join(difflib.unified_diff(old, new, names[0], names[1], n=1, lineterm=""))


def _bare(region: Region, pad: str = "") -> Iterator[str]:
    for e in region.eqns:
        types = ", ".join(type_text(v.type) for v in e.outs[:2])
        tag = f" [{e.tag}]" if e.tag and e.origin is not Origin.FORWARD else ""
        yield f"{pad}{op_name(e)} -> {types}{tag} {' '.join(_place(e))}".rstrip()
        if isinstance(e.op, Loop):
            yield from _bare(e.op.body, pad + "    ")
