"""Placeholders for Python numbers read from tensors while a loop is traced.

``loss.item()`` has no value while tracing.  A :class:`TracedScalar` stands for it: it prints as ``<traced>``, takes
part in arithmetic, and may be used as an operand of torch operators (it is the detached tensor then).  Whatever
needs the number itself - a branch, an index, ``math`` - gets it if it is known (:mod:`mlc.trace.recorder.concrete`) and
raises :class:`~mlc.errors.CaptureError` otherwise: never a wrong number.
"""

from __future__ import annotations

import contextlib
import dis
import math
import sys
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from mlc.errors import CaptureError

__all__ = ["TracedScalar", "deciding", "traced_max", "traced_min"]

Decide = Callable[[Tensor, Callable[[Any], Any], str], Any]


def _over(what: str) -> CaptureError:
    return CaptureError(
        f"{what} is wanted of a placeholder: it was read (.item()) while the compiled function was traced, and the "
        "call has finished without filling it in",
        advice="return the value from the compiled function: what it returns becomes a number",
    )


def _undecided(t: Tensor, kind: Callable[[Any], Any], what: str) -> Any:
    raise _over(what)


_decide: Decide = _undecided


@contextlib.contextmanager
def deciding(f: Decide) -> Iterator[None]:
    """For the time of a trace: the function that turns a traced value into a Python number, or refuses."""
    global _decide
    before, _decide = _decide, f
    try:
        yield
    finally:
        _decide = before


def _text() -> str:
    """How a placeholder prints: at a glance while tracing, with what to do once that is over."""
    return "<traced>" if _decide is not _undecided else "<traced: a placeholder, return it to get the number>"


def _formats() -> bool:
    """Whether the caller is a ``"..." % value`` expression (logging): a placeholder is welcome there."""
    f = sys._getframe(2)
    code = f.f_code.co_code
    at = f.f_lasti
    return dis.opname[code[at]] == "BINARY_OP" and code[at + 1] in (_MODULO, _MODULO + 13)


_MODULO = next(i for i, (_, symbol) in enumerate(dis._nb_ops) if symbol == "%")  # type: ignore[attr-defined]


class TracedScalar:
    """A number that will be known when the program runs; ``tensor`` is the 0-d tensor it comes from."""

    __slots__ = ("tensor",)

    def __init__(self, tensor: Tensor) -> None:
        self.tensor = tensor

    def __repr__(self) -> str:
        return _text()

    __str__ = __repr__

    def __format__(self, spec: str) -> str:
        return _text()

    def _with(self, other: object, f: Callable[[Any, Any], Any]) -> Any:
        if _decide is _undecided:
            raise _over("arithmetic")
        if isinstance(other, Tensor) and other.dim() > 0:
            return f(self.tensor, other)
        with torch.no_grad():
            r = f(self.tensor, other.tensor if isinstance(other, TracedScalar) else other)
        return TracedScalar(r) if not isinstance(other, Tensor) else r

    def __add__(self, o: object) -> Any:
        return self._with(o, lambda a, b: a + b)

    def __radd__(self, o: object) -> Any:
        return self._with(o, lambda a, b: b + a)

    def __sub__(self, o: object) -> Any:
        return self._with(o, lambda a, b: a - b)

    def __rsub__(self, o: object) -> Any:
        return self._with(o, lambda a, b: b - a)

    def __mul__(self, o: object) -> Any:
        return self._with(o, lambda a, b: a * b)

    def __rmul__(self, o: object) -> Any:
        return self._with(o, lambda a, b: b * a)

    def __truediv__(self, o: object) -> Any:
        return self._with(o, lambda a, b: a / b)

    def __rtruediv__(self, o: object) -> Any:
        return self._with(o, lambda a, b: b / a)

    def __pow__(self, o: object) -> Any:
        return self._with(o, lambda a, b: a**b)

    def __neg__(self) -> Any:
        return self._with(-1, lambda a, b: a * b)

    def __abs__(self) -> Any:
        return self._with(0, lambda a, b: (a + b).abs())

    def __round__(self, n: int | None = None) -> Any:
        return self

    @classmethod
    def __torch_function__(cls, func: Any, types: object, args: Any = (), kwargs: Any = None) -> Any:
        def plain(a: object) -> Any:
            if isinstance(a, TracedScalar):
                return a.tensor.detach()
            if isinstance(a, (list, tuple)):
                return type(a)(plain(x) for x in a)
            return a

        if _decide is _undecided:
            raise _over("a torch operator's operand")
        args, kwargs = list(args), dict(kwargs or {})
        for name in ("alpha", "value"):  # these must be Python numbers: multiply instead
            scale = kwargs.get(name)
            if isinstance(scale, TracedScalar):
                del kwargs[name]
                args[1] = args[1] * scale.tensor.detach()
        return func(*plain(tuple(args)), **{k: plain(v) for k, v in kwargs.items()})

    def __hash__(self) -> int:
        return id(self)

    def __bool__(self) -> bool:
        return bool(_decide(self.tensor, bool, "a branch"))

    def __float__(self) -> float:
        if _decide is not _undecided and _formats():
            return math.nan
        return float(_decide(self.tensor, float, "a Python float"))

    def __int__(self) -> int:
        return int(_decide(self.tensor, int, "a Python int"))

    def __index__(self) -> int:
        return int(_decide(self.tensor, int, "an index"))

    def __lt__(self, o: object) -> Any:
        return self._with(o, lambda a, b: a < b)

    def __le__(self, o: object) -> Any:
        return self._with(o, lambda a, b: a <= b)

    def __gt__(self, o: object) -> Any:
        return self._with(o, lambda a, b: a > b)

    def __ge__(self, o: object) -> Any:
        return self._with(o, lambda a, b: a >= b)

    def __ne__(self, o: object) -> Any:
        if _decide is _undecided:  # containers compare what they hold
            return o is not self
        return self._with(o, lambda a, b: a != b)

    def __eq__(self, o: object) -> Any:
        if o is self or _decide is _undecided:
            return o is self
        return self._with(o, lambda a, b: a == b)


def _smaller(sign: int) -> Callable[..., Any]:
    """``min`` and ``max`` that also take traced numbers (differentiable where they decide a step size)."""
    builtin = min if sign > 0 else max

    def pick(*args: Any, **kwargs: Any) -> Any:
        if not any(isinstance(a, TracedScalar) for a in args):
            return builtin(*args, **kwargs)
        like = next(a.tensor for a in args if isinstance(a, TracedScalar))
        with torch.no_grad():
            parts = [
                a.tensor
                if isinstance(a, TracedScalar)
                else torch.full([], float(a), dtype=like.dtype, device=like.device)
                for a in args
            ]
            out = parts[0]
            for p in parts[1:]:
                out = torch.minimum(out, p) if sign > 0 else torch.maximum(out, p)
        return TracedScalar(out)

    return pick


traced_min, traced_max = _smaller(1), _smaller(-1)
