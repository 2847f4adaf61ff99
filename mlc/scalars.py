"""Placeholders for Python numbers read from tensors while a loop is traced.

``loss.item()`` has no value while tracing.  A :class:`TracedScalar` stands for it: it prints as ``<traced>``, takes
part in arithmetic, and may be used as an operand of torch operators (it is the detached tensor then).  Whatever
needs the number itself - a branch, an index, ``math`` - raises :class:`~mlc.errors.CaptureError`: never a wrong number.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor

from mlc.errors import CaptureError

__all__ = ["TracedScalar"]

_locate: Callable[[], Any] = lambda: None  # noqa: E731


def set_locator(f: Callable[[], Any]) -> None:
    """Install the function that tells the user's place."""
    global _locate
    _locate = f


def _refuse(what: str) -> CaptureError:
    return CaptureError(
        f"{what} depends on the value of a tensor, which is not known while tracing", loc=_locate(),
        advice="use torch.where for a choice inside the program, or move the decision out of the compiled function",
    )  # fmt: skip


class TracedScalar:
    """A number that will be known when the program runs; ``tensor`` is the 0-d tensor it comes from."""

    __slots__ = ("tensor",)

    def __init__(self, tensor: Tensor) -> None:
        self.tensor = tensor

    def __repr__(self) -> str:
        return "<traced>"

    __str__ = __repr__

    def __format__(self, spec: str) -> str:
        return "<traced>"

    def _with(self, other: Any, f: Callable[[Any, Any], Any]) -> Any:
        import torch

        if isinstance(other, Tensor) and other.dim() > 0:
            return f(self.tensor, other)
        with torch.no_grad():
            r = f(self.tensor, other.tensor if isinstance(other, TracedScalar) else other)
        return TracedScalar(r) if not isinstance(other, Tensor) else r

    def __add__(self, o: Any) -> Any:
        return self._with(o, lambda a, b: a + b)

    def __radd__(self, o: Any) -> Any:
        return self._with(o, lambda a, b: b + a)

    def __sub__(self, o: Any) -> Any:
        return self._with(o, lambda a, b: a - b)

    def __rsub__(self, o: Any) -> Any:
        return self._with(o, lambda a, b: b - a)

    def __mul__(self, o: Any) -> Any:
        return self._with(o, lambda a, b: a * b)

    def __rmul__(self, o: Any) -> Any:
        return self._with(o, lambda a, b: b * a)

    def __truediv__(self, o: Any) -> Any:
        return self._with(o, lambda a, b: a / b)

    def __rtruediv__(self, o: Any) -> Any:
        return self._with(o, lambda a, b: b / a)

    def __pow__(self, o: Any) -> Any:
        return self._with(o, lambda a, b: a**b)

    def __neg__(self) -> Any:
        return self._with(-1, lambda a, b: a * b)

    def __abs__(self) -> Any:
        return self._with(0, lambda a, b: (a + b).abs())

    def __round__(self, n: int | None = None) -> Any:
        return self

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        def plain(a: Any) -> Any:
            if isinstance(a, TracedScalar):
                return a.tensor.detach()
            if isinstance(a, (list, tuple)):
                return type(a)(plain(x) for x in a)
            return a

        return func(*plain(tuple(args)), **{k: plain(v) for k, v in (kwargs or {}).items()})

    def __hash__(self) -> int:
        return id(self)

    def __bool__(self) -> bool:
        raise _refuse("a branch")

    def __float__(self) -> float:
        raise _refuse("a Python float")

    def __int__(self) -> int:
        raise _refuse("a Python int")

    def __index__(self) -> int:
        raise _refuse("an index")

    def __lt__(self, o: Any) -> bool:
        raise _refuse("a comparison")

    __le__ = __gt__ = __ge__ = __lt__

    def __eq__(self, o: object) -> bool:
        if o is self:
            return True
        raise _refuse("a comparison")
