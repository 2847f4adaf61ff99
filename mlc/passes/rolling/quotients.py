"""Quotients in optimizer steps, regrouped so that none of their parts is infinite.

``torch.optim.Adam`` folds its rate into the denominator: ``p + m / (sqrt(v) / (c s) + eps / s)`` with ``s = -lr / b``.
At rate 0, where every warm-up starts, that is ``m / inf``: the value is right, but its derivative, 0 * inf, is not a
number.  A denominator all of whose terms are divided by common 0-d factors is a quotient itself, so the factors move
to the numerator: ``p + m s / (sqrt(v) / c + eps)``, the same function with the right derivative at every rate, and the
order of operations that the plain step has.

Before: the flat recording of a program.  After: the same values up to rounding; only equations of optimizer steps
differ, and what they no longer need is left to dead code.  Linear in the number of equations.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from mlc.ir.core import Arg, Eqn, Var, aten
from mlc.ir.origin import Origin
from mlc.ir.types import TensorType
from mlc.record.retype import shared

__all__ = ["regrouped"]

_MUL, _DIV, _ADD = aten("mul", "Tensor"), aten("div", "Tensor"), aten("add", "Tensor")
_RECIPROCAL, _ADDCDIV, _CLONE = aten("reciprocal"), aten("addcdiv"), aten("clone")


@dataclass(frozen=True)
class _Quotient:
    """``over / product of under``; ``over`` is a value, a number, or ``(op, a, b)`` of such."""

    over: Any
    under: tuple[Var, ...]


def regrouped(eqns: Sequence[Eqn]) -> list[Eqn]:
    """The equations, those of optimizer steps with factors of their denominators in the numerators."""
    r = _Regroup()
    for e in eqns:
        r.step(e)
    return r.out


class _Regroup:
    def __init__(self) -> None:
        self.out: list[Eqn] = []
        self.known: dict[Var, _Quotient] = {}
        self.products: dict[Var, tuple[Var, ...]] = {}
        self.copies: dict[Var, Var] = {}

    def step(self, e: Eqn) -> None:
        if e.origin is Origin.UPDATE:
            below = 1 if e.op is _DIV else 2 if e.op is _ADDCDIV else 0
            found = self.known.get(e.args[below]) if below and type(e.args[below]) is Var else None
            if found is not None:
                e = self.regroup(e, below, found)
            self.note(e)
        self.out.append(e)

    def note(self, e: Eqn) -> None:
        """Remember a result that is a quotient, a product of 0-d values or a copy."""
        v = e.outs[0] if e.outs else None
        if v is None or e.kwargs:
            return
        if e.op is _CLONE:
            self.copies[v] = e.args[0]
        elif e.op is _RECIPROCAL and _scalar(e.args[0]):
            self.known[v] = _Quotient(1.0, self.factors(e.args[0]))
        elif e.op is _DIV and _scalar(e.args[1]):
            top = self.known.get(e.args[0]) if type(e.args[0]) is Var else None
            top = top or _Quotient(e.args[0], ())
            self.known[v] = _Quotient(top.over, (*top.under, *self.factors(e.args[1])))
        elif e.op is _MUL:
            self.product(v, *e.args)
        elif e.op is _ADD:
            self.sum(v, *e.args)

    def factors(self, v: Var) -> tuple[Var, ...]:
        return self.products.get(v, (v,))

    def product(self, v: Var, a: Arg, b: Arg) -> None:
        if _scalar(a) and _scalar(b):
            self.products[v] = (*self.factors(a), *self.factors(b))
        for x, y in ((a, b), (b, a)):
            found = self.known.get(x) if type(x) is Var else None
            if found is not None:
                other = self.known.get(y) if type(y) is Var else None
                other = other or _Quotient(y, ())
                self.known[v] = _Quotient((_MUL, found.over, other.over), (*found.under, *other.under))
                return

    def sum(self, v: Var, a: Arg, b: Arg) -> None:
        """A sum of quotients is one over the factors that both have."""
        one, two = (self.known.get(x) if type(x) is Var else None for x in (a, b))
        if one is None or two is None:
            return
        left, rest, common = list(one.under), list(two.under), []
        for f in one.under:
            if f in rest:
                left.remove(f)
                rest.remove(f)
                common.append(f)
        if common:
            terms = [_divided(one.over, left), _divided(two.over, rest)]
            self.known[v] = _Quotient((_ADD, *terms), tuple(common))

    def regroup(self, e: Eqn, below: int, found: _Quotient) -> Eqn:
        """Move the factors of a denominator to the numerator."""
        top = e.args[below - 1]
        top = self.copies.get(top, top) if type(top) is Var else top
        for f in found.under:
            top = self.emit(e, _MUL, top, f)
        args = list(e.args)
        args[below - 1 : below + 1] = [top, self.spelled(e, found.over)]
        return e.with_(args=tuple(args))

    def spelled(self, e: Eqn, what: Any) -> Any:
        if type(what) is not tuple:
            return what
        a, b = (self.spelled(e, x) for x in what[1:])
        if type(a) is Var or type(b) is Var:
            return self.emit(e, what[0], *((b, a) if type(a) is not Var and what[0] is not _DIV else (a, b)))
        return a * b if what[0] is _MUL else a + b if what[0] is _ADD else a / b

    def emit(self, e: Eqn, op: Any, a: Arg, b: Arg) -> Var:
        if op is _MUL and type(b) is float and b == 1.0:
            return a  # type: ignore[no-any-return]
        (t,) = shared().types(op, (a, b), ())
        v = Var(t)
        self.out.append(Eqn(op, (a, b), (v,), (), e.loc, e.tag, e.site))
        return v


def _divided(what: Any, under: Sequence[Var]) -> Any:
    for f in under:
        what = (_DIV, what, f)
    return what


def _scalar(a: Arg) -> bool:
    return type(a) is Var and isinstance(a.type, TensorType) and not a.type.shape and a.type.dtype.is_floating_point
