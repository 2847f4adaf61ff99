"""What a call left different in the user's objects, in terms of the places where later calls find them.

The world before the call is compared with the objects now. Each difference becomes a :class:`Change`; places that
change without being read (:mod:`mlc.trace.python.uses`) are named as such, so that the next call need not find in them
what this one found.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from types import CellType
from typing import Any

import torch
from torch import nn

from mlc.trace.python.found import Found
from mlc.trace.python.places import Path, Roots
from mlc.trace.python.state import Change, New
from mlc.trace.python.trees import Trees
from mlc.trace.python.uses import Uses
from mlc.trace.python.view import MISSING, View, digest, fields_of
from mlc.trace.python.world import World, body_differs, differs

__all__ = ["Changes", "changes", "place"]

_NUMBERS = (int, float)
_PRIVATE = {"__dict__", "__weakref__", "__doc__", "__module__", "_abc_impl", "__annotations__", "_abc_cache"}


@dataclass
class Changes:
    """Result of :func:`changes`.

    Attributes:
        all: What to do at later calls, in order.
        ignored: Paths whose content (and all below) need not be equal for a program to be used again.
        counters: Places, as text, that the call changes and reads: the next call will be recorded again.
        odd: Places, as text, that hold something that cannot be built again: the program cannot be used again.
    """

    all: list[Change] = field(default_factory=list)
    ignored: set[Path] = field(default_factory=set)
    counters: list[str] = field(default_factory=list)
    odd: list[str] = field(default_factory=list)


def place(path: Path, parameters: tuple[str, ...] = ()) -> str:
    """A path as Python would write it."""
    head, rest = path[:1], path[1:]
    if head == ("args",):
        at = path[1]
        text = parameters[at] if isinstance(at, int) and at < len(parameters) else str(at)
        rest = path[2:]
    elif head == ("globals",):
        text, rest = ".".join(map(str, path[1:3])), path[3:]
    elif len(path) > 2 and path[1] == "closure":
        text, rest = str(path[2]), path[3:]
    else:
        text = str(path[0])
    for part in rest:
        dotted = isinstance(part, str) and part.startswith(".")
        text += str(part) if dotted else f"[{part!r}]"
    return text


class _Comparison:
    def __init__(
        self, world: World, roots: Roots, found: Found, parameters: tuple[str, ...], value: Callable[[Any], Any]
    ) -> None:
        self.world = world
        self.roots = roots
        self.parameters = parameters
        self.uses = Uses(found, roots, parameters)
        self.trees = Trees(world, roots, value)
        self.out = Changes()
        self._special: set[int] = set()  # containers that an optimizer's own entries speak for

    def run(self) -> Changes:
        for o in self.world.roots.optimizers.values():
            self._optimizer(o)
        for x, old in self.world.bodies.values():
            if id(x) not in self._special and id(x) not in self.world.roots.drawing and body_differs(x, old):
                self._body(x, old)
        for x, attrs in self.world.fields.values():
            if id(x) not in self.world.roots.drawing:
                self._attributes(x, attrs)
        for path, owner, name, old in self.world.bindings.values():
            self._binding(path, owner, name, old)
        for a, known, _ in self.world.arrays.values():
            if digest(a) != known:
                self._add(a, "content", None, a.copy())
        for facts in self.world.tensors.values():
            self._tensor(facts)
        return self.out

    def _path(self, x: object) -> Path | None:
        return self.roots.paths.get(id(x))

    def _add(
        self, owner: object, kind: str, key: object, value: object, *, tree: bool = True, path: Path | None = None
    ) -> Change:
        odd = len(self.trees.odd)
        made = self.trees.of(value) if tree and kind != "content" else value
        change = Change(owner, self._path(owner) if path is None else path, kind, key, made)
        self.out.all.append(change)
        if len(self.trees.odd) > odd:
            last = () if key is None else (f".{key}" if kind == "attr" else key,)
            at = (*(change.path or ("?",)), *last)
            self.out.odd.append(place(at, self.parameters))
        return change

    # ---- places and whether they were read

    def _ignore(self, path: Path) -> bool:
        """Leave a place out of the key, unless what is known under it is also known elsewhere."""
        n = len(path)
        for first, others in self.uses.aliases.items():
            if first[:n] == path and any(p[:n] != path for p in others):
                return False
        self.out.ignored.add(path)
        return True

    def _set(
        self,
        owner: object,
        how: str,
        key: object,
        old: object,
        new: object,
        at: Path | None,
        use: str,
        path: Path | None = None,
    ) -> None:
        """An attribute, entry or binding (``at``) that holds something else now; ``path``: of its owner."""
        number = type(new) in _NUMBERS and (type(old) in _NUMBERS or old is MISSING)
        built = new is not MISSING and isinstance(self.trees.of(new), New)
        if use == "grown" and number:
            base = 0 if old is MISSING else old
            self._add(owner, "add", (how, key), (self.trees.of(new), base), tree=False, path=path)
        elif new is MISSING:
            self._add(owner, "delete", (how, key), None, path=path)
        else:
            self._add(owner, how, key, new, path=path)
        if at is None:
            return
        free = (use == "grown" and number) or (use == "written" and not (old is MISSING and built))
        if not (free and self._ignore(at)) and type(new) in (int, float, str, bool) and old is not MISSING:
            self.out.counters.append(place(at, self.parameters))

    # ---- kinds of places

    def _body(self, x: Any, old: Any) -> None:
        path = self._path(x)
        use = self.uses.of(path, None, x)
        if isinstance(x, list) and self.uses.edited(path, x):
            use = "read"
        if isinstance(x, dict) and not _in_order(x, old):
            self._add(x, "content", None, [(self.trees.of(k), self.trees.of(v)) for k, v in x.items()])
            return
        if isinstance(x, dict):
            for k in [*old, *(k for k in x if k not in old)]:
                was, now = old.get(k, MISSING), x.get(k, MISSING) if k in x else MISSING
                if differs(now, was):
                    self._set(x, "item", k, was, now, path, use)
            return
        new = self._suffix(x, old)
        if new is not None:
            self._add(x, "append", None, list(new))
        elif isinstance(x, list) and len(x) == len(old):
            for i, (now, was) in enumerate(zip(x, old, strict=True)):
                if differs(now, was):
                    self._set(x, "item", i, was, now, path, use)
            return
        else:
            body = list(x) if isinstance(x, bytearray) else [self.trees.of(v) for v in x]
            self._add(x, "content", None, body)
        if path is not None and use != "read" and new is not None:
            self._ignore(path)

    def _suffix(self, x: Any, old: Any) -> list[Any] | None:
        """What was only added at the end, or to a set."""
        if isinstance(x, set):
            return [v for v in x if v not in old] if x >= old else None
        if isinstance(x, bytearray) or (len(x) < len(old) and not isinstance(x, deque)):
            return None
        items, before = list(x), list(old)
        if isinstance(x, deque) and x.maxlen is not None and len(items) == x.maxlen:
            for gone in range(len(before) + 1):
                kept = before[gone:]
                if all(a is b for a, b in zip(items, kept, strict=False)) and len(kept) <= len(items):
                    return items[len(kept) :]
            return None
        same = not any(differs(a, b) for a, b in zip(items, before, strict=False))
        return items[len(before) :] if same and len(items) > len(before) else None

    def _attributes(self, x: object, old: dict[str, Any]) -> None:
        now = dict(x.__dict__) if isinstance(x, type) else fields_of(x)
        if type(x) is not self.world.classes[id(x)]:
            self.out.odd.append(place((*(self._path(x) or ("?",)), ".__class__"), self.parameters))
        skip = {"param_groups", "state"} if isinstance(x, torch.optim.Optimizer) else set()
        path = self._path(x)
        for name in [*old, *(n for n in now if n not in old)]:
            a, b = now.get(name, MISSING), old.get(name, MISSING)
            if name in skip or name in _PRIVATE or not differs(a, b):
                continue
            at = None if path is None else (*path, "." + name)
            flag = isinstance(x, nn.Module) and name == "training"
            self._set(x, "attr", name, b, a, at, "read" if flag else self.uses.of(path, name, x, a, b))

    def _binding(self, path: Path, owner: object, name: str, old: object) -> None:
        now = View().bound(owner, name)
        if isinstance(owner, type) or not differs(now, old):
            return
        use = self.uses.of(path, name, owner, now, old)
        if isinstance(owner, CellType):
            self._set(owner, "cell", None, old, now, path, use, path)
        else:
            self._set(owner, "item", name, old, now, path, use, path[:2])

    def _optimizer(self, o: object) -> None:
        before, path = self.world.attrs(o), self._path(o)
        groups = before.get("param_groups", [])
        for i, g in enumerate(_entries(o, "param_groups", [])):
            old = self.world.body(groups)[i] if i < len(self.world.body(groups)) else None
            if old is None or id(g) in self._special:
                continue
            self._special |= {id(g), id(old)}
            was = self.world.body(old)
            for k, v in g.items():
                if differs(v, was.get(k, MISSING)) and not (
                    k == "params" and _same_items(v, was.get(k, ()), self.world)
                ):
                    self.out.all.append(Change(o, path, "group", (i, k), self.trees.of(v)))
        state, now = before.get("state", {}), _entries(o, "state", {})
        was = self.world.body(state)
        self._special |= {id(state), id(now)}
        for p in [*now, *(p for p in was if p not in now)]:
            self._state(o, path, p, now.get(p, {}) if p in now else {}, was.get(p, {}) if p in was else {})

    def _state(self, o: object, path: Path | None, p: object, now: object, was: object) -> None:
        if not isinstance(now, dict) or id(now) in self._special:
            return
        self._special |= {id(now), id(was)}
        old = self.world.body(was)
        where = self.roots.paths.get(id(p))
        key = p if id(p) in self.world.tensors else self.trees.of(p)
        for k in [*now, *(k for k in old if k not in now)]:
            if k not in now:
                self.out.all.append(Change(o, path, "delete", ("state", key, k), None, where))
            elif differs(now[k], old.get(k, MISSING)):
                self.out.all.append(Change(o, path, "state", (key, k), self.trees.of(now[k]), where))

    def _tensor(self, facts: Any) -> None:
        t = facts.t
        grad = facts.leaf and t.is_leaf and t.grad is not facts.grad
        early = grad and t.grad is not None and t.grad.dtype != t.dtype  # it was set before the type changed
        if early:
            self._add(t, "grad", None, t.grad)
        if facts.moved():
            self._add(t, "data", None, self.trees.fresh(t), tree=False)
        if facts.leaf and t.is_leaf and t.requires_grad != facts.requires_grad:
            self._add(t, "requires_grad", None, t.requires_grad)
        if grad and not early:
            self._add(t, "grad", None, t.grad)
        if facts.hooked():
            self.out.odd.append(place((*(self._path(t) or ("?",)), ".hooks"), self.parameters))


def _in_order(now: Any, old: Any) -> bool:
    """Whether a dict is the old one without some entries and with others at the end."""
    kept = [k for k in old if k in now]
    return all(a is b or a == b for a, b in zip(kept, now, strict=False))


def _entries(o: Any, name: str, default: Any) -> Any:
    return fields_of(o).get(name, default)


def _same_items(now: Any, old: Any, world: World) -> bool:
    before = world.body(old)
    return len(now) == len(before) and all(a is b for a, b in zip(now, before, strict=True))


def changes(
    world: World,
    roots: Roots,
    found: Found,
    parameters: tuple[str, ...] = (),
    value: Callable[[Any], Any] = lambda x: x,
) -> Changes:
    """Compare the user's objects with what they were.

    Args:
        world: Before the call.
        roots: ``walk(fn, args, kwargs, found, world)``: the paths by which later calls find things.
        found: What ran.
        parameters: Names of the positional parameters of the function.
        value: Given every tensor that the call made and every number it left; what it returns stands in the trees.
    """
    return _Comparison(world, roots, found, parameters, value).run()


def without(key: list[Any], ignored: set[Path]) -> Iterator[Any]:
    """Entries of a key that are not at or below an ignored path."""
    for entry in key:
        path = entry[0]
        if not any(path[:i] in ignored for i in range(1, len(path) + 1)):
            yield entry
