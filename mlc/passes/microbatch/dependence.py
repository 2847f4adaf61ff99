"""How a value depends on a batch of n examples, and what a rule may ask about one equation.

- ``Shard(dim, outer)``: dimension ``dim`` holds ``outer * n * m`` entries, entry ``(o * n + i) * m + j`` belongs to
  example i alone.  Flattened tokens (B*S, D) are ``Shard(0)`` with m = S; sequences first (S*B, D) ``Shard(0, S)``.
- ``SUM``: a sum over the examples of something linear, such as the gradient of a weight.
- ``SAME``: independent of the examples, or computed once for all of them before they are split.
- ``MIXED``: anything else; examples have met.

A local rule (:mod:`mlc.passes.microbatch.rules`) looks at one equation through a :class:`Site` and returns a
:class:`Local`: the kinds of its results and what must be rewritten when it sees fewer examples.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from enum import Enum
from typing import Any, TypeAlias

from torch._ops import OpOverload

from mlc.ir.core import Arg, Eqn, Op, Var, flat_vars
from mlc.ir.types import TensorType

__all__ = ["MIXED", "PARTS", "SAME", "SUM", "Dependence", "Kind", "Local", "Shard", "Site", "Size", "shape_of"]


class Kind(Enum):
    """Dependence on the examples that has no dimension."""

    SAME = "same"
    SUM = "sum"
    MIXED = "mixed"


SAME, SUM, MIXED = Kind.SAME, Kind.SUM, Kind.MIXED
PARTS = "parts"  # Local.divide: the number of micro-batches (the mean of all is the mean of means of equal parts)


@dataclass(frozen=True, slots=True)
class Shard:
    """One example after another along ``dim``, ``outer`` times."""

    dim: int
    outer: int = 1


Dependence: TypeAlias = "Shard | Kind"


@dataclass(frozen=True, slots=True)
class Size:
    """A size (or offset) of the whole batch in a literal: divided by the number of micro-batches."""

    whole: int


@dataclass(frozen=True)
class Local:
    """What one equation does to examples, and how it is written for a part of them.

    Attributes:
        outs: Dependence of each result; results that are ``SAME`` are defined by ``early``.
        op: Another operator to run instead, with the same argument names.
        set: Arguments by name that change; sizes of the batch are marked by :class:`Size`, an equation in the
            place of a value is one on the part.
        divide: What the first result is divided by: a value, or ``PARTS``.
        early: Equations on whole values, run before the batch is split.
    """

    outs: tuple[Dependence, ...]
    op: Op | None = None
    set: dict[str, Arg] = field(default_factory=dict)
    divide: Any = None
    early: tuple[Eqn, ...] = ()


def shape_of(v: Var) -> tuple[int, ...]:
    """Shape of a tensor value; sequences count as scalars (no rule takes them apart)."""
    return v.type.shape if isinstance(v.type, TensorType) else ()


class Site:
    """One equation as its rule sees it."""

    def __init__(self, e: Eqn, n: int, kind: Callable[[Var], Dependence], whole: Callable[[Var], bool],
                 producer: Callable[[Var], Eqn | None]) -> None:  # fmt: skip
        self.e = e
        self.n = n
        self.kind = kind
        self.whole = whole  # asks for a value of the whole batch, computed early; False when that costs too much
        self.producer = producer
        self.slices: dict[Var, Shard] = {}
        self.fixed: set[Var] = set()
        self._bound: dict[str, Any] | None = None

    def get(self, name: str, default: Any = None) -> Any:
        """An argument by its name in the operator's schema; its default when it is not given."""
        if self._bound is None:
            assert isinstance(self.e.op, OpOverload)
            schema = self.e.op._schema.arguments
            self._bound = {a.name: a.default_value for a in schema if a.has_default_value()}
            self._bound.update(zip([a.name for a in schema], self.e.args, strict=False))
            self._bound.update(self.e.kwargs)
        return self._bound.get(name, default)

    def vars(self, *names: str) -> list[Var]:
        """The values among some arguments, in order."""
        return flat_vars(tuple(self.get(x) for x in names))

    def take(self, v: Var, as_: Shard) -> bool:
        """Whether ``v`` can be read as ``as_``; a value that is the same for all is sliced to be so."""
        found = self.kind(v)
        if isinstance(found, Shard):
            return found == as_
        shape = shape_of(v)
        if found is not SAME or v in self.fixed or not 0 <= as_.dim < len(shape):
            return False
        if shape[as_.dim] == 0 or shape[as_.dim] % (as_.outer * self.n):
            return False
        return self.slices.setdefault(v, as_) == as_

    def fix(self, *values: Var) -> bool:
        """Whether all of these are the same for every example (and read so)."""
        self.fixed.update(values)
        return all(self.kind(v) is SAME and v not in self.slices for v in values)

    def shard(self, values: Sequence[Var]) -> Shard | None:
        """The first dependence on single examples among values."""
        return next((c for c in map(self.kind, values) if isinstance(c, Shard)), None)

    def sizes(self, shape: Sequence[int], c: Shard) -> list[Any]:
        """A literal shape with its batch dimension marked."""
        return [Size(x) if i == c.dim else x for i, x in enumerate(shape)]

    def block(self, v: Var, c: Shard) -> int:
        """Entries of one batch along the sharded dimension (n * m)."""
        return shape_of(v)[c.dim] // c.outer

    def out(self, i: int = 0) -> tuple[int, ...]:
        """Shape of a result."""
        return shape_of(self.e.outs[i])

    def all(self, c: Dependence, **changes: Any) -> Local:
        """Every result depends on examples in the same way."""
        return Local((c,) * len(self.e.outs), **changes)
