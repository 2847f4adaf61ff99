"""What becomes of numbers where they leave a recording: written plain, and plain once it is over.

:func:`observed` is a plain copy of a tree for what writes it to a file.  :func:`retire` ends a recording: each number
forgets its tensor and answers by value from then on, and is replaced by the plain number in the user's objects.
"""

from __future__ import annotations

import collections
import copy
import gc
import types
from collections.abc import Callable, Iterator
from typing import Any

from mlc.trace.numbers.links import Ledger, Linked, living

__all__ = ["observed", "retire", "settle"]


def observed(x: object) -> Any:
    """``x`` with plain numbers in its lists, tuples, sets and dictionaries; the same object where there are none."""
    return _copied(x, {})


def _copied(x: object, memo: dict[int, Any]) -> Any:
    if isinstance(x, Linked):
        return x.value
    if not isinstance(x, (list, tuple, dict, set, frozenset, collections.deque)):
        return x
    if id(x) in memo:
        return memo[id(x)]
    memo[id(x)] = x  # a container in itself
    if isinstance(x, dict):
        pairs = [(_copied(k, memo), _copied(v, memo)) for k, v in x.items()]
        if all(k is a and v is b for (k, v), (a, b) in zip(pairs, x.items(), strict=True)):
            return x
        new = copy.copy(x)
        new.clear()
        new.update(pairs)
    else:
        items = [_copied(y, memo) for y in x]
        if all(a is b for a, b in zip(items, x, strict=True)):
            return x
        new = _rebuilt(x, items)
    memo[id(x)] = new
    return new


def _rebuilt(x: Any, items: list[Any]) -> Any:
    if hasattr(x, "_fields"):
        return type(x)(*items)
    if isinstance(x, collections.deque):
        return type(x)(items, x.maxlen)
    return type(x)(items)


def settle(x: Any) -> Any:
    """``x`` with plain numbers instead of numbers of a recording, in place where that can be: the same objects.

    Goes through containers of Python, NumPy arrays of objects, and attributes of objects.
    """
    return _settled(x, {})


_LEAVES = (str, bytes, int, float, complex, type(None), type, types.ModuleType, types.CodeType)


def _settled(x: object, memo: dict[int, Any]) -> Any:
    if isinstance(x, Linked):
        return x.value
    if isinstance(x, _LEAVES):
        return x
    if id(x) in memo:
        return memo[id(x)]
    memo[id(x)] = x
    if isinstance(x, (tuple, frozenset)):
        items = [_settled(y, memo) for y in x]
        if any(a is not b for a, b in zip(items, x, strict=True)):
            memo[id(x)] = _rebuilt(x, items)
        return memo[id(x)]
    _replace(x, lambda y: _settled(y, memo))
    return x


def _replace(x: Any, f: Callable[[Any], Any]) -> None:
    """Put ``f`` of each thing that a mutable object holds in its place."""
    if isinstance(x, dict):
        if any(f(k) is not k for k in x):
            pairs = [(f(k), v) for k, v in x.items()]
            x.clear()
            x.update(pairs)
        for k, v in list(x.items()):
            if (new := f(v)) is not v:
                x[k] = new
    elif isinstance(x, (list, collections.deque)):
        for i, v in enumerate(list(x)):
            if (new := f(v)) is not v:
                x[i] = new
    elif isinstance(x, set):
        changed = [(v, new) for v in x if (new := f(v)) is not v]
        for v, new in changed:
            x.discard(v)
            x.add(new)
    elif isinstance(x, types.CellType):
        try:
            old = x.cell_contents
        except ValueError:  # not yet filled
            return
        if (new := f(old)) is not old:
            x.cell_contents = new
    elif isinstance(x, types.FunctionType):
        for cell in x.__closure__ or ():
            _replace(cell, f)
    elif type(x).__name__ == "ndarray" and getattr(x.dtype, "hasobject", False):
        flat = x.reshape(-1)
        for i, v in enumerate(flat.tolist()):
            flat[i] = f(v)
    for owner, name, v in _attributes(x):
        if (new := f(v)) is not v:
            owner(name, new)


def _attributes(x: object) -> Iterator[tuple[Callable[[str, Any], None], str, Any]]:
    own = getattr(x, "__dict__", None)
    if type(own) is dict:
        for k, v in list(own.items()):
            yield own.__setitem__, k, v
    for cls in type(x).__mro__:
        names = cls.__dict__.get("__slots__", ())
        for name in (names,) if isinstance(names, str) else names:
            member = cls.__dict__.get(name)
            if isinstance(member, types.MemberDescriptorType) and hasattr(x, name):
                yield _slot(member, x), name, member.__get__(x)


def _slot(member: types.MemberDescriptorType, x: object) -> Callable[[str, Any], None]:
    return lambda _, new: member.__set__(x, new)


def retire(ledger: Ledger) -> int:
    """End the recording of a ledger: its numbers become plain wherever they are kept; how many could not be replaced.

    A number that stays (a local of a generator that waits) answers by value as long as it lives.
    """
    ended = [n for ref in list(living.values()) if (n := ref()) is not None and n.ledger is ledger]
    for n in ended:
        n.end()
    refs = [living[id(n)] for n in ended]
    ended.clear()
    n = None
    if any(ref() is not None for ref in refs):
        _sweep()
    return sum(ref() is not None for ref in refs)


def _holds(x: Any) -> bool:
    kind = type(x)  # not isinstance: the heap has objects that act when their __class__ is asked for
    return issubclass(kind, Linked) or (issubclass(kind, (tuple, frozenset)) and any(_holds(y) for y in x))


def _sweep() -> None:
    """Replace numbers in all objects that hold one: what no walk from the user's names would reach."""
    skipped = (Linked, tuple, frozenset, types.FrameType, types.GeneratorType, types.CoroutineType, type)
    holders = [
        x for x in gc.get_objects() if not issubclass(type(x), skipped) and any(_holds(y) for y in gc.get_referents(x))
    ]
    for x in holders:
        _replace(x, lambda y: settle(y) if _holds(y) else y)
