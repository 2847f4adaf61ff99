"""Watching a run for NaN and infinity: where the first one began that a result is made of.

A run that gave something that is not finite is run once more with this on: every value is looked at when it is made.  A
value that is not finite has an *origin*: that of an operand, or the equation itself where no operand had it.  NaN made
of infinities that the program wrote down begins where it is NaN; a mask that a softmax swallows is nobody's origin.
Linear in the number of equations that run; off, it costs nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from mlc.ir.core import Draw, Eqn, Loop, Region
from mlc.runtime.interpreter.interpreter import Executable, compile_region

__all__ = ["Origin", "Watch", "finite"]


@dataclass(frozen=True)
class Origin:
    """Where something began that is not finite.

    Attributes:
        kind: ``"NaN"`` or ``"infinity"``.
        op: The operator; empty where the value came from outside.
        loc: The user's line, or None.
        trips: The trips of the loops around, outermost first, from 1.
        adjoint: Whether it began in the derivative.
        name: Of an input that had it already.
        made: Whether the operator makes such values of nothing (a constant, a mask).
        cause: Where the infinity began that NaN was made of.
    """

    kind: str
    op: str = ""
    loc: Any = None
    trips: tuple[int, ...] = ()
    adjoint: bool = False
    name: str = ""
    made: bool = False
    cause: Origin | None = None

    @property
    def harmless(self) -> bool:
        """Whether it is an infinity that the program wrote down itself, or was given."""
        return self.kind == "infinity" and (self.made or bool(self.name))


def finite(values: Iterable[Any]) -> bool:
    """Whether all floating-point tensors among values are finite; one number is read per device and type."""
    by_kind: dict[Any, list[Tensor]] = {}
    for t in values:
        if isinstance(t, Tensor) and t.numel() and t.is_floating_point() and t.layout is torch.strided:
            by_kind.setdefault((t.device, t.dtype), []).append(t)
    for tensors in by_kind.values():
        largest = torch.stack(torch._foreach_norm(tensors, float("inf")))
        if not bool(torch.isfinite(largest).all()):
            return False
    return True


def _kind(t: Any) -> str | None:
    if not isinstance(t, Tensor) or not (t.is_floating_point() or t.is_complex()) or not t.numel():
        return None
    if bool(torch.isfinite(t).all()):
        return None
    return "NaN" if bool(torch.isnan(t).any()) else "infinity"


class _Trips:
    """A loop that runs, and where it is."""

    def __init__(self, op: Loop) -> None:
        self.op, self.done = op, 0

    @property
    def at(self) -> int:
        """The trip under way, from 1, as the loop of the user counts."""
        return self.op.count - self.done + 1 if self.op.reverse else self.done


class Watch:
    """Looks at every value of a run; ``origin`` tells where one came from."""

    def __init__(self) -> None:
        self._known: dict[int, tuple[Tensor, Origin]] = {}  # holds the tensors, so that identities stay theirs
        self._loops: list[_Trips] = []
        self.backward = False

    def origin(self, value: Any) -> Origin | None:
        """Where a value that is not finite came from; None where it is finite."""
        kind = _kind(value)
        if kind is None:
            return None
        known = self._known.get(id(value))
        return self._first(known[1]) if known is not None else Origin(kind)

    def _first(self, o: Origin) -> Origin:
        """The first that began at the same line and trip: a logarithm, rather than the quotient in its derivative."""
        same = (k for _, k in self._known.values() if k.loc == o.loc and k.trips == o.trips and not k.harmless)
        return next((k for k in same if k.op), o) if o.loc is not None else o

    def compile(self, region: Region, special: Callable[[Eqn], Callable[..., Any] | None]) -> Executable:
        """Executable form of a region whose values are looked at."""

        def seen(e: Eqn) -> Callable[..., Any] | None:
            runner = special(e)
            return self._looping(e.op, runner) if runner is not None and isinstance(e.op, Loop) else runner

        body = compile_region(region, seen, self._look)
        names = region.names or ("",) * len(region.inputs)

        def run(args: list[Any]) -> list[Any]:
            if self._loops and self._loops[-1].op.body is region:
                self._loops[-1].done += 1
            for t, name in zip(args, names, strict=True):
                kind = _kind(t)
                if kind is not None and id(t) not in self._known:
                    where = name or self._outside()
                    self._note(t, Origin(kind, trips=self._trips(), adjoint=self.backward, name=where))
            return body(args)

        return run

    def _looping(self, op: Loop, runner: Callable[..., Any]) -> Callable[..., Any]:
        def run(args: list[Any]) -> list[Any]:
            self._loops.append(_Trips(op))
            try:
                found: list[Any] = runner(args)
                return found
            finally:
                self._loops.pop()

        return run

    def _trips(self) -> tuple[int, ...]:
        return tuple(x.at for x in self._loops)

    def _look(self, e: Eqn, ins: Sequence[Any], outs: Sequence[Any]) -> None:
        """An equation has run."""
        if isinstance(e.op, Loop):
            return  # its body was looked at
        for t in outs:
            kind = _kind(t)
            if kind is None or id(t) in self._known:
                continue
            if isinstance(e.op, Draw):
                self._note(t, Origin(kind, loc=e.loc, trips=self._trips(), name="an item of its data"))
                continue
            sources = [k[1] for x in ins if (k := self._known.get(id(x))) is not None]
            fault = next((s for s in sources if s.kind == "NaN" or kind == "infinity" or not s.harmless), None)
            mine = Origin(kind, str(e.op), e.loc, self._trips(), self.backward, made=not _reads(ins, str(e.op)))
            self._note(t, fault or replace(mine, cause=sources[0] if sources else None))

    def _outside(self) -> str:
        """What a value is that nobody saw made."""
        if self.backward:
            return "what the forward run saved"
        return "an item of its data" if self._loops else "an input"

    def _note(self, t: Tensor, origin: Origin) -> None:
        self._known[id(t)] = (t, origin)


def _reads(ins: Sequence[Any], op: str) -> bool:
    """Whether what an operator gives depends on numbers, rather than being written down."""
    floats = [x for x in ins if isinstance(x, Tensor) and x.is_floating_point()]
    return bool(floats) and not any(name in op for name in ("masked_fill", "where", "full", "triu", "tril"))
