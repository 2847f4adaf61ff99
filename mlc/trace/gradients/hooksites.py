"""Where hooks stand: a tensor with one has two values, before and after a ``stop``."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor
from torch.utils.weak import WeakIdKeyDictionary

from mlc.errors import CaptureError
from mlc.ir.core import Stop, Var
from mlc.ir.origin import Origin
from mlc.ir.types import Loc, TensorType
from mlc.record.handles import Handle, Storage
from mlc.trace.gradients.store import GradientStore

__all__ = ["Recorded", "Site", "Sites", "key_of"]


@dataclass(eq=False)
class Site:
    """Tensors that a hook sees the gradients of.

    Attributes:
        before: Their values as they were made.
        after: Their values as everything reads them.
        loc: The user's line that put the hook there.
        level: Gradients taken in this number of declared levels, or more, see the hook.
        table: Hooks of a tensor by number; None for those of a module.
        keys: What stands for the functions, so that the same one is known again on another tensor.
    """

    before: list[Var]
    after: list[Var]
    loc: Loc | None
    level: int
    table: dict[int, Any] | None = None
    keys: set[Any] = field(default_factory=set)

    @property
    def alive(self) -> set[Any]:
        """Functions that were not removed."""
        if self.table is None:
            return self.keys
        return {key_of(f.fn) for f in self.table.values() if isinstance(f, Recorded) and f.fn is not None}


@dataclass(eq=False)
class Recorded:
    """A hook of the user's (or none) in a table of PyTorch's: it runs by way of the recording."""

    fn: Callable[..., Any] | None
    run: Callable[..., Any]

    def __post_init__(self) -> None:
        self.__name__ = getattr(self.fn, "__name__", "hook")  # PyTorch names it in its errors

    def __call__(self, *args: object) -> Any:
        """PyTorch runs the hook."""
        return self.run(self.fn, *args)


class Sites:
    """Backward hooks of one recorded run of the user's function."""

    def __init__(self, gradients: GradientStore) -> None:
        self.gradients = gradients
        self.observer = gradients.observer
        self.sites: dict[Var, Site] = {}
        self._originals: dict[str, Any] = {
            "_backward_hooks": Tensor.register_hook,
            "_post_accumulate_grad_hooks": Tensor.register_post_accumulate_grad_hook,
        }
        self._changing: set[Any] = set()  # functions that made another gradient of one
        self._ran: set[Any] = set()
        self._group: Site | None = None
        self._positions: list[int] = []

    # ---- where they stand

    def of_whole(self, t: Tensor) -> Site:
        """A tensor with a memory of its own: its value is taken in two where it was made, whoever has read it."""
        ob = self.observer
        b, v = ob.builder, ob.present(t)
        e = b.producer(v)
        late = "put the hook on it right after it is made, or on a copy (t = t.clone()) that is used in its place"
        if e is None:
            raise self.refused(
                "is put on a tensor that was computed before the call",
                "put it on before the call: it runs when the result is differentiated",
            )
        if t._is_view() and v not in self.sites:
            raise self.refused("is put on a view of all of another tensor", late)
        where = b.position[v]
        if ob.grad_eqns and b.position[ob.grad_eqns[-1].outs[0]] > where:
            raise self.refused("is put on a tensor after a gradient was taken", late)
        op = Stop(ob.depth())
        before = b.split(v, op, ob.locate()[0], Origin.HOOK)
        ob.moved(e, b.current(b.eqns[where]), where)
        self.gradients.changed(where)
        return self._enter([before], [v])

    def of_view(self, t: Tensor) -> Site:
        """A view of a part: from here on it is a value of its own in the memory of what it was made of."""
        ob = self.observer
        h, mem = ob.handle(t), ob.memories.of(t)
        further = any(x.chain[: len(h.chain)] == h.chain and x is not h for x in mem.layouts.values())
        types = [h.storage.var.type, *(step[4][step[3]] for step in h.chain[:-1])]
        if further or TensorType.of(t) in types or self._read(h):
            raise self.refused(
                "is put on a view that may be in use already",
                "put it on a copy (t = t.clone()) that is used in its place",
            )
        v = ob.present(t)
        (w,) = self._stops([v])
        storage = Storage(w)
        storage.born, storage.apart = ob.region(), True
        mem.roots.append(storage)
        if ob.apart is None:
            ob.apart = WeakIdKeyDictionary()
        ob.apart[t] = Handle(storage)
        return self._enter([v], [w])

    def _read(self, h: Handle) -> bool:
        """Whether anything has read what may be this view."""
        b = self.observer.builder
        op, args, _, index, *_ = h.chain[-1]
        since = b.eqns[b.position.get(h.storage.var, -1) + 1 :]
        made = [e.outs[index] for e in since if e.op == op and e.args[1:] == args]
        return any(v in made for e in since for v in e.inputs)

    def _stops(self, values: Sequence[Var]) -> list[Var]:
        ob = self.observer
        tag, ob.tag = ob.tag, Origin.HOOK
        try:
            return [ob.emit(Stop(ob.depth()), (v,), (v.type,))[0] for v in values]
        finally:
            ob.tag = tag

    def _enter(self, before: list[Var], after: list[Var]) -> Site:
        ob = self.observer
        site = Site(before, after, ob.place(), ob.depth())
        for v in after:
            ob.new_bit(v)
            self.sites[v] = site
        return site

    def module(self, cls: object, apply: Callable[..., Any], args: Sequence[Any]) -> Any:
        """What goes into or comes out of a module with hooks; PyTorch puts a node of its own there."""
        ob = self.observer
        followed = [i for i, a in enumerate(args) if isinstance(a, Tensor) and ob.carries(a, ob.handle(a))]
        args = [a.clone() if i in followed else a for i, a in enumerate(args)]
        values = [ob.read(args[i], True) for i in followed]
        with ob.pause():
            outs = apply(cls, *args)
        after = self._stops(values)
        for i, w in zip(followed, after, strict=True):
            ob.bind(outs[i], w)
        for i, (a, o) in enumerate(zip(args, outs, strict=True)):
            cut = ob.cut_of(a) if i not in followed else None
            if cut is not None:
                ob.cut_tensors[o] = cut
        self._group = self._enter(values, after)
        self._positions = followed
        return outs

    def node(self, node: object, users: Sequence[Any]) -> Any:
        """That node, as PyTorch puts its hook on it."""
        assert self._group is not None
        self._group.keys = {key_of(f) for f in users}
        return Node(node, self, self._group, tuple(self._positions))

    def before(self, v: Var) -> Var:
        """The value whose gradient a tensor with hooks gets: after them."""
        site = self.sites.get(v)
        return v if site is None or site.table is None else site.before[0]

    # ---- refusals

    def refused(self, what: str, advice: str) -> CaptureError:
        """A refusal, to be raised; the first one stands."""
        ob = self.observer
        ob.refusal = ob.refusal or CaptureError(f"a backward hook {what}", loc=ob.place(), advice=advice)
        return ob.refusal

    def beyond(self) -> CaptureError:
        """A gradient that PyTorch's graph has only a part of."""
        return self.refused(
            "sees a gradient that goes through a training declared with mlc.level or mlc.clone",
            "change the gradient after it was taken (with torch.autograd.grad) instead",
        )

    def out_of_sight(self) -> CaptureError:
        """A hook on what depends only on what was computed before the call."""
        return self.refused(
            "stands where only gradients of what was computed before the call pass",
            "look at that gradient when the result is differentiated, outside of the call",
        )

    def _in_place(self) -> CaptureError:
        return self.refused(
            "writes to its gradient in place, and other gradients may lie there",
            "return the new gradient (such as 2 * g) instead",
        )


@dataclass(frozen=True)
class Node:
    """A node of PyTorch's graph on which PyTorch puts the hook of a module."""

    node: Any
    hooks: Any
    site: Site
    positions: tuple[int, ...]

    def register_hook(self, fn: object) -> Any:
        """As the node's own."""
        return self.node.register_hook(lambda given, _: self.hooks.at_module(self.site, self.positions, fn, given))


def key_of(fn: object) -> Any:
    """What stands for a function that may be made anew in every iteration."""
    while isinstance(fn, functools.partial):
        fn = fn.func
    return getattr(getattr(fn, "__func__", fn), "__code__", None) or id(fn)
