"""The text form of a program: prints like a program, and :func:`mlc.ir.parse.parse` reads it back.

::

    program "train" returns 1  # loop.py:3 in train
    file "loop.py" = "..."
    {
      meta %0: f32[4] "weight"
      %1: f32[4] = aten.mul.Tensor(%0, 2.0)  # loop.py:5 in train
      %9: f32[4], %10: seq[f32[], 3] = loop[label="train", trips=3] {
        carry %2: f32[4] = %1
        const %3: f32[4] = %0
        %4: f32[] = aten.dot.default(%2, %3)
        %6: f32[4] = grad(%4; %2; %5)
        ...
        return %7 emit %4
      }
      return %9
    }

Values are numbered in the order in which they appear; a number means the same everywhere in the text.
Comments give the place in the user's code and, in brackets, the role of an equation. What belongs to one
process (where inputs are read from, objects such as generators) is not printed; objects are numbered.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from dataclasses import fields
from pathlib import PurePath
from typing import Any

from mlc.ir.core import Custom, EffectCall, Eqn, Feed, Grad, Index, Loop, NestedEffects, Primitive, Region, Var
from mlc.ir.literals import Objects, literal_text, type_text
from mlc.ir.opaque.estimates import Solve
from mlc.ir.problem import Problem
from mlc.ir.types import Loc

__all__ = ["WORDS", "print_program", "print_region", "short_files"]

WORDS: dict[type[Primitive], str] = {Index: "item"}  # where the class says it otherwise


def print_program(p: Problem) -> str:
    """The text of a program."""
    return "\n".join(_Printer(_locs(p)).program(p)) + "\n"


def print_region(r: Region) -> str:
    """The text of one region, for messages and goldens of passes (not parsed back)."""
    w = _Printer(x.loc for x in _all_eqns(r))
    return "\n".join(["{", *w.region(r, ["in"] * len(r.inputs), "  "), "}"]) + "\n"


def short_files(files: Iterable[str]) -> dict[str, str]:
    """The shortest endings of paths that tell them apart, by path."""
    unique = list(dict.fromkeys(files))
    out: dict[str, str] = {}
    for f in unique:
        parts = PurePath(f).parts
        for n in range(1, len(parts) + 1):
            short = "/".join(parts[-n:])
            if sum(g == f or ("/" + g).endswith("/" + short) for g in unique) == 1:
                break
        out[f] = short if parts else f
    return out


def _all_eqns(r: Region) -> Iterator[Eqn]:
    for e in r.eqns:
        yield e
        if isinstance(e.op, Loop):
            yield from _all_eqns(e.op.body)
            if e.op.replay is not None:
                yield from _all_eqns(e.op.replay.body)
        elif isinstance(e.op, Custom):
            yield from _all_eqns(e.op.backward)


def _locs(p: Problem) -> Iterator[Loc | None]:
    yield p.loc
    yield from (x.loc for x in p.levels)
    yield from (x.loc for x in p.flows)
    for e in _all_eqns(p.region):
        yield e.loc


class _Printer:
    def __init__(self, locs: Iterable[Loc | None]) -> None:
        self.files = short_files(x.file for x in locs if x is not None)
        self.objects = Objects()
        self.count = 0
        self.scope: dict[Var, str] = {}

    # ---- small parts

    def define(self, v: Var) -> str:
        """Name a value; ``%3: f32[4]``."""
        self.scope[v] = f"%{self.count}"
        self.count += 1
        return f"{self.scope[v]}: {type_text(v.type)}"

    def name(self, v: Var) -> str:
        return self.scope.get(v, "%undefined")

    def literal(self, a: Any) -> str:
        return literal_text(a, self.name, self.objects)

    def attrs(self, **values: Any) -> str:
        """``[a=1, b=2]`` without those that are None."""
        inside = ", ".join(f"{k}={self.literal(v)}" for k, v in values.items() if v is not None)
        return f"[{inside}]" if inside else ""

    def comment(self, loc: Loc | None, tag: str = "") -> str:
        parts = []
        if loc is not None:
            where = f"{self.files[loc.file]}:{loc.line}"
            parts.append(f"{where} in {loc.function}" if loc.function else where)
        if tag not in ("", "forward"):
            parts.append(f"[{tag}]")
        return "  # " + " ".join(parts) if parts else ""

    def listed(self, values: Iterable[Any]) -> str:
        return ", ".join(self.literal(a) for a in values)

    def call_args(self, args: Iterable[Any], kwargs: Iterable[tuple[str, Any]]) -> str:
        return "(" + ", ".join([self.literal(a) for a in args] + [f"{k}={self.literal(v)}" for k, v in kwargs]) + ")"

    # ---- programs

    def program(self, p: Problem) -> Iterator[str]:
        yield f"program {json.dumps(p.name)} returns {p.n_outputs}{self.comment(p.loc)}"
        for path, short in self.files.items():
            yield f"file {json.dumps(short)} = {json.dumps(path)}"
        for note in p.notes:
            yield f"note {json.dumps(note)}"
        for x in p.levels:
            what = self.attrs(
                depth=x.depth, optimizer=x.optimizer, trips=x.trips, trains=x.trains, reads=x.reads,
                state=x.state, at=x.at, declared=x.declared or None, response=x.response or None,
            )  # fmt: skip
            yield f"level {json.dumps(x.name)} {what}{self.comment(x.loc)}"
        for f in p.flows:
            what = self.attrs(carries=None if f.carries else False, why=f.why or None)
            ends = f"{json.dumps(f.source)} -> {json.dumps(f.target)}"
            yield f"flow {f.kind} {ends}{' ' if what else ''}{what}{self.comment(f.loc)}"
        yield "{"
        region = Region(p.region.inputs, p.region.eqns, p.region.outputs, tuple(x.name for x in p.inputs))
        yield from self.region(region, [x.role for x in p.inputs], "  ")
        yield "}"

    def region(self, r: Region, words: list[str], pad: str) -> Iterator[str]:
        """Lines of a region between its braces, in a scope of its own."""
        outer, self.scope = self.scope, {}
        names = r.names or ("",) * len(r.inputs)
        for word, v, n in zip(words, r.inputs, names, strict=True):
            yield f"{pad}{word} {self.define(v)}" + (f" {json.dumps(n)}" if n else "")
        yield from self.body(r, len(r.outputs), pad)
        self.scope = outer

    def body(self, r: Region, n_return: int, pad: str) -> Iterator[str]:
        for e in r.eqns:
            yield from self.eqn(e, pad)
        kept, emitted = r.outputs[:n_return], r.outputs[n_return:]
        line = f"{pad}return {self.listed(kept)}".rstrip()
        yield f"{line} emit {self.listed(emitted)}" if emitted else line

    # ---- equations

    def eqn(self, e: Eqn, pad: str) -> Iterator[str]:
        lines = list(self.work(e, pad))  # before the results are named: numbers grow down the page inside bodies
        outs = ", ".join(self.define(v) for v in e.outs)
        lines[0] = f"{pad}{outs} = {lines[0]}" if outs else pad + lines[0]
        lines[-1] += self.comment(e.loc, e.tag)
        yield from lines

    def work(self, e: Eqn, pad: str) -> Iterator[str]:
        op = e.op
        if isinstance(op, Loop):
            yield from self.loop(op, e, pad)
        elif isinstance(op, Feed):
            yield f"feed{self.attrs(trips=op.trips)} {{"
            yield from self.effects(op.effects, pad + "  ")
            yield pad + "}"
        elif isinstance(op, Custom):
            n = op.n_in + op.n_out
            groups = (e.args[: op.n_in], e.args[op.n_in : n], e.args[n:])
            what = self.attrs(title=op.title, present=op.present)
            yield f"custom{what}({'; '.join(map(self.listed, groups))}) {{"
            yield from self.region(op.backward, ["in"] * len(op.backward.inputs), pad + "  ")
            yield pad + "}"
        elif isinstance(op, Grad):
            n = op.n_loss + op.n_wrt
            groups = (e.args[: op.n_loss], e.args[op.n_loss : n], e.args[n:])
            attrs = self.attrs(depth=op.depth or None, level=op.level or None)
            yield f"grad{attrs}({'; '.join(map(self.listed, groups))})"
        else:
            yield self.head(op) + self.call_args(e.args, e.kwargs)

    def head(self, op: Any) -> str:
        """Name of an operator and, for those of ours, what tells it from its default."""
        if not isinstance(op, Primitive):
            return str(op)
        given = {f.name: getattr(op, f.name) for f in fields(op) if f.compare and getattr(op, f.name) != f.default}
        return WORDS.get(type(op), op.name) + self.attrs(**given)

    def loop(self, op: Loop, e: Eqn, pad: str) -> Iterator[str]:
        what = self.attrs(
            label=op.label or None,
            derived=tuple(map(str, op.derived)) or None,
            trips=op.trips,
            reverse=op.reverse or None,
            host=op.host or None,
        )
        yield f"{op.name if isinstance(op, Solve) else 'loop'}{what} {{"
        inner = pad + "  "
        words = ["carry"] * op.n_carry + ["const"] * op.n_const + ["each"] * op.n_seq
        given = [self.literal(a) for a in e.args]
        outer, self.scope = self.scope, {}
        names = op.body.names or ("",) * len(words)
        for word, v, n, a in zip(words, op.body.inputs, names, given, strict=True):
            yield f"{inner}{word} {self.define(v)}" + (f" {json.dumps(n)}" if n else "") + f" = {a}"
        yield from self.body(op.body, op.n_carry, inner)
        self.scope = outer
        if op.replay is not None:
            r = op.replay
            what = self.attrs(carries=r.carries, consts=r.consts, seqs=r.seqs, dense=r.dense, slots=r.slots)
            yield f"{inner}replay{what} {{"
            yield from self.region(r.body, ["in"] * len(r.body.inputs), inner + "  ")
            yield inner + "}"
        yield pad + "}"

    def effects(self, effects: Iterable[Any], pad: str) -> Iterator[str]:
        for x in effects:
            if isinstance(x, NestedEffects):
                yield f"{pad}nested{self.attrs(trips=x.trips)} {{"
                yield from self.effects(x.effects, pad + "  ")
                yield pad + "}"
            else:
                assert isinstance(x, EffectCall)
                types = ", ".join(type_text(t) for t in x.types)
                yield f"{pad}{self.head(x.op)}{self.call_args(x.args, x.kwargs)} -> ({types})"
