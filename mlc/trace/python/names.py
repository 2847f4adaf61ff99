"""What a piece of code names: globals with the attributes after them, what it reads, and what it only grows.

Read from the bytecode, once per code object.  Nothing here knows values; :mod:`mlc.trace.python.inputs` follows the
names to the objects that stand there at a call.  Growing (``x.n += 1``, ``x.log.append(v)``) and owning (``x.table[k] =
v``) do not let the old value reach anything else, which is recognised by positions: the load starts where the whole
statement starts.
"""

from __future__ import annotations

import dis
import sys
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from types import CodeType

__all__ = ["Names", "names"]

_GROWING = frozenset({"append", "appendleft", "extend", "add"})
_DYNAMIC = frozenset({"__dict__", "vars", "__getstate__", "globals", "locals", "eval", "exec", "dumps"})
_ENTRIES = ("STORE_SUBSCR", "DELETE_SUBSCR", "STORE_SLICE")
_INPLACE = (13, 23)  # += and -=: what they add does not depend on what they add to


@dataclass(frozen=True)
class Names:
    """Names in one code object (nested functions are code objects of their own).

    Attributes:
        chains: A global name and the attributes that follow it at once; ``import x`` gives ``("import x", ...)``.
        loads: Attributes that are loaded, and constant strings that could be names of some (``getattr``).
        reads: Variables and attributes whose value goes somewhere.
        called: Attributes that are loaded to be called at once: no place of a number or container is meant.
        grown: Those that ``+=`` or ``-=`` changes.
        stored: Attributes and globals that are set.
        edited: Variables and attributes in statements that set or delete an entry or a slice.
        all: Whether it may read every attribute of an object (``vars``, ``__dict__``).
    """

    chains: tuple[tuple[str, ...], ...]
    loads: frozenset[str]
    reads: frozenset[str]
    called: frozenset[str]
    grown: frozenset[str]
    stored: frozenset[str]
    edited: frozenset[str]
    all: bool


def _start(i: dis.Instruction) -> tuple[int, int] | None:
    p = i.positions
    return None if p is None or p.lineno is None or p.col_offset is None else (p.lineno, p.col_offset)


def _variables(i: dis.Instruction) -> tuple[str, ...]:
    """Names of variables that an instruction loads."""
    if i.opname.startswith(
        ("LOAD_FAST", "LOAD_GLOBAL", "LOAD_NAME", "LOAD_DEREF", "LOAD_CLASSDEREF", "LOAD_FROM_DICT")
    ):
        return i.argval if isinstance(i.argval, tuple) else (i.argval,)
    return ()


def _is_attribute(i: dis.Instruction) -> bool:
    return i.opname in ("LOAD_ATTR", "LOAD_METHOD", "LOAD_SUPER_ATTR")


def _is_method(i: dis.Instruction) -> bool:
    return i.opname == "LOAD_METHOD" or (
        i.opname in ("LOAD_ATTR", "LOAD_SUPER_ATTR") and sys.version_info >= (3, 12) and bool((i.arg or 0) & 1)
    )


def _owners(code: list[dis.Instruction]) -> tuple[set[tuple[int, int]], set[tuple[int, int]]]:
    """Starts of statements whose first name is only an owner, and of those that grow a value."""
    owners, grown = set(), set()
    methods: dict[tuple[int, int], str] = {}
    calls = Counter(_start(i) for i in code if i.opname == "CALL")
    for i, after in zip(code, [*code[1:], None], strict=True):
        at = _start(i)
        if at is None:
            continue
        if i.opname == "BINARY_OP" and i.arg in _INPLACE:
            grown.add(at)
        elif i.opname in ("STORE_SUBSCR", "DELETE_SUBSCR", "STORE_ATTR", "DELETE_ATTR"):
            owners.add(at)
        elif _is_attribute(i):
            methods[at] = i.argval
        elif i.opname == "CALL" and methods.get(at) in _GROWING and after is not None and after.opname == "POP_TOP":
            owners |= {at} if calls[at] == 1 else set()  # x.setdefault(k, []).append(v) reads x
    other = {_start(i) for i in code if i.opname == "BINARY_OP" and (i.arg or 0) >= 13 and i.arg not in _INPLACE}
    return owners - other - grown, grown


def _chains(code: list[dis.Instruction]) -> Iterator[tuple[str, ...]]:
    open_: tuple[str, ...] = ()
    for i in code:
        if open_ and (_is_attribute(i) or i.opname == "IMPORT_FROM"):
            if i.opname == "IMPORT_FROM":
                yield (*open_, i.argval)
            else:
                open_ = (*open_, i.argval)
            continue
        if open_ and (i.opname in ("COPY", "PUSH_NULL") or (i.opname.startswith("STORE") and "import" in open_[0])):
            continue
        if open_:
            yield open_
            open_ = ()
        if i.opname in ("LOAD_GLOBAL", "LOAD_NAME", "STORE_GLOBAL"):
            open_ = (i.argval,)
            if i.opname == "STORE_GLOBAL":
                yield open_
                open_ = ()
        elif i.opname == "IMPORT_NAME":
            open_ = (f"import {i.argval}",)
    if open_:
        yield open_


@cache
def names(code: CodeType) -> Names:
    """Names in ``code``."""
    steps = [i for i in dis.get_instructions(code) if i.opname not in ("CACHE", "PRECALL", "EXTENDED_ARG")]
    owners, grown = _owners(steps)
    reads: set[str] = set()
    called: set[str] = set()
    grows: set[str] = set()
    loads: set[str] = set()
    edits: set[str] = set()
    entries = {_start(i) for i in steps if i.opname in _ENTRIES}
    for i in steps:
        found = (i.argval,) if _is_attribute(i) else _variables(i)
        if _is_attribute(i):
            loads.add(i.argval)
        at = _start(i)
        if at in entries:
            edits.update(found)
        if at in grown:
            grows.update(found)
        elif at not in owners or at is None:
            (called if _is_method(i) else reads).update(found)
    text = {c for c in code.co_consts if isinstance(c, str) and c.isidentifier()}
    chains = {*_chains(steps)}
    if "globals" in code.co_names:
        chains |= {(c,) for c in text}
    stored = {i.argval for i in steps if i.opname in ("STORE_ATTR", "STORE_GLOBAL", "STORE_DEREF", "DELETE_ATTR")}
    return Names(
        tuple(sorted(chains)), frozenset(loads | text), frozenset(reads | text), frozenset(called), frozenset(grows),
        frozenset(stored), frozenset(edits),
        not _DYNAMIC.isdisjoint(code.co_names),
    )  # fmt: skip
