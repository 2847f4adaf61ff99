"""Reading the text form back: ``parse(str(p))`` is a program equal to ``p``.

The grammar is ``grammar.lark`` (LALR, linear time). A second walk over the tree gives numbers their values,
region by region, so that a body sees only its own. What text does not hold is missing afterwards: a parsed
program can be printed, hashed, verified and planned, but not called.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Sequence
from functools import cache
from importlib.resources import files
from typing import Any, NoReturn, TypeVar

import torch
from lark import Lark, Token, Tree
from lark.exceptions import UnexpectedCharacters, UnexpectedInput, UnexpectedToken
from torch._ops import OpOverload

from mlc.errors import VerifyError
from mlc.ir.builder import contiguous
from mlc.ir.call import Call
from mlc.ir.core import (
    Custom,
    Draw,
    EffectCall,
    Eqn,
    Feed,
    Grad,
    Loop,
    NestedEffects,
    Primitive,
    Random,
    Region,
    Replay,
    Seed,
    Var,
)
from mlc.ir.literals import DTYPES, FORMATS, Opaque
from mlc.ir.program import Flow, Input, Level, Program
from mlc.ir.text import WORDS
from mlc.ir.types import Loc, SeqType, TensorType, Type
from mlc.ir.verify import verify_program

__all__ = ["parse"]

T = TypeVar("T")
_PLAIN: dict[str, type[Primitive]] = {
    WORDS.get(c, c.__name__.lower()): c for c in Primitive.__subclasses__() if c not in (Custom, Feed, Grad, Loop)
} | {"call": Call}
_EFFECTS = {"random": Random, "draw": Draw, "seed": Seed}
_WORDS: dict[str, Any] = {
    **DTYPES,
    "True": True,
    "False": False,
    "None": None,
    "inf": math.inf,
    "nan": math.nan,
}
_COMMENT = re.compile(
    r"#(?: (?P<file>\S.*?):(?P<line>\d+)(?: in (?P<function>[^\[]+?))?)?(?: \[(?P<tag>[^\]]*)\])?\s*$"
)


@cache
def _lark() -> Lark:
    grammar = files("mlc.ir").joinpath("grammar.lark").read_text()
    return Lark(grammar, start="program", parser="lalr", propagate_positions=True, maybe_placeholders=True)


def parse(text: str) -> Program:
    """The program that a text describes, verified.

    Raises:
        VerifyError: where the text is no program, with line and column.
    """
    try:
        tree = _lark().parse(text)
    except UnexpectedToken as e:
        what = "the end of the text" if e.token.type == "$END" else repr(str(e.token))
        raise _wrong(e, f"{what} is not expected here") from None
    except UnexpectedCharacters as e:
        raise _wrong(e, f"{e.char!r} is not expected here") from None
    return verify_program(_Reader().program(tree))


def _wrong(at: Any, what: str) -> VerifyError:
    if isinstance(at, Tree):
        at = at.meta
    line, column = getattr(at, "line", None), getattr(at, "column", None)
    if isinstance(at, UnexpectedInput) and (line is None or line < 1):
        return VerifyError(f"program text ends too early: {what}")
    return VerifyError(f"program text, line {line}, column {column}: {what}")


class _Reader:
    """Walks the tree; ``values`` are those of the region being read."""

    def __init__(self) -> None:
        self.files: dict[str, str] = {}
        self.values: dict[str, Var] = {}

    # ---- programs

    def program(self, tree: Any) -> Program:
        name, count, comment, *parts = tree.children
        of = {k: [x for x in parts if x.data == k] for k in ("file", "note", "level", "flow", "input")}
        self.files = {_string(x.children[0]): _string(x.children[1]) for x in of["file"]}
        inputs = tuple(
            Input(_string(n) if n is not None else "", str(word), self.type(t))
            for word, _, t, n in (x.children for x in of["input"])
        )
        region = self.region([*of["input"], parts[-1]])
        return Program(
            _string(name), region, inputs, int(count), tuple(map(self.level, of["level"])),
            tuple(map(self.flow, of["flow"])), tuple(_string(x.children[0]) for x in of["note"]),
            self.comment(comment)[0],
        )  # fmt: skip

    def level(self, tree: Any) -> Level:
        name, attrs, comment = tree.children
        return self.make(tree, Level, name=_string(name), trips=None, loc=self.comment(comment)[0], given=attrs)

    def flow(self, tree: Any) -> Flow:
        kind, source, target, attrs, comment = tree.children
        ends = {"kind": str(kind), "source": _string(source), "target": _string(target)}
        return self.make(tree, Flow, **ends, loc=self.comment(comment)[0], given=attrs)

    def make(self, tree: Any, cls: Callable[..., T], *, given: Any = None, **known: Any) -> T:
        """An object from attributes; those in ``known`` are defaults."""
        try:
            return cls(**{**known, **self.attrs(given)})
        except TypeError:
            raise _wrong(tree, f"missing or unknown attributes of {getattr(cls, '__name__', 'this').lower()}") from None

    def comment(self, token: Token | None) -> tuple[Loc | None, str]:
        m = None if token is None else _COMMENT.match(str(token))
        if m is None:
            return None, ""
        if m["file"] is None:
            return None, m["tag"] or ""
        file = self.files.get(m["file"], m["file"])
        return Loc(file, int(m["line"]), m["function"] or ""), m["tag"] or ""

    # ---- regions

    def region(self, parts: Sequence[Any]) -> Region:
        """Inputs and body of a region, in a scope of its own."""
        outer, self.values = self.values, {}
        ins = [self.define(x.children[1], x.children[2]) for x in parts[:-1]]
        names = tuple("" if x.children[3] is None else _string(x.children[3]) for x in parts[:-1])
        eqns, kept, emitted = self.body(parts[-1])
        self.values = outer
        return Region(tuple(ins), eqns, (*kept, *emitted), names if any(names) else ())

    def body(self, tree: Any) -> tuple[tuple[Eqn, ...], tuple[Var, ...], tuple[Var, ...]]:
        *eqns, results = tree.children
        found = tuple([self.eqn(x) for x in eqns])
        kept, emitted = (tuple(self.look(v) for v in (x.children if x else ())) for x in results.children)
        return found, kept, emitted

    def define(self, token: Token, t: Any) -> Var:
        if token in self.values:
            raise _wrong(token, f"{token} is defined again")
        v = self.values[str(token)] = Var(self.type(t))
        return v

    def look(self, token: Token) -> Var:
        v = self.values.get(str(token))
        if v is None:
            raise _wrong(token, f"{token} is not defined yet")
        return v

    # ---- equations

    def eqn(self, tree: Any) -> Eqn:
        outs, work, comment = tree.children
        loc, tag = self.comment(comment)
        op, args, kwargs = getattr(self, "_" + work.data)(work)
        pairs = outs.children if outs is not None else []
        made = tuple(self.define(v, t) for v, t in zip(pairs[::2], pairs[1::2], strict=True))
        return Eqn(op, args, made, kwargs, loc, tag)

    def _call(self, tree: Any) -> tuple[Any, tuple[Any, ...], tuple[tuple[str, Any], ...]]:
        head, attrs, args = tree.children
        groups, kwargs = self.args(args)
        if head.type == "OPERATOR":
            return _operator(head), self.one(groups), kwargs
        word = str(head)
        if word == "grad":
            if len(groups) != 3:
                raise _wrong(tree, "grad takes (losses; values; seeds)")
            op = self.make(tree, Grad, given=attrs, n_loss=len(groups[0]), n_wrt=len(groups[1]))
            return op, sum(groups, ()), kwargs
        if word not in _PLAIN:
            _unknown(head)
        return self.make(tree, _PLAIN[word], given=attrs), self.one(groups), kwargs

    def effect_op(self, head: Token, attrs: Any) -> Any:
        if str(head) not in _EFFECTS:
            raise _wrong(head, f"{head} is no effect")
        return self.make(head, _EFFECTS[str(head)], given=attrs)

    def one(self, groups: list[tuple[Any, ...]]) -> tuple[Any, ...]:
        return sum(groups, ())

    def _loop(self, tree: Any) -> tuple[Loop, tuple[Any, ...], tuple[Any, ...]]:
        attrs, *bound, body, replay = tree.children
        given = self.attrs(attrs)
        words = [str(x.children[0]) for x in bound]
        order = ["carry", "const", "each"]
        if any(w not in order for w in words) or sorted(words, key=order.index) != words:
            raise _wrong(tree, "a loop takes carry, then const, then each")
        args = tuple(self.look(x.children[4]) for x in bound)
        region = self.region([*bound, body])
        carried = len(body.children[-1].children[0].children) if body.children[-1].children[0] else 0
        if carried != words.count("carry"):
            raise _wrong(body.children[-1], f"{carried} values returned for {words.count('carry')} carries")
        known = dict(
            body=region, n_carry=carried, n_const=words.count("const"), trips=given.pop("trips", None),
            replay=self.replay(replay),
        )  # fmt: skip
        return self.make(tree, Loop, **known, **given), args, ()

    def replay(self, tree: Any) -> Replay | None:
        if tree is None:
            return None
        given = self.attrs(tree.children[0])
        body = self.region(tree.children[1].children)
        return self.make(tree, Replay, body=body, **given)

    def _custom(self, tree: Any) -> tuple[Custom, tuple[Any, ...], tuple[Any, ...]]:
        attrs, args, region = tree.children
        groups, kwargs = self.args(args)
        if len(groups) != 3:
            raise _wrong(tree, "custom takes (inputs; results; other values)")
        backward = self.region(region.children)
        n_in, n_out = len(groups[0]), len(groups[1])
        op = self.make(tree, Custom, backward=backward, n_in=n_in, n_out=n_out, given=attrs)
        return op, sum(groups, ()), kwargs

    def _feed(self, tree: Any) -> tuple[Feed, tuple[Any, ...], tuple[Any, ...]]:
        attrs, *effects = tree.children
        return Feed(tuple(map(self.effect, effects)), self.attrs(attrs).get("trips")), (), ()

    def effect(self, tree: Any) -> Any:
        if tree.data == "nested":
            attrs, *effects = tree.children
            return NestedEffects(tuple(map(self.effect, effects)), self.attrs(attrs).get("trips"))
        head, attrs, args, *types = tree.children
        groups, kwargs = self.args(args)
        found = tuple(self.type(t) for t in types if t is not None)
        return EffectCall(self.effect_op(head, attrs), self.one(groups), kwargs, found)

    # ---- arguments, types, literals

    def attrs(self, tree: Any) -> dict[str, Any]:
        pairs = () if tree is None else tree.children
        return {str(x.children[0])[:-1]: self.value(x.children[1]) for x in pairs}

    def args(self, tree: Any) -> tuple[list[tuple[Any, ...]], tuple[tuple[str, Any], ...]]:
        groups: list[tuple[Any, ...]] = []
        kwargs: list[tuple[str, Any]] = []
        for group in tree.children:
            items = [] if group is None else group.children
            groups.append(tuple([self.value(x) for x in items if x.data != "pair"]))
            kwargs += [(str(x.children[0])[:-1], self.value(x.children[1])) for x in items if x.data == "pair"]
        return groups, tuple(kwargs)

    def type(self, tree: Any) -> Type:
        if tree.data == "seq":
            elem, *length = tree.children
            return SeqType(self.type(elem), int(length[0]) if length else None)
        word, shape, stride, device = tree.children
        if str(word) not in DTYPES:
            raise _wrong(word, f"{word} is no dtype")
        dims = _ints(shape)
        steps = contiguous(dims) if stride is None else _ints(stride.children[0])
        if len(steps) != len(dims):
            raise _wrong(tree, f"{len(steps)} strides for {len(dims)} dimensions")
        return TensorType(DTYPES[str(word)], dims, steps, _device(device) if device else torch.device("cpu"))

    def value(self, tree: Any) -> Any:
        kind = tree.data
        if kind in ("list", "tuple", "dict"):
            items = [x for x in tree.children if x is not None]
            if kind == "dict":
                return {_string(x.children[0]): self.value(x.children[1]) for x in items}
            found = [self.value(x) for x in items]
            return found if kind == "list" else tuple(found)
        if kind == "complex":
            return complex(*[self.value(x) for x in tree.children])
        if kind == "object":
            return Opaque(_string(tree.children[0]), int(tree.children[1]))
        return self.leaf(kind, tree.children[0])

    def leaf(self, kind: str, token: Token) -> Any:
        if kind == "var":
            return self.look(token)
        if kind in ("int", "float"):
            return int(token) if kind == "int" else float(token)
        if kind == "string":
            return _string(token)
        if kind == "device":
            return _device(token)
        if kind == "operator":
            return _operator(token)
        table, key = (FORMATS, token[6:]) if kind == "format" else (_WORDS, str(token))
        if key not in table:
            raise _wrong(token, f"unknown word {token}")
        return table[key]


def _string(token: Token) -> str:
    try:
        return str(json.loads(str(token), strict=False))
    except ValueError:
        raise _wrong(token, "malformed string") from None


def _ints(tree: Any) -> tuple[int, ...]:
    return () if tree is None else tuple(int(x) for x in tree.children)


def _device(token: Token) -> torch.device:
    try:
        return torch.device(str(token)[1:])
    except RuntimeError:
        raise _wrong(token, f"unknown device {token}") from None


@cache
def _found(name: str) -> OpOverload | None:
    at: Any = torch.ops
    try:
        for part in name.split("."):
            at = getattr(at, part)
    except (AttributeError, RuntimeError):
        return None
    return at if isinstance(at, OpOverload) else None


def _operator(token: Token) -> OpOverload:
    op = _found(str(token))
    if op is None:
        _unknown(token)
    return op


def _unknown(token: Token) -> NoReturn:
    raise _wrong(token, f"unknown operator {token}")
