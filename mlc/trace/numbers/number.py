"""Python numbers read from tensors while the user's function really runs and is recorded.

``loss.item()`` is a :class:`Number` then: it *is* the number (Python's own arithmetic, type, text), and it knows the
0-d tensor that holds it in the recording.  A use of it is one of three things:

* it is observed (printed, formatted, written to JSON or a pickle): nothing is noted;
* it goes on as a number (arithmetic, ``math``, a torch operator: :mod:`mlc.trace.numbers.mode`): the link is kept, and
  at later calls the value follows.  Each link is compared with Python's own value when it is made;
* it decides something, or C code takes the bare value: the outcome is guarded, and later calls must find the same.

A number is no subclass of ``float``, since C code would read that without asking; it says it is one where Python asks
(``isinstance``, ``numbers.Real``, ``type(x) == float``), and C code has to call ``__float__`` or ``__index__``.
Once the recording is over (:func:`mlc.trace.numbers.ending.retire`) it is an ordinary number that answers by value.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from typing import Any

import numpy
import torch
from torch import Tensor

from mlc.trace.numbers.calls import answer
from mlc.trace.numbers.links import (
    BASE,
    CLASSES,
    Ledger,
    Linked,
    apply,
    compare,
    constant,
    decide,
    number,
    pin,
    test,
    unseen,
)
from mlc.trace.numbers.rules import ARITHMETIC, COMPARISON, TESTS, UFUNCS, UNARY, Rule, rounding
from mlc.trace.numbers.text import formats

__all__ = ["Ledger", "Number", "escape", "numbers_of", "take"]

_STANDS_FOR = {"FloatNumber": float, "IntNumber": int, "BoolNumber": bool, "ComplexNumber": complex}


class _Kind(type):
    """Classes of numbers equal the type they stand for: for ``type(x) == float`` and tables by type."""

    def __eq__(cls, other: object) -> bool:
        return cls is other or (other is not None and other is _STANDS_FOR.get(cls.__name__))

    def __call__(cls, *args: object, **kwargs: object) -> Any:
        """``type(x)(y)`` is a plain number."""
        return super().__call__(*args, **kwargs) if len(args) > 1 else _STANDS_FOR[cls.__name__](*args)

    def __hash__(cls) -> int:
        return hash(_STANDS_FOR.get(cls.__name__, cls.__name__))


class Number(Linked, metaclass=_Kind):
    """A number with the 0-d tensor that holds it in the recording; see the module."""

    __slots__ = ()

    @property  # type: ignore[misc]
    def __class__(self) -> type:
        return type(self.value)

    def __repr__(self) -> str:
        self.shown = True
        return repr(self.value)

    def __str__(self) -> str:
        self.shown = True
        return str(self.value)

    def __format__(self, spec: str) -> str:
        self.shown = True
        return format(self.value, spec)

    def hex(self) -> str:
        """A text of the number."""
        return str(self.value.hex())

    def __copy__(self) -> Number:
        return self

    def __deepcopy__(self, memo: object) -> Number:
        return self

    def __reduce_ex__(self, protocol: object) -> Any:
        return type(self.value), (self.value,)

    def __hash__(self) -> int:
        return hash(pin(self, "a hash"))

    def __bool__(self) -> bool:
        if self.ledger is not None and not self.pinned:
            decide(lambda t: t != 0, bool(self.value), "a branch", self)
        return bool(self.value)

    def __float__(self) -> float:
        return float(_observed(self, "a Python float"))

    def __int__(self) -> int:
        return int(_observed(self, "a Python int"))

    def __complex__(self) -> complex:
        return complex(pin(self, "a Python complex number"))

    def __divmod__(self, other: object) -> Any:
        return _pair(self, other, self, other)

    def __rdivmod__(self, other: object) -> Any:
        return _pair(other, self, self, other)

    def __round__(self, digits: Any = None) -> Any:
        n = None if digits is None else digits.__index__()
        if isinstance(self.value, int) and (n is None or n >= 0):
            return apply(UNARY["pos"], self)
        if n is None:
            return apply(UNARY["round"], self)
        return apply(rounding(n), self)

    def conjugate(self) -> Any:
        """The complex conjugate: a real number itself."""
        if isinstance(self.value, complex):
            return apply(Rule("conjugate", lambda x: x.conjugate(), lambda kind, a: None), self)
        return apply(UNARY["pos"], self)

    @property
    def real(self) -> Any:
        """The real part."""
        return apply(UNARY["pos"], self) if not isinstance(self.value, complex) else pin(self, "a real part").real

    @property
    def imag(self) -> Any:
        """The imaginary part, a constant for a real number."""
        return self.value.imag if not isinstance(self.value, complex) else pin(self, "an imaginary part").imag

    def is_integer(self) -> bool:
        """Whether the value is whole."""
        outcome: bool = self.value.is_integer()
        if self.ledger is not None:
            decide(lambda t: torch.isfinite(t) & (torch.floor(t) == t), outcome, "a branch", self)
        return outcome

    def __getattr__(self, name: str) -> Any:
        if name in Linked.__slots__:
            raise AttributeError(name)
        attribute = getattr(self.value, name)  # AttributeError as for the plain number
        if name in ("dtype", "shape", "ndim", "size", "itemsize", "nbytes"):
            return attribute
        return getattr(pin(self, f"its {name}"), name)

    def __array__(self, dtype: Any = None, copy: Any = None) -> Any:
        return numpy.array(pin(self, "an element of a NumPy array"), dtype=dtype)

    def __array_ufunc__(self, ufunc: Any, method: str, *inputs: Any, **kwargs: object) -> Any:
        simple = method == "__call__" and not kwargs and all(isinstance(x, Number) or constant(x) for x in inputs)
        name = ufunc.__name__
        if simple and name in TESTS and len(inputs) == 1:
            return test(name, ufunc, inputs[0])
        if simple and name in UFUNCS:
            return apply(Rule(name, ufunc, UFUNCS[name]), *inputs)
        given = [pin(x, "an operand of NumPy") if isinstance(x, Number) else x for x in inputs]
        return getattr(ufunc, method)(*given, **kwargs)

    @classmethod
    def __torch_function__(cls, func: object, types: object, args: object = (), kwargs: object = None) -> Any:
        return answer(func, types, args, kwargs or {})


class FloatNumber(Number):
    """A number that is a float."""

    __slots__ = ()


class IntNumber(Number):
    """A number that is an int: also an index."""

    __slots__ = ()

    def __index__(self) -> int:
        return int(_observed(self, "an index"))

    def __invert__(self) -> Any:
        return apply(UNARY["invert"], self)


class BoolNumber(IntNumber):
    """A number that is a bool."""

    __slots__ = ()


class ComplexNumber(Number):
    """A number that is complex."""

    __slots__ = ()


CLASSES += [(bool, BoolNumber), (int, IntNumber), (float, FloatNumber), (complex, ComplexNumber)]


def numbers_of(t: Tensor, ledger: Ledger) -> Any:
    """``t.tolist()`` (``t.item()`` for a 0-d tensor) with numbers in it, of the values that ``t`` has now."""
    if t.dtype.is_complex:
        kind = torch.complex128
    elif t.dtype.is_floating_point:
        kind = torch.float64
    else:
        kind = torch.bool if t.dtype == torch.bool else torch.int64
    with unseen():
        values = BASE.tolist(t.detach())
    flat = ledger.link(lambda x: x.detach().reshape(-1).to(kind, copy=True), t)
    if flat is None:
        return values
    places = iter(range(t.numel()))

    def build(x: object) -> Any:
        return [build(y) for y in x] if isinstance(x, list) else number(x, flat, ledger, next(places))

    return build(values)


def take(t: Tensor, ledger: Ledger) -> Any:
    """``t.item()`` of a tensor of one element, of any number of dimensions."""
    return numbers_of(t.detach().reshape(()), ledger)


def escape(t: Tensor, ledger: Ledger, what: str = "a NumPy array") -> None:
    """The values of ``t`` leave the recording (``.numpy()``): later calls must find all of them the same."""
    with unseen():
        copy = t.detach().clone()
    ledger.guard(t.detach(), copy, what)


def _observed(x: Number, what: str) -> Any:
    """The value for C code: guarded, unless the code that called only formats a text."""
    if not formats(sys._getframe(2)):
        return pin(x, what)
    x.shown = True
    return x.value


def _foreign(f: Callable[[Any, Any], Any], x: Number, other: object, swap: bool = False) -> Any:
    """An operator with something that is no number: a tensor's own method goes on, the rest gets the exact value."""
    if hasattr(type(other), "__torch_function__"):
        return NotImplemented
    value = pin(x, f"an operand of {type(other).__name__}")
    return f(other, value) if swap else f(value, other)


def _pair(a: object, b: object, x: Number, other: object) -> Any:
    if not (isinstance(other, Number) or constant(other)):
        return _foreign(divmod, x, other, swap=b is x)
    return apply(ARITHMETIC["floordiv"], a, b), apply(ARITHMETIC["mod"], a, b)


def _methods() -> Iterator[tuple[str, Callable[..., Any]]]:
    def forward(rule: Rule) -> Callable[..., Any]:
        def method(self: Number, other: Any, modulus: Any = None) -> Any:
            if modulus is not None:
                given = [pin(x, "an operand of pow") if isinstance(x, Number) else x for x in (self, other, modulus)]
                return pow(*given)
            if isinstance(other, Number) or constant(other):
                return apply(rule, self, other)
            return _foreign(rule.value, self, other)

        return method

    def reflected(rule: Rule) -> Callable[..., Any]:
        def method(self: Number, other: object, modulus: object = None) -> Any:
            if constant(other):
                return apply(rule, other, self)
            return _foreign(rule.value, self, other, swap=True)

        return method

    def compared(question: Callable[[Any, Any], Any]) -> Callable[..., Any]:
        def method(self: Number, other: object) -> Any:
            if isinstance(other, Number) or constant(other):
                return compare(question, self, other)
            if other is None or isinstance(other, (str, bytes, list, tuple, dict, set)):
                return NotImplemented  # whatever the value is
            return _foreign(question, self, other)

        return method

    def unary(rule: Rule) -> Callable[..., Any]:
        def method(self: Number) -> Any:
            if rule.name in _WHOLE and isinstance(self.value, int):
                return apply(UNARY["pos"], self)
            return apply(rule, self)

        return method

    for name, rule in ARITHMETIC.items():
        yield f"__{name}__", forward(rule)
        yield f"__r{name}__", reflected(rule)
    for name, question in COMPARISON.items():
        yield f"__{name}__", compared(question)
    for name in ("neg", "pos", "abs", *_WHOLE):
        yield f"__{name}__", unary(UNARY[name])


_WHOLE = ("trunc", "floor", "ceil")


for _name, _method in _methods():
    setattr(Number, _name, _method)
