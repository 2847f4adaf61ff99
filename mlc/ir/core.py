"""The core of the IR: values, equations, regions, and the primitives that are not ATen operators.

Grammar (what :mod:`mlc.ir.text` prints)::

    region   := "(" inputs ")" "{" equation* "return" outputs "}"
    equation := outs "=" op "(" args ")" ["@" place]
    op       := an ATen overload | grad | loop | stop | pack | item | feed | random | draw | ...

A region is a pure function in static single assignment form: every :class:`Var` is defined once, by a region
input or by one :class:`Eqn`.  Nothing is mutated and nothing aliases.  ``grad`` and ``loop`` are first-class:
they are lowered by passes, never at capture, which is what lets a pass choose how to differentiate them.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import Any, TypeAlias

import torch
from torch._ops import OpOverload

from mlc.ir.origin import Origin
from mlc.ir.types import Loc, SeqType, Type

__all__ = [
    "Alias", "Arg", "Custom", "Draw", "EffectCall", "Eqn", "Feed", "Grad", "Index", "Loop", "NestedEffects", "Op",
    "Pack", "Primitive", "Random", "Region", "SafeSqrt", "Seed", "Stop", "Var", "flat_vars", "map_vars",
]  # fmt: skip


class Var:
    """One SSA value.  Identity is its equality; names are given when printing."""

    __slots__ = ("mask", "type")

    def __init__(self, type: Type, mask: int = 0) -> None:
        self.type = type
        self.mask = mask  # capture only: which differentiable leaves this value depends on, one bit each

    def __repr__(self) -> str:
        return f"%{id(self) & 0xFFFFF:x}"


Arg: TypeAlias = Any  # Var | literal | tuple/list/dict of Arg


@dataclass(frozen=True)
class Primitive:
    """Base class of operators that are mlc's own."""

    @property
    def name(self) -> str:
        """Name in the text form."""
        return type(self).__name__.lower()

    @property
    def impure(self) -> bool:
        """Whether running it changes the world (random state, an iterator): never merged, moved or dropped."""
        return False


@dataclass(frozen=True)
class Stop(Primitive):
    """``stop(x)``: the value of x, with no derivative (a ``detach`` or ``no_grad`` of the user).

    With a ``level`` only gradients taken at that loop depth or deeper stop here: for them x (an inner gradient taken
    without ``create_graph``, or a parameter after a step) is a constant, as in PyTorch; gradients taken outside of
    that loop, and the hypergradient, pass.  With level -1 all stop, whatever ``stop_gradient`` says: a response that
    leaves a path out (:mod:`mlc.passes.responses`).
    """

    level: int | None = None

    @property
    def inner(self) -> bool:
        """Whether the hypergradient passes."""
        return self.level is not None and not self.always

    @property
    def always(self) -> bool:
        """Whether nothing passes."""
        return self.level == -1


@dataclass(frozen=True)
class Alias(Primitive):
    """``alias(x)``: the value of x as a value of its own (the target of a gradient)."""


@dataclass(frozen=True)
class SafeSqrt(Primitive):
    """Square root inside an optimizer step: its derivative at exactly 0 is taken as 0 (PyTorch's is infinite)."""


@dataclass(frozen=True)
class Custom(Primitive):
    """A ``torch.autograd.Function``: the identity on its forward results, with the user's backward as its rule.

    Arguments: ``n_in`` inputs, ``n_out`` results of the recorded forward, then values that the backward reads.
    ``backward`` maps ``(inputs, results, other values, cotangents)`` to the cotangents that are ``present``.
    Its derivative is PyTorch's double backward, which need not be symmetric: only reverse mode may use it.
    """

    title: str
    backward: Region
    n_in: int
    n_out: int
    present: tuple[bool, ...]


@dataclass(frozen=True)
class Grad(Primitive):
    """``grad(loss, wrt..., seeds...)``: vector-Jacobian product of ``losses`` with respect to ``wrt``.

    Arguments: ``n_loss`` loss values, then ``n_wrt`` values, then ``n_loss`` seeds of the losses' types.
    One result per ``wrt``, of its shape.  Differentiation runs over the equations of the same region.
    """

    n_loss: int
    n_wrt: int
    depth: int = 0  # how many declared levels it is taken in
    level: str = ""  # name of the innermost of them


@dataclass(frozen=True)
class Loop(Primitive):
    """``loop(carries..., consts..., seqs...)``: the body once per trip, carries handed from trip to trip.

    The body takes carries, consts and one element of each sequence; it returns the next carries and one
    element for each sequence that the loop emits.  With ``reverse`` the trips run from last to first and index
    their sequences so.  ``replay`` tells how emitted carries are stored, ``host`` which emissions rest in the memory
    of the host until they are read; both change no value.  A loop that differentiates one of the program's has its
    ``label``, and ``derived`` says by which rules, the last first: with that of a loop and what it reads of it, its
    adjoint is paired.
    """

    body: Region
    n_carry: int
    n_const: int
    trips: int | None
    reverse: bool = False
    label: str = ""
    replay: Replay | None = None
    host: tuple[int, ...] = ()
    usual: int | None = field(default=None, compare=False)
    derived: tuple[str, ...] = ()  # of Origin.ADJOINT and Origin.TANGENT

    @property
    def title(self) -> str:
        """What people read: ``"adjoint train"``."""
        return " ".join(x for x in (*self.derived, self.label) if x)

    @property
    def count(self) -> int:
        """Number of trips to plan for, at least 1: that of the traced call where it is open."""
        return self.trips or self.usual or 1

    def sequence(self, elem: Type) -> SeqType:
        """Type of a sequence with one ``elem`` per trip."""
        return SeqType(elem, self.trips, self.usual)

    @property
    def n_seq(self) -> int:
        """Number of sequences consumed."""
        return len(self.body.inputs) - self.n_carry - self.n_const

    @property
    def n_emit(self) -> int:
        """Number of sequences emitted."""
        return len(self.body.outputs) - self.n_carry


@dataclass(frozen=True)
class Replay:
    """How a loop's emitted carries are stored: a few sets of them, the others rebuilt when they are read.

    Attributes:
        body: Maps (carries, consts, elements of the loop's sequences, elements of its other emissions) to the
            next carries.
        carries: Which carries of the loop are rebuilt; an emission that is the value of one of them at the start
            of a trip is kept sparsely.
        consts: Which of the loop's consts the body reads.
        seqs: Which of the loop's sequences the body reads.
        dense: Which emissions of the loop the body reads (they are kept at every trip).
        slots: How many sets of carries are kept at most, the first one included.
    """

    body: Region
    carries: tuple[int, ...]
    consts: tuple[int, ...]
    seqs: tuple[int, ...]
    dense: tuple[int, ...]
    slots: int


@dataclass(frozen=True)
class Pack(Primitive):
    """``pack(x0, x1, ...)``: values of one type as a sequence."""


@dataclass(frozen=True)
class Index(Primitive):
    """``item(seq)``: element ``at`` of a sequence (negative counts from the end)."""

    at: int


@dataclass(frozen=True)
class Random(Primitive):
    """A random operator as PyTorch ran it; impure.  ``fill`` ops write into a fresh tensor of the given layout."""

    op: OpOverload
    fill: bool = False

    @property
    def impure(self) -> bool:
        """Advances a generator."""
        return True


@dataclass(frozen=True)
class Draw(Primitive):
    """``draw()``: the next item of iterable ``source`` (iteration number ``visit``); one result per tensor in it.

    In loops the iteration advances by ``steps[d]`` with every trip of the loop at depth d, outermost first.
    """

    source: int
    visit: int
    steps: tuple[int, ...] = ()

    def at(self, trips: tuple[int, ...]) -> int:
        """The number of the iteration over the source, in these trips of the loops around."""
        return self.visit + sum(s * t for s, t in zip(self.steps, trips, strict=False))

    @property
    def impure(self) -> bool:
        """Advances an iterator."""
        return True


@dataclass(frozen=True)
class Seed(Primitive):
    """``torch.manual_seed(value)`` in the loop; impure."""

    value: int

    @property
    def impure(self) -> bool:
        """Sets the generators."""
        return True


@dataclass(frozen=True)
class NestedEffects:
    """Effects of an inner loop, per trip of the outer one."""

    effects: tuple[Effect, ...]
    trips: int | None


@dataclass(frozen=True)
class EffectCall:
    """One random or draw equation of a loop body, taken out of it."""

    op: Random | Draw | Seed
    args: tuple[Arg, ...]
    kwargs: tuple[tuple[str, Arg], ...]
    types: tuple[Type, ...]


Effect: TypeAlias = "EffectCall | NestedEffects"


@dataclass(frozen=True)
class Feed(Primitive):
    """``feed()``: lazy sequences of what a loop draws (batches, random numbers), replayable for the reverse sweep."""

    effects: tuple[Effect, ...]
    trips: int | None

    @property
    def impure(self) -> bool:
        """Advances generators and iterators, trip by trip."""
        return True


Op: TypeAlias = OpOverload | Primitive


@dataclass(frozen=True, slots=True, eq=False)
class Eqn:
    """``outs = op(*args, **kwargs)`` with the place in the user's code and the role it plays there.

    Attributes:
        site: For captured equations, the loop iterations it ran in (see :mod:`mlc.trace.python.frames`).
        tag: Its :class:`~mlc.ir.origin.Origin`, with the number of a segment behind it where it is computed again.
    """

    op: Op
    args: tuple[Arg, ...]
    outs: tuple[Var, ...]
    kwargs: tuple[tuple[str, Arg], ...] = ()
    loc: Loc | None = None
    tag: str = ""
    site: Any = None
    _inputs: tuple[Var, ...] | None = field(default=None, init=False, repr=False)
    _shared: tuple[Var | None, ...] | None = field(default=None, init=False, repr=False)  # mlc.ir.lowered.reuse's

    @property
    def inputs(self) -> tuple[Var, ...]:
        """The values it reads, in order, with repetitions."""
        if self._inputs is None:
            object.__setattr__(self, "_inputs", tuple(flat_vars(self.args, self.kwargs)))
        return self._inputs  # type: ignore[return-value]

    @property
    def origin(self) -> Origin:
        """Why it is there."""
        return Origin.of(self.tag)

    @property
    def impure(self) -> bool:
        """Whether it must run exactly once, in order."""
        return isinstance(self.op, Primitive) and self.op.impure

    def with_(self, **changes: Any) -> Eqn:
        """A copy with some fields replaced."""
        return replace(self, **changes)


@dataclass(frozen=True, eq=False)
class Region:
    """A pure function: inputs, equations in order, outputs.  ``names`` label inputs for readers."""

    inputs: tuple[Var, ...]
    eqns: tuple[Eqn, ...]
    outputs: tuple[Var, ...]
    names: tuple[str, ...] = field(default=())

    def __len__(self) -> int:
        return len(self.eqns)

    def walk(self) -> Iterator[Eqn]:
        """Every equation, those of nested loop bodies included."""
        for e in self.eqns:
            yield e
            if isinstance(e.op, Loop):
                yield from e.op.body.walk()

    def __repr__(self) -> str:
        return f"<Region {len(self.inputs)} -> {len(self.outputs)}, {len(self.eqns)} equations>"


def _collect(a: Arg, into: list[Var]) -> None:
    if type(a) is Var:
        into.append(a)
    elif type(a) in (tuple, list):
        for x in a:
            _collect(x, into)
    elif type(a) is dict:
        for x in a.values():
            _collect(x, into)


def flat_vars(args: Arg, kwargs: tuple[tuple[str, Arg], ...] = ()) -> list[Var]:
    """Vars in an argument structure, in order."""
    out: list[Var] = []
    _collect(args, out)
    for _, v in kwargs:
        _collect(v, out)
    return out


def map_vars(a: Arg, f: Any) -> Arg:
    """The same structure with ``f(var)`` for each Var."""
    t = type(a)
    if t is Var:
        return f(a)
    if t is tuple:
        return tuple([map_vars(x, f) for x in a])
    if t is list:
        return [map_vars(x, f) for x in a]
    if t is dict:
        return {k: map_vars(v, f) for k, v in a.items()}
    return a


def elem_type(t: Type) -> Type:
    """Element type of a sequence type."""
    assert isinstance(t, SeqType)
    return t.elem


def aten(name: str, overload: str = "default") -> OpOverload:
    """``torch.ops.aten.<name>.<overload>``."""
    op = getattr(getattr(torch.ops.aten, name), overload)
    assert isinstance(op, OpOverload)
    return op
