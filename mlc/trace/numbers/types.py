"""``float(loss)``, ``int(count)``, ``max`` and ``min`` of user code, so that they keep the link of a number.

C code decides what ``float(x)`` is: a real float, which knows nothing of where it came from.  While recording, the
names are therefore given to the user's modules in another meaning: :func:`conversions` puts a stand-in for the class
into the globals of each module that has no such name itself.  Called on a tensor or a number it gives a number; on
anything else, what the class gives.

What a stand-in cannot do is be the class: ``type(1.0) is float`` would be false in those modules.  Modules whose
functions compare the name by ``is`` are left alone (``float(loss)`` is guarded by its exact value there).  Everything
else goes through: ``isinstance``, ``issubclass``, ``==``, tables keyed by type, dtypes of NumPy and torch, pickles,
``map(float, ...)``, ``defaultdict(float)`` (which may live on after the recording: a stand-in is the class then).
"""

from __future__ import annotations

import contextlib
import copyreg
import dis
import functools
import types
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import numpy
import torch
from torch import Tensor

from mlc.trace.numbers.calls import answer
from mlc.trace.numbers.links import Linked, StandIn, alive, apply, constant, plain, read_back
from mlc.trace.numbers.rules import UNARY, Form, Rule, cast

__all__ = ["Conversion", "conversions", "linked_max", "linked_min"]


class Conversion(StandIn):
    """The class of stand-ins for ``float`` and ``int``."""

    convert: Callable[[Any], Any]

    def __call__(cls, *args: object, **kwargs: object) -> Any:
        """What the class gives; a number for a number or a recorded tensor."""
        real = cls.stands_for
        if "stands_for" not in vars(cls):  # a class that the user derives from it
            return super().__call__(*args, **kwargs)
        if len(args) == 1 and not kwargs:
            x = args[0]
            if type(x) is Tensor and x.numel() == 1 and not x.is_complex():
                x = x.item()  # a number if the tensor is recorded
            if alive(x):
                return cls.convert(x)
            if isinstance(x, str):
                read_back(x)
            args = (plain(x),)
        return real(*args, **kwargs)

    def __instancecheck__(cls, x: object) -> bool:
        return isinstance(x, cls.stands_for) if "stands_for" in vars(cls) else super().__instancecheck__(x)

    def __subclasscheck__(cls, other: Any) -> bool:
        return issubclass(other, cls.stands_for) if "stands_for" in vars(cls) else super().__subclasscheck__(other)

    def __eq__(cls, other: object) -> bool:
        return cls is other or ("stands_for" in vars(cls) and other == cls.stands_for)

    def __hash__(cls) -> int:
        return hash(cls.stands_for) if "stands_for" in vars(cls) else super().__hash__()

    def __repr__(cls) -> str:
        return repr(cls.stands_for) if "stands_for" in vars(cls) else super().__repr__()

    @classmethod
    def __torch_function__(mcs, func: object, types_: object, args: object = (), kwargs: object = None) -> Any:
        return answer(func, types_, args, kwargs or {})


def _as_float(x: Linked) -> Any:
    if type(x.value) is float:
        return x
    return apply(Rule("float", float, lambda kind, a: Form(lambda t: cast(t, torch.float64).clone())), x)


def _as_int(x: Linked) -> Any:
    if type(x.value) is int:
        return x
    return apply(Rule("int", int, UNARY["trunc"].form), x)


def _stand_in(real: type, convert: Callable[[Any], Any], name: str) -> Conversion:
    members: dict[str, Any] = {
        "stands_for": real,
        "convert": staticmethod(convert),
        "__module__": "builtins",
        "dtype": numpy.dtype(real),  # what numpy.dtype() asks a class for
    }
    return Conversion(name, (real,), members)


_FLOAT, _INT = _stand_in(float, _as_float, "float"), _stand_in(int, _as_int, "int")
copyreg.pickle(Conversion, lambda cls: (type, (cls.stands_for(),)))  # type: ignore[arg-type, return-value]


def _picking(builtin: Callable[..., Any], better: Callable[[Any, Any], bool], greater: bool) -> Callable[..., Any]:
    """``max`` or ``min`` that keeps the link where all are numbers of one type: the first of the best, as Python's."""

    def step(kind: torch.dtype, a: object, b: object) -> Form:
        def link(x: object, y: object) -> Tensor:
            x, y = (v if isinstance(v, Tensor) else torch.tensor(v, dtype=kind) for v in (x, y))
            y = y.to(x.device) if y.device != x.device else y
            return torch.where(y > x if greater else y < x, y, x)

        return Form(link)

    rule = Rule(builtin.__name__, lambda a, b: b if better(b, a) else a, step)

    def pick(*args: Any, **kwargs: object) -> Any:
        items: list[Any] = []
        if not kwargs and (len(args) > 1 or isinstance(args[0], (list, tuple))):
            items = list(args if len(args) > 1 else args[0])
        if not any(alive(x) for x in items) or not all(isinstance(x, Linked) or constant(x) for x in items):
            return builtin(*args, **kwargs)
        if len({type(plain(x)) for x in items}) > 1:
            return builtin(*args, **kwargs)  # the winner's type depends on the values: its comparisons are guarded
        best = items[0]
        for x in items[1:]:
            best = apply(rule, best, x)
        return best

    pick.__name__ = pick.__qualname__ = builtin.__name__
    pick.__module__ = "builtins"
    return pick


linked_max = _picking(max, lambda b, a: b > a, greater=True)
linked_min = _picking(min, lambda b, a: b < a, greater=False)


@contextlib.contextmanager
def conversions(modules: Iterable[dict[str, Any]]) -> Iterator[None]:
    """Let ``float``, ``int``, ``max`` and ``min`` keep links in modules of the user (given by their globals).

    A module that has a name of its own keeps it, and so does one that compares a class by ``is``.
    """
    names = {"float": _FLOAT, "int": _INT, "max": linked_max, "min": linked_min}
    put: list[tuple[dict[str, Any], str, Any]] = []
    try:
        for scope in modules:
            identity = _compared_by_identity(scope)
            for name, value in names.items():
                if name not in scope and name not in identity:
                    scope[name] = value
                    put.append((scope, name, value))
        yield
    finally:
        for scope, name, value in put:
            if scope.get(name) is value:
                del scope[name]


def _compared_by_identity(scope: dict[str, Any]) -> set[str]:
    """Names among ours that functions of a module compare by ``is``."""
    return set[str]().union(*(_compared_in(code) for code in _codes(scope)))


@functools.cache
def _compared_in(code: types.CodeType) -> frozenset[str]:
    out: set[str] = set()
    steps = [i for i in dis.get_instructions(code) if i.opname not in ("CACHE", "EXTENDED_ARG")]
    for i, step in enumerate(steps):
        if step.opname != "IS_OP":
            continue
        near = steps[max(0, i - 5) : i]  # `type(x) is float` and `float is type(x)`, but not `float(x) is y`
        out |= {str(s.argval) for s in near if s.opname == "LOAD_GLOBAL" and not (s.arg or 0) & 1}
    return frozenset(out)


def _codes(scope: dict[str, Any]) -> Iterator[types.CodeType]:
    todo: list[Any] = [v for v in scope.values() if getattr(v, "__module__", None) == scope.get("__name__")]
    seen: set[int] = set()
    while todo:
        x = todo.pop()
        if id(x) in seen:
            continue
        seen.add(id(x))
        if isinstance(x, types.CodeType):
            yield x
            todo += [c for c in x.co_consts if isinstance(c, types.CodeType)]
        elif isinstance(x, types.FunctionType):
            todo += [x.__code__, getattr(x, "__wrapped__", None)]
            todo += [c.cell_contents for c in x.__closure__ or () if _is_function(c)]
        elif isinstance(x, (staticmethod, classmethod, types.MethodType)):
            todo.append(x.__func__)
        elif isinstance(x, property):
            todo += [x.fget, x.fset]
        elif isinstance(x, type):
            todo += list(vars(x).values())


def _is_function(cell: Any) -> bool:
    try:
        return isinstance(cell.cell_contents, types.FunctionType)
    except ValueError:  # not yet filled
        return False
