"""The user's objects before and after: watched while tracing, put back, and brought to their final state on success."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from torch.optim.lr_scheduler import LRScheduler

from mlc.trace.python.places import Path, Roots

__all__ = ["Change", "Fresh", "Known", "New", "Watch", "parts"]

_MISSING = object()


@dataclass
class Change:
    """One thing that a call left different.

    ``kind`` says what to do to ``owner`` (found again by ``path``; None: this very object):

    ``"attr"``: set the attribute ``key``. ``"item"``: set the entry ``key`` of a dict or list. ``"append"``: ``value``
    is a list of new last items. ``"content"``: ``value`` is the whole new content of a list, set, deque, bytearray or
    array. ``"delete"``: remove ``key``, ``("attr", name)`` or ``("item", k)``. ``"cell"``: set what a cell holds.
    ``"add"``: add to the number at ``key``, ``("attr", name)`` or ``("item", k)``; ``value`` is the pair of the new
    and the old number of the recorded call. ``"buffers"``: set a buffer. ``"group"``: key is (index, name).
    ``"state"``: key is (parameter, name), ``key_path`` the parameter's path. ``"grad"``, ``"requires_grad"``,
    ``"data"``: of a tensor.

    ``value`` is a tree: constants, what the caller's hook made of tensors and numbers (inside :class:`Fresh`
    where they are tensors), :class:`Known` and :class:`New`.
    """

    owner: Any
    path: Path | None
    kind: str
    key: Any
    value: Any
    key_path: Path | None = None


@dataclass(frozen=True)
class Known:
    """An object that was there before the call: what stands at ``path`` now, or this very object."""

    path: Path | None
    object: Any


@dataclass(eq=False)
class Fresh:
    """A tensor that the call made; one node for one tensor, wherever it was put.

    Attributes:
        value: What the caller's hook made of it.
        dtype: Its type: results that are computed in another one are converted.
        parameter: It is an ``nn.Parameter``.
        requires_grad: It is a leaf that requires grad.
        grad: Tree of its ``grad``.
        view: It lies in the memory of a tensor that was there before: ``(Known, shape, stride, offset)``.
    """

    value: Any
    dtype: torch.dtype
    parameter: bool = False
    requires_grad: bool = False
    grad: Any = None
    view: tuple[Known, tuple[int, ...], tuple[int, ...], int] | None = None


@dataclass(eq=False)
class New:
    """An object that the call made; one node for one object, one object built from it at every call.

    Attributes:
        cls: Its class.
        body: Trees of its items; for a dict pairs of key and value. None: it has none.
        attrs: Trees of its attributes.
        factory: ``default_factory`` of a ``defaultdict``, ``maxlen`` of a ``deque``.
    """

    cls: type
    body: list[Any] | None = None
    attrs: dict[str, Any] = field(default_factory=dict)
    factory: Any = None


def parts(tree: object, seen: set[int] | None = None) -> Iterator[Any]:
    """What the caller's hook put into a tree, and constants: its leaves, each node once."""
    seen = set() if seen is None else seen
    if isinstance(tree, (Fresh, New)):
        if id(tree) in seen:
            return
        seen.add(id(tree))
    if isinstance(tree, Fresh):
        if tree.view is None:
            yield tree.value
        yield from parts(tree.grad, seen)
    elif isinstance(tree, New):
        yield from parts(tree.body, seen)
        yield from parts(tree.attrs, seen)
    elif isinstance(tree, dict):
        for v in tree.values():
            yield from parts(v, seen)
    elif isinstance(tree, (list, tuple)):
        for v in tree:
            yield from parts(v, seen)
    elif not isinstance(tree, Known):
        yield tree


class Watch:
    """Shallow copies of what a loop may rebind in modules, optimizers and schedulers."""

    def __init__(self, roots: Roots) -> None:
        self._optimizers = [(o, p, *_copy_optimizer(o)) for p, o in roots.optimizers.items()]
        self._known = {id(o) for o, *_ in self._optimizers}
        self._modules = [(m, p, dict(vars(m)), dict(m._buffers), dict(m._parameters)) for p, m in roots.modules.items()]
        self._schedulers = [(s, p, dict(vars(s))) for p, s in roots.schedulers.items()]

    def optimizer(self, o: torch.optim.Optimizer) -> None:
        """Watch an optimizer met on the way (before its first recorded step)."""
        if id(o) not in self._known:
            self._known.add(id(o))

    def changes(self) -> list[Change]:
        """What differs now."""
        out: list[Change] = []
        for o, path, groups, state in self._optimizers:
            for i, (g, old) in enumerate(zip(o.param_groups, groups, strict=False)):
                out += [
                    Change(o, path, "group", (i, k), v) for k, v in g.items() if k != "params" and v is not old.get(k)
                ]
            for p, entries in o.state.items():
                before = state.get(p, {})
                out += [
                    Change(o, path, "state", (p, k), v) for k, v in entries.items() if v is not before.get(k, _MISSING)
                ]
        for m, path, attrs, buffers, _ in self._modules:
            out += [
                Change(m, path, "buffers", k, v) for k, v in m._buffers.items() if v is not buffers.get(k, _MISSING)
            ]
            out += [
                Change(m, path, "attr", k, v)
                for k, v in vars(m).items()
                if v is not attrs.get(k, _MISSING) and (isinstance(v, torch.Tensor) or k == "training")
            ]
        for s, path, attrs in self._schedulers:
            out += [Change(s, path, "attr", k, v) for k, v in vars(s).items() if v is not attrs.get(k, _MISSING)]
        return [c for c in out if not isinstance(c.value, (torch.optim.Optimizer, LRScheduler, nn.Module))]

    def restore(self) -> None:
        """Put everything back as it was."""
        for o, _, groups, state in self._optimizers:
            for g, old in zip(o.param_groups, groups, strict=False):
                g.clear()
                g.update(old)
            o.state.clear()
            for p, entries in state.items():
                o.state[p] = dict(entries)
        for m, _, attrs, buffers, params in self._modules:
            m._buffers.clear()
            m._buffers.update(buffers)
            m._parameters.clear()
            m._parameters.update(params)
            for k in [k for k in vars(m) if k not in attrs]:
                del vars(m)[k]
            vars(m).update({k: v for k, v in attrs.items() if k not in ("_buffers", "_parameters")})
        for s, _, attrs in self._schedulers:
            vars(s).clear()
            vars(s).update(attrs)


def _copy_optimizer(o: torch.optim.Optimizer) -> tuple[list[dict[str, Any]], dict[Any, dict[str, Any]]]:
    return [dict(g) for g in o.param_groups], {p: dict(s) for p, s in o.state.items()}
