"""How a number of a recording goes on, decides or leaves: the data of a number and the functions on it.

See :mod:`mlc.trace.numbers.number` for the number that users meet; this module is what its methods do.
"""

from __future__ import annotations

import contextlib
import decimal
import numbers
import weakref
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from typing import Any, Protocol, TypeGuard

import torch
from torch import Tensor
from torch.utils._python_dispatch import _disable_current_modes

from mlc.trace.numbers.rules import TESTS, Rule, together

__all__ = ["Ledger", "Linked", "StandIn", "alive", "apply", "compare", "constant", "decide", "pin", "plain", "test"]


class Ledger(Protocol):
    """Where a recording notes what its numbers do.

    Attributes:
        rounds: Whether operators on numbers round as eager PyTorch does with plain ones.
    """

    rounds: bool

    def link(self, f: Callable[..., Tensor], *operands: object) -> Tensor | None:
        """Run ``f`` on the operands' 0-d tensors under the recorder; None when nothing is recorded any more."""

    def guard(self, t: Tensor, outcome: object, what: str) -> None:
        """Make later calls find the same ``outcome`` in ``t`` (NaN equals NaN; a tensor equals a tensor)."""

    def quiet(self) -> AbstractContextManager[Any]:
        """While operators run unseen."""


_DTYPES = {bool: torch.bool, int: torch.int64, float: torch.float64, complex: torch.complex128}
_SAFE_INT = 2**53
BASE: Any = torch._C.TensorBase
CLASSES: list[
    tuple[type, type[Linked]]
] = []  # filled by mlc.trace.numbers.number: type of a value, class of its number


class StandIn(type):
    """A class that stands for another one in modules of the user (made by :mod:`mlc.trace.numbers.types`)."""

    stands_for: type


class Linked:
    """A value of Python and the 0-d tensor that holds it in the recording of a ledger."""

    __slots__ = ("__weakref__", "_at", "_tensor", "ledger", "pinned", "shown", "value")
    value: Any
    ledger: Ledger | None
    pinned: bool  # whether its exact value is guarded already
    shown: bool  # whether a text of it was made

    def __init__(self, value: object, tensor: Tensor | None, ledger: Ledger | None, at: int | None = None) -> None:
        self.value, self.ledger, self._tensor, self._at = value, ledger, tensor, at
        self.pinned = self.shown = False
        key = id(self)
        living[key] = weakref.ref(self, lambda _: living.pop(key, None))

    @property
    def tensor(self) -> Tensor:
        """The 0-d float64, int64, bool or complex128 tensor (an element of a list is taken when it is asked for)."""
        if self._at is not None and self.ledger is not None:
            at, self._at = self._at, None
            self._tensor = self.ledger.link(lambda flat: flat[at], self._tensor)
        if self._tensor is None:
            self.ledger = None
            raise RuntimeError("the recording of this number is over")
        return self._tensor

    def end(self) -> None:
        """Forget the recording: a plain number from now on."""
        self.ledger, self._tensor, self._at = None, None, None


living: dict[int, weakref.ref[Linked]] = {}  # every number of a recording that still exists


def kind_of(value: object) -> torch.dtype | None:
    """The dtype that holds a number exactly, or None (a long int, float32 and other types of NumPy)."""
    if type(value) is int and abs(value) >= _SAFE_INT:
        return None
    if type(value).__name__ == "float64" and isinstance(value, float):
        return torch.float64
    return _DTYPES.get(type(value))


def number(value: object, tensor: Tensor | None, ledger: Ledger | None, at: int | None = None) -> Linked:
    """A number of the class of its value."""
    for kind, cls in CLASSES:
        if isinstance(value, kind):
            return cls(value, tensor, ledger, at)
    raise TypeError(f"no number: {type(value).__name__}")


def alive(x: object) -> TypeGuard[Linked]:
    """Whether ``x`` is a number whose recording still runs."""
    if not isinstance(x, Linked) or x.ledger is None:
        return False
    try:
        return x.tensor is not None
    except RuntimeError:
        return False


def plain(x: object) -> Any:
    """The value of a number; anything else itself.  Nothing is noted: only for what is observed."""
    return x.value if isinstance(x, Linked) else x


def pin(x: Linked, what: str) -> Any:
    """The exact value of a number, guarded."""
    if not x.pinned and alive(x) and x.ledger is not None:
        x.pinned = True
        exact = float(x.value) if isinstance(x.value, float) else x.value
        x.ledger.guard(x.tensor, exact, what)
    return x.value


@contextlib.contextmanager
def unseen() -> Iterator[None]:
    """Read tensors without being recorded.

    No torch functions either: under a mode even ``TensorBase.item`` looks up ``torch.Tensor.item``, which is replaced.
    """
    with torch._C.DisableTorchFunction(), _disable_current_modes():
        yield


def same(t: Tensor, value: object) -> bool:
    """Whether a tensor of the recording holds a number (read without being recorded)."""
    with unseen():
        held = BASE.item(t.detach())
    if isinstance(value, (float, complex)):
        near = abs(held - value) <= 1e-12 * abs(value)
        return bool(near or held == value or (held != held and value != value))
    return bool(held == value)


def apply(rule: Rule, *operands: object) -> Any:
    """An operator on numbers and constants: a number that is linked, or a plain one whose operands are guarded."""
    given = [x if alive(x) else plain(x) for x in operands]
    found = [x for x in given if isinstance(x, Linked)]
    values = [plain(x) for x in given]
    try:
        value = rule.value(*values)
    except Exception:
        for x in found:
            pin(x, f"an operand of {rule.name}, which raises")
        raise
    if not found:
        return value
    linked = _linked(rule, value, given, found)
    if linked is not None:
        return linked
    for x in found:
        pin(x, f"an operand of {rule.name}")
    return value


def _linked(rule: Rule, value: object, given: list[Any], found: list[Linked]) -> Any:
    """The number of a result that its tensor form gives too; None if there is none."""
    ledger, kind = found[0].ledger, kind_of(value)
    if ledger is None or kind is None or any(x.ledger is not ledger for x in found):
        return None
    form = rule.form(kind, *(Tensor if isinstance(x, Linked) else x for x in given))
    if form is None:
        return None
    try:
        out = ledger.link(form.link, *given)
        checks = [ledger.link(c, *given) for c in form.conditions]
    except (OverflowError, RuntimeError, TypeError):  # a constant that no tensor holds
        return None
    if out is None:
        return value
    if not same(out, value) or not all(c is not None and same(c, True) for c in checks):
        return None
    for c in checks:
        if c is not None:
            ledger.guard(c, True, f"whether {rule.name} is defined")
    return number(value, out, ledger)


def decide(f: Callable[..., Tensor], outcome: bool, what: str, *operands: object) -> None:
    """Guard the outcome of a question; its tensor form must give it, else the exact values are guarded."""
    found = [x for x in operands if alive(x)]
    if all(x.pinned for x in found):
        return
    ledger = found[0].ledger
    if ledger is not None and all(x.ledger is ledger for x in found):
        with contextlib.suppress(OverflowError, RuntimeError, TypeError):
            t = ledger.link(f, *(x if alive(x) else plain(x) for x in operands))
            if t is None:
                return
            if same(t, outcome):
                ledger.guard(t, outcome, what)
                return
    for x in found:
        pin(x, what)


def test(name: str, question: Callable[[Any], Any], x: object) -> Any:
    """``isfinite`` and its kin: the plain answer, guarded."""
    outcome = question(plain(x))
    decide(TESTS[name], bool(outcome), "a branch", x)
    return outcome


def constant(x: object) -> bool:
    """Whether ``x`` is a plain number: of Python, or a scalar of NumPy."""
    if isinstance(x, Linked):
        return False
    return isinstance(x, (int, float, complex)) or (type(x).__module__ == "numpy" and isinstance(x, numbers.Number))


def compare(question: Callable[[Any, Any], Any], a: Linked, b: object) -> Any:
    """A comparison with a number: Python's answer, guarded."""
    values = plain(a), plain(b)
    outcome = question(*values)
    if alive(a) or alive(b):
        kinds = (complex, torch.complex128), (float, torch.float64), (int, torch.int64)
        kind = next((d for k, d in kinds if any(isinstance(v, k) for v in values)), torch.float64)
        if kind == torch.int64 and any(abs(v) >= 2**63 for v in values):
            kind = torch.float64
        decide(lambda x, y: question(*together(x, y, kind)), bool(outcome), "a branch", a, b)
    return outcome


def read_back(text: str) -> None:
    """A text becomes a number again (``float(f"{loss:.3f}")``): guard the numbers that it can be a text of."""
    try:
        d = decimal.Decimal(text.strip())
    except decimal.InvalidOperation:
        return
    step = 0.51 * 10.0 ** int(d.as_tuple().exponent) if d.is_finite() else 0.0
    for ref in list(living.values()):
        x = ref()
        if x is None or not x.shown or not isinstance(x.value, (int, float)):
            continue
        if abs(x.value - float(d)) <= step or (x.value != x.value and d.is_nan()) or x.value == float(d):
            pin(x, "a text that is read as a number")
