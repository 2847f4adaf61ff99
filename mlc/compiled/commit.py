"""Bringing the user's objects to the state in which their loop would have left them, once a call has succeeded.

Everything is built before anything is changed: a failure on the way leaves the user's objects as they were.
"""

from __future__ import annotations

import functools
import types
from collections import deque
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from mlc.trace.capture import Effect, Ref
from mlc.trace.python.places import Path, Roots
from mlc.trace.python.state import Change, Fresh, Known, New
from mlc.trace.python.trees import blank
from mlc.trace.python.view import MISSING, fields_of
from mlc.trace.python.world import bind, dict_kind, refill, set_field

__all__ = ["Builder", "commit", "owner_of", "storages"]


def owner_of(owner: object, path: Path | None, roots: Roots) -> Any:
    """What now stands where ``owner`` stood."""
    if path is None:
        return owner
    for table in (roots.at, roots.optimizers, roots.schedulers, roots.modules, roots.places):
        found = table.get(path)
        if found is not None:
            return found
    return owner


def storages(values: object) -> set[int]:
    """Identities of the memories behind tensors in nested lists."""
    if isinstance(values, Tensor):
        return {values.untyped_storage()._cdata}
    out: set[int] = set()
    if isinstance(values, (list, tuple)):
        for v in values:
            out |= storages(v)
    return out


class Builder:
    """Builds one call's values from trees: one object for one node.

    Args:
        results: Results of the program.
        roots: The walk of this call.
        owned: Memories that are somebody's already; grows.
    """

    def __init__(self, results: Sequence[Any], roots: Roots, owned: set[int]) -> None:
        self._results = results
        self._roots = roots
        self._owned = owned
        self._memo: dict[int, Any] = {}

    def of(self, x: Any) -> Any:
        """The value of a tree."""
        if isinstance(x, Ref):
            v = self._results[x.index]
            return v.item() if x.number else v
        if isinstance(x, Known):
            return owner_of(x.object, x.path, self._roots)
        if isinstance(x, (Fresh, New)):
            if id(x) not in self._memo:
                self._memo[id(x)] = self._fresh(x) if isinstance(x, Fresh) else self._new(x)
            return self._memo[id(x)]
        if isinstance(x, dict):
            return {self.of(k): self.of(v) for k, v in x.items()}
        if type(x) in (list, tuple):
            return type(x)(self.of(v) for v in x)
        return x

    def _fresh(self, x: Fresh) -> Tensor:
        if x.view is not None:
            known, shape, stride, offset = x.view
            base: Tensor = self.of(known)
            t = base.detach().as_strided(shape, stride, offset)
        else:
            t = own(self.of(x.value).detach().to(x.dtype), self._owned)
        if x.parameter:
            t = nn.Parameter(t, requires_grad=x.requires_grad)
        elif x.requires_grad:
            t = t.detach().requires_grad_()
        self._memo[id(x)] = t
        if x.grad is not None:
            t.grad = self.of(x.grad)
        return t

    def _new(self, x: New) -> Any:
        body = x.body or []
        cls: Any = x.cls
        if cls is types.MethodType:
            return types.MethodType(*(self.of(v) for v in body))
        if issubclass(cls, functools.partial):
            f, args, keywords = (self.of(v) for v in body)
            return cls(f, *args, **keywords)
        if issubclass(cls, (tuple, frozenset)):
            parts = [self.of(v) for v in body]
            return cls(*parts) if hasattr(cls, "_fields") else cls.__new__(cls, parts)
        made = self._memo[id(x)] = blank(cls, x.factory)
        if isinstance(made, dict):
            refill(made, {self.of(k): self.of(v) for k, v in body})
        elif isinstance(made, (list, set, deque)):
            refill(made, [self.of(v) for v in body])
        elif isinstance(made, bytearray):
            refill(made, bytes(body))
        for k, v in x.attrs.items():
            set_field(made, k, self.of(v))
        return made


def commit(effects: Sequence[Effect | Change], results: Sequence[Any], roots: Roots, kept: set[int]) -> None:
    """Apply the effects of a call.

    Args:
        effects: What to change.
        results: Results of the program.
        roots: The walk of this call.
        kept: Memories that the backward stage still reads; the user gets copies of those.
    """
    owned = set(kept)
    build = Builder(results, roots, owned)
    cells: dict[Any, Any] = (
        {path: owner for path, owner, _ in roots.bindings}
        if any(isinstance(e.owner, types.CellType) for e in effects)
        else {}
    )
    with torch.no_grad():
        ready = []
        for e in effects:
            value = build.of(e.value)
            if e.kind not in ("copy", "add"):
                value = own(value, owned) if isinstance(e.value, Ref) else value
            cell = isinstance(e.owner, types.CellType)
            target = cells.get(e.path, e.owner) if cell else owner_of(e.owner, e.path, roots)
            ready.append((e, target, value))
        for e, target, value in ready:
            _apply(e, target, value, build, roots)


def _apply(e: Effect | Change, target: Any, value: Any, build: Builder, roots: Roots) -> None:
    if e.kind == "copy":
        target.copy_(value)
    elif e.kind in ("grad", "data"):
        setattr(target, e.kind, value)
    elif e.kind == "requires_grad":
        target.requires_grad_(value)
    elif e.kind == "cell":
        bind(target, "", value)
    elif e.kind == "attr":
        set_field(target, e.key, value)
    elif e.kind == "item":
        _set_item(target, build.of(e.key), value)
    elif e.kind == "append":
        _append(target, value)
    elif e.kind == "content":
        refill(target, dict(value) if isinstance(target, dict) else value)
    elif e.kind == "add":
        _count(target, e.key, value)
    elif e.kind == "buffers":
        target._buffers[e.key] = value
    elif e.kind == "group":
        target.param_groups[e.key[0]][e.key[1]] = value
    elif e.kind == "state":
        target.state[_parameter(e, e.key[0], build, roots)][e.key[1]] = value
    elif e.kind == "delete" and e.key[0] == "state":
        target.state.get(_parameter(e, e.key[1], build, roots), {}).pop(e.key[2], None)
    elif e.kind == "delete":
        _delete(target, *e.key)
    else:
        raise AssertionError(e.kind)


def _parameter(e: Effect | Change, p: object, build: Builder, roots: Roots) -> Any:
    return roots.at.get(e.key_path, p) if e.key_path is not None else build.of(p)


def _set_item(target: object, key: object, value: object) -> None:
    kind: Any = dict_kind(target) if isinstance(target, dict) else list
    kind.__setitem__(target, key, value)


def _append(target: Any, values: Any) -> None:
    if isinstance(target, set):
        set.update(target, values)
    else:
        (deque if isinstance(target, deque) else list).extend(target, values)


def _count(target: Any, key: tuple[str, Any], value: tuple[Any, Any]) -> None:
    """Add what the call added: a counter that went on in between goes on from there."""
    how, name = key
    new, old = value
    if how == "attr":
        now = (target.__dict__ if isinstance(target, type) else fields_of(target)).get(name, 0)
        set_field(target, name, now + (new - old))
    elif how == "cell":
        bind(target, "", target.cell_contents + (new - old))
    else:
        now = target.get(name, 0) if isinstance(target, dict) else target[name]
        _set_item(target, name, now + (new - old))


def _delete(target: Any, how: str, key: Any) -> None:
    if how == "attr":
        set_field(target, key, MISSING)
    else:
        dict_kind(target).pop(target, key, None)


def own(value: Any, owned: set[int]) -> Any:
    """A tensor of the user's own: never memory shared with another of their tensors."""
    if not isinstance(value, Tensor):
        return value
    key = value.untyped_storage()._cdata
    if key in owned or not value.is_contiguous() or value.storage_offset() != 0:
        return value.clone(memory_format=torch.contiguous_format)
    owned.add(key)
    return value
