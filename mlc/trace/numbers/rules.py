"""What the operators of Python numbers are on 0-d tensors, and when: tables used by :mod:`mlc.trace.numbers.number`.

A :class:`Rule` pairs Python's own function, which gives the value, with a function of tensors that gives the same
number in the recording: in float64 for a float, int64 for an int, so that it equals Python's arithmetic.  Where Python
would raise or give another type (a division by zero, the logarithm of a negative number, an int beyond 63 bits), the
tensor goes on with an infinity or wraps around; such a rule carries conditions, which become guards.  A rule that
answers None has no tensor form for these operands: their exact values are guarded instead.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

__all__ = [
    "ARITHMETIC",
    "COMPARISON",
    "MATH",
    "TESTS",
    "UFUNCS",
    "UNARY",
    "Form",
    "Operand",
    "Rule",
    "cast",
    "rounding",
]

Operand = Tensor | int | float | complex
"""A 0-d tensor, or a constant of Python."""

_INT_LIMIT = float(2**62)
_SAFE_FACTOR = 1 << 16  # a product with a constant below it cannot leave 63 bits unless the number is beyond 2**46


@dataclass(frozen=True)
class Form:
    """The tensor form of an operator on certain operands, with the conditions under which Python agrees."""

    link: Callable[..., Tensor]
    conditions: tuple[Callable[..., Tensor], ...] = ()


@dataclass(frozen=True)
class Rule:
    """An operator of numbers: ``value`` on plain ones, and ``form(kind, *operands)`` for tensors, None if it has none.

    ``kind`` is the dtype of the result; an operand is a constant or, where a number stands, the class ``Tensor``.
    """

    name: str
    value: Callable[..., Any]
    form: Callable[..., Form | None]


def cast(a: Operand, kind: torch.dtype) -> Any:
    """An operand in the dtype that an operator computes in; constants stay constants of Python."""
    if isinstance(a, Tensor):
        return a.to(kind)
    if kind.is_complex:
        return complex(a)
    if kind.is_floating_point:
        return float(a)  # type: ignore[arg-type]
    return int(a)  # type: ignore[arg-type]


def together(a: Operand, b: Operand, kind: torch.dtype) -> tuple[Any, Any]:
    """Two operands in one dtype and, if both are tensors, on one device."""
    x, y = cast(a, kind), cast(b, kind)
    if isinstance(x, Tensor) and isinstance(y, Tensor) and x.device != y.device:
        y = y.to(x.device)
    return x, y


def _both(f: Callable[[Any, Any], Any], kind: torch.dtype) -> Callable[..., Tensor]:
    def link(a: Operand, b: Operand) -> Tensor:
        out = f(*together(a, b, kind))
        assert isinstance(out, Tensor)
        return out

    return link


def _one(f: Callable[[Any], Tensor], kind: torch.dtype) -> Callable[..., Tensor]:
    return lambda a: f(cast(a, kind))


def _traced(a: object) -> bool:
    return a is Tensor


def _nonzero(a: Operand, b: Tensor) -> Tensor:
    return b != 0


def _fits(a: Operand, b: Operand) -> Tensor:
    x, y = together(a, b, torch.float64)
    out: Tensor = (x * y).abs() < _INT_LIMIT
    return out


def _whole(a: Tensor) -> Tensor:
    """Whether a float can become an int of 63 bits."""
    return a.abs() < _INT_LIMIT


def _plain(f: Callable[[Any, Any], Any]) -> Callable[..., Form | None]:
    return lambda kind, a, b: Form(_both(f, kind))


def _product(kind: torch.dtype, a: Any, b: Any) -> Form:
    risky = all(_traced(x) or abs(x) > _SAFE_FACTOR for x in (a, b))
    return Form(_both(operator.mul, kind), (_fits,) if kind == torch.int64 and risky else ())


def _truediv(kind: torch.dtype, a: object, b: object) -> Form:
    return Form(_both(operator.truediv, kind), (_nonzero,) if _traced(b) else ())


def _floored(f: Callable[[Any, Any], Any]) -> Callable[..., Form | None]:
    def form(kind: torch.dtype, a: object, b: object) -> Form | None:
        if kind.is_complex:
            return None

        def link(x: Operand, y: Operand) -> Tensor:
            x, y = together(x, y, kind)
            if kind == torch.int64 and isinstance(y, Tensor):
                y = torch.where(y == 0, torch.ones_like(y), y)  # no error where the guard fails
            return torch.as_tensor(f(x, y))

        return Form(link, (_nonzero,) if _traced(b) else ())

    return form


def _floor_divide(a: Any, b: Any) -> Tensor:
    a = a if isinstance(a, Tensor) else torch.full_like(b, a)
    return torch.div(a, b, rounding_mode="floor")


def _bits(f: Callable[[Any, Any], Any]) -> Callable[..., Form | None]:
    def link_bool(a: Operand, b: Operand) -> Tensor:
        x = a if isinstance(a, Tensor) else torch.full_like(b, bool(a), dtype=torch.bool)  # type: ignore[arg-type]
        y = b if isinstance(b, Tensor) else torch.full_like(x, bool(b), dtype=torch.bool)
        return torch.as_tensor(f(x, y.to(x.device)))

    return lambda kind, a, b: Form(link_bool if kind == torch.bool else _both(f, kind))


def _shift_right(kind: torch.dtype, a: Any, b: Any) -> Form | None:
    return Form(_both(operator.rshift, kind)) if not _traced(b) and 0 <= b < 63 else None


def _power(kind: torch.dtype, a: Any, b: Any) -> Form | None:
    """``a ** b`` as a float: positive base, or a whole constant as exponent."""
    if kind != torch.float64:
        return None
    conditions: list[Callable[..., Tensor]] = [_no_overflow(torch.pow)]
    if _traced(a):
        if _traced(b) or (b != int(b) if math.isfinite(b) else True):
            conditions.append(lambda x, y: ~(cast(x, torch.float64) <= 0))
        elif b < 0:
            conditions.append(lambda x, y: cast(x, torch.float64) != 0)
    elif not a > 0:
        return None
    return Form(_both(torch.pow, kind), tuple(conditions))


def _no_overflow(f: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """Python raises OverflowError where a result of finite numbers is infinite."""

    def condition(*operands: Operand) -> Tensor:
        xs = [cast(a, torch.float64) for a in operands]
        ok = torch.isfinite(f(*xs))
        for x in xs:
            if isinstance(x, Tensor):
                ok = ok | ~torch.isfinite(x)
            elif not math.isfinite(x):
                ok = torch.ones_like(ok)
        return ok

    return condition


ARITHMETIC = {
    r.name: r
    for r in (
        Rule("add", operator.add, _plain(operator.add)),
        Rule("sub", operator.sub, _plain(operator.sub)),
        Rule("mul", operator.mul, _product),
        Rule("truediv", operator.truediv, _truediv),
        Rule("floordiv", operator.floordiv, _floored(_floor_divide)),
        Rule("mod", operator.mod, _floored(torch.remainder)),
        Rule("pow", operator.pow, _power),
        Rule("and", operator.and_, _bits(operator.and_)),
        Rule("or", operator.or_, _bits(operator.or_)),
        Rule("xor", operator.xor, _bits(operator.xor)),
        Rule("lshift", operator.lshift, lambda kind, a, b: None),
        Rule("rshift", operator.rshift, _shift_right),
    )
}
"""Name of the special method (without underscores) -> rule."""

COMPARISON = {name: getattr(operator, name) for name in ("lt", "le", "gt", "ge", "eq", "ne")}


def _negative(kind: torch.dtype, a: object) -> Form:
    return Form(_one(torch.neg, kind))


def _absolute(kind: torch.dtype, a: object) -> Form:
    def link(x: Tensor) -> Tensor:
        return torch.abs(x if x.is_complex() else x.to(kind)).to(kind)

    return Form(link)


def _integral(f: Callable[[Tensor], Tensor]) -> Callable[..., Form | None]:
    def form(kind: torch.dtype, a: object) -> Form | None:
        return Form(lambda x: f(x).to(torch.int64) if x.is_floating_point() else x.to(torch.int64), (_whole,))

    return form


UNARY = {
    r.name: r
    for r in (
        Rule("neg", operator.neg, _negative),
        Rule("pos", operator.pos, lambda kind, a: Form(_one(torch.clone, kind))),
        Rule("abs", operator.abs, _absolute),
        Rule("invert", operator.invert, lambda kind, a: Form(_one(torch.bitwise_not, kind))),
        Rule("trunc", math.trunc, _integral(torch.trunc)),
        Rule("floor", math.floor, _integral(torch.floor)),
        Rule("ceil", math.ceil, _integral(torch.ceil)),
        Rule("round", round, _integral(torch.round)),
    )
}


def _product_error(a: Tensor, b: float | Tensor, p: Tensor) -> Tensor:
    """``a * b - p`` exactly, for ``p`` the rounded product (T. J. Dekker, 1971; no fused operation is needed)."""

    def split(x: Any) -> tuple[Any, Any]:
        big = x * 134217729.0
        high = big - (big - x)
        return high, x - high

    (ah, al), (bh, bl) = split(a), split(b)
    out: Tensor = ((ah * bh - p) + ah * bl + al * bh) + al * bl
    return out


def rounding(digits: int) -> Rule:
    """``round(x, digits)``, correctly rounded as Python does: ties are told from near ties by the exact product."""
    if abs(digits) > 22:  # 10 ** 22 is the last power of ten that is a float
        return Rule("round", lambda x: round(x, digits), lambda kind, a: None)
    scale = 10.0 ** abs(digits)

    def link(x: Tensor) -> Tensor:
        if digits >= 0:
            p = x * scale
            rest = _product_error(x, scale, p)
        else:
            p = x / scale
            h = p * scale
            rest = (x - h) - _product_error(p, scale, h)
        below = torch.floor(p)
        tie = p - below == 0.5
        r = torch.where(tie & (rest > 0), below + 1, torch.where(tie & (rest < 0), below, torch.round(p)))
        out = r / scale if digits >= 0 else r * scale
        return torch.where(p.abs() < 2.0**52, out, x)

    def form(kind: torch.dtype, a: object) -> Form | None:
        return Form(link) if kind == torch.float64 else None

    return Rule("round", lambda x: round(x, digits), form)


def _function(
    f: Callable[[Tensor], Tensor], *conditions: Callable[..., Tensor], overflow: bool = False
) -> Callable[..., Form | None]:
    on_float = tuple(_one(c, torch.float64) for c in conditions)

    def form(kind: torch.dtype, a: object, *more: object) -> Form | None:
        if kind != torch.float64 or more:
            return None
        return Form(_one(f, kind), (*on_float, _no_overflow(f)) if overflow else on_float)

    return form


def _logarithm(kind: torch.dtype, a: Any, *base: Any) -> Form | None:
    if len(base) > 1 or (base and (_traced(base[0]) or not base[0] > 0)) or kind != torch.float64:
        return None
    scale = math.log(base[0]) if base else 1.0

    def link(x: Operand, *_: Operand) -> Tensor:
        out: Tensor = torch.log(cast(x, torch.float64)) / scale
        return out

    return Form(link, (lambda x, *_: ~(x <= 0),))


def _math_power(kind: torch.dtype, a: object, b: object) -> Form | None:
    return _power(kind, a, b)


_FUNCTIONS: dict[str, Callable[..., Form | None]] = {
    "sqrt": _function(torch.sqrt, lambda x: ~(x < 0)),
    "exp": _function(torch.exp, overflow=True),
    "exp2": _function(torch.exp2, overflow=True),
    "expm1": _function(torch.expm1, overflow=True),
    "log": _logarithm,
    "log2": _function(torch.log2, lambda x: ~(x <= 0)),
    "log10": _function(torch.log10, lambda x: ~(x <= 0)),
    "log1p": _function(torch.log1p, lambda x: ~(x <= -1)),
    "fabs": _function(torch.abs),
    "sin": _function(torch.sin, lambda x: ~torch.isinf(x)),
    "cos": _function(torch.cos, lambda x: ~torch.isinf(x)),
    "tanh": _function(torch.tanh),
}
MATH = {name: Rule(name, getattr(math, name), form) for name, form in _FUNCTIONS.items()} | {
    "pow": Rule("pow", math.pow, _math_power)
}
"""Name of a function of ``math`` -> rule."""

TESTS: dict[str, Callable[[Tensor], Tensor]] = {
    "isfinite": torch.isfinite,
    "isnan": torch.isnan,
    "isinf": torch.isinf,
}
"""Functions of ``math`` and NumPy that ask a number a question."""

UFUNCS: dict[str, Callable[..., Form | None]] = {
    **_FUNCTIONS,
    "add": _plain(operator.add), "subtract": _plain(operator.sub), "multiply": _product, "divide": _truediv,
    "power": _power, "float_power": _power, "negative": _negative, "absolute": _absolute,
}  # fmt: skip
"""Name of a NumPy function of scalars -> its tensor form."""
