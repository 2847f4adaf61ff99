"""Gradients that the user's loop takes: PyTorch computes them, the recording gets one first-class ``grad`` each.

Which leaves ``backward()`` reaches, whether a gradient is None, what is accumulated where: PyTorch's own doing, looked
at afterwards.  What PyTorch's graph does not have is a way through an inner training that the user declared
(``mlc.level``, ``mlc.clone``); such a gradient is computed from the recording, at once, so that the run goes on with
the right numbers.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from mlc.errors import CaptureError
from mlc.ir.core import Eqn, Grad, Var
from mlc.ir.types import Loc, TensorType
from mlc.trace.gradients.grads import get_grad, put_grad
from mlc.trace.gradients.hookruns import Run
from mlc.trace.gradients.hooks import Hooks
from mlc.trace.gradients.later import Later
from mlc.trace.recorder.reach import Reach

if TYPE_CHECKING:
    from mlc.trace.recorder.observer import Observer

__all__ = ["Gradients"]

_BASE: Any = torch._C.TensorBase
_OWN = 1 << 30  # so deep that nothing is followed but PyTorch's own graph


class Gradients:
    """Takes and records the gradients of one run."""

    def __init__(self, observer: Observer, original: Callable[..., Any]) -> None:
        self.observer = observer
        self.original = original
        self._reach: dict[tuple[int, bool], Reach] = {}
        self.later = Later(observer)
        self.hooks = Hooks(self)
        self.create_graph = False  # of the gradient that is taken
        self._followed: set[Var] = set()  # gradients taken with create_graph
        self.stopped: dict[int, Any] = {}  # leaves without a gradient: the losses, their value, line and depth
        self._held: dict[int, Tensor] = {}  # what .grad held before the backward() that runs

    # ---- backward() and grad()

    def run(self, outputs: Any, grad_tensors: Any, keep_graph: Any = False, create_graph: Any = False, inputs: Any = (),
            allow_unreachable: bool = True, accumulate_grad: bool = False, **kw: Any) -> Any:  # fmt: skip
        """In the place of autograd's engine."""
        ob = self.observer
        ob.next_stretch()
        losses = [t for t in outputs]
        wrt = list(inputs) or self._leaves(losses)
        self.hooks.check((*losses, *wrt))
        self.create_graph = create_graph
        before = [(t, get_grad(t)) for t in wrt] if accumulate_grad else []
        for t, g in before:
            ob.keep_grad(t)
            self._noted(t)
            if g is not None:
                ob.will_write(g)
        with ob.pause():
            self._held = {id(t): g.clone() for t, g in before if g is not None} if ob.farther else {}
        given = tuple(wrt) if accumulate_grad and not inputs and ob.outer_nodes else tuple(inputs)
        kept = [(t, get_grad(t)) for t in ob.retained]
        run = None
        if self.hooks.expected(wrt):
            run = Run(self.hooks, self._pairs(losses, grad_tensors), wrt, [*before, *kept], create_graph)
        with ob.pause(), self.hooks.during(run):
            found = None
            if wrt or not accumulate_grad:
                found = self.original(
                    outputs, grad_tensors, keep_graph, create_graph, given,
                    allow_unreachable=allow_unreachable or ob.farther, accumulate_grad=accumulate_grad, **kw,
                )  # fmt: skip
        ob.next_stretch()
        self.create_graph = create_graph
        if run is not None and given and not inputs and not run.complete:
            raise self.hooks.out_of_sight()
        pairs = self._pairs(losses, grad_tensors) if run is None else run.pairs
        take = run.values if run is not None else functools.partial(self.taken, pairs)
        before = [*before, *((t, g) for t, g in kept if get_grad(t) is not g)] if run is None else run.rest()
        self._accumulated(before, *take([t for t, _ in before]), create_graph)
        if accumulate_grad:
            if not inputs:
                self._farther(pairs, wrt)
            return found
        taken = self._taken(*take(wrt), found, create_graph)
        if not allow_unreachable and any(g is None for g in taken):
            raise RuntimeError(
                "One of the differentiated Tensors appears to not have been used in the graph. "
                "Set allow_unused=True if this is the desired behavior."
            )
        return taken

    def _farther(self, pairs: list[tuple[Var, Var]], known: Sequence[Tensor]) -> None:
        """Leaves that the losses reach only through a training that the user declared: taken where they are read."""
        ob = self.observer
        if not ob.farther:
            return
        values = [v for v, _ in pairs]
        beyond = self.reach().beyond(values)
        have = {id(t) for t in known}
        more = [t for t in ob.leaves.values() if id(t) not in have and t.requires_grad and t.is_leaf]
        found = [t for t in more if ob._bit_of.get(ob.read(t, True), 0) & beyond]
        for t in found:
            ob.keep_grad(t)
        (loc, site), depth, name = ob.locate(), ob.depth(), ob.level_name()
        self.later.note(
            [(t, [ob.read(t, True)]) for t in found], lambda vs: self.equation(pairs, vs, loc, site, depth, name)
        )

    def _noted(self, t: Tensor) -> None:
        """``backward`` reads what ``.grad`` was before the call."""
        self.observer.read_grad(t, accumulating=True)

    def _leaves(self, losses: Sequence[Tensor]) -> list[Tensor]:
        """Leaves of PyTorch's graph, up to graphs that were there before the call."""
        stop = self.observer.outer_nodes
        found: dict[int, Tensor] = {}
        seen: set[Any] = set()
        todo = []
        for t in losses:
            if t.grad_fn is not None:
                todo.append(t.grad_fn)
            elif t.requires_grad:
                found[id(t)] = t
        while todo:
            node = todo.pop()
            if node in seen or node in stop:
                continue
            seen.add(node)
            leaf = getattr(node, "variable", None)
            if leaf is not None:
                found[id(leaf)] = leaf
            todo.extend(n for n, _ in node.next_functions if n is not None)
        order = {id(t): i for i, t in enumerate(self.observer.leaves.values())}
        outside = {id(x.tensor) for x in self.observer.externals.values()}
        # The same order in every iteration: leaves that an iteration makes anew come last.
        return sorted(found.values(), key=lambda t: (id(t) not in outside, order.get(id(t), len(order))))

    # ---- recording

    def _pairs(self, losses: Sequence[Tensor], seeds: Sequence[Tensor | None]) -> list[tuple[Var, Var]]:
        ob = self.observer
        pairs = []
        for t, s in zip(losses, seeds, strict=True):
            if not t.requires_grad:
                continue
            if s is None:
                with torch.no_grad(), ob.active():
                    s = torch.ones_like(t)
            pairs.append((ob.read(t, True), ob.read(s, False)))
        return pairs

    def equation(self, pairs: list[tuple[Var, Var]], targets: Sequence[Var], loc: Loc | None, site: Any, depth: int,
                 level: str | None = None) -> list[Var]:  # fmt: skip
        """One ``grad`` equation; its results.  ``level``: the declared level it is taken in (None: the open one)."""
        ob = self.observer
        level = ob.level_name(depth) if level is None else level
        mask = 0
        for v, _ in pairs:
            mask |= v.mask
        outs = tuple(Var(v.type, mask) for v in targets)
        args = (*[v for v, _ in pairs], *targets, *[s for _, s in pairs])
        eqn = Eqn(Grad(len(pairs), len(targets), depth, level), args, outs, (), loc, "grad", site)
        if targets:
            ob.builder.append(eqn)
            ob.grad_eqns.append(eqn)
            if self.create_graph:
                self._followed.update(outs)
        return list(outs)

    def constant(self, e: Eqn) -> bool:
        """Whether it is a gradient taken without create_graph."""
        return isinstance(e.op, Grad) and not any(v in self._followed for v in e.outs)

    def changed(self, where: int) -> None:
        """The recording was changed from this equation on."""
        for r in self._reach.values():
            r.rewind(where)

    def reach(self, depth: int | None = None, through: bool = False) -> Reach:
        """Dependence for gradients taken here, or in this number of declared levels."""
        ob = self.observer
        depth = ob.depth() if depth is None else depth
        key = (depth, through)
        known = self._reach.get(key)
        if known is None or known.builder is not ob.builder:
            known = Reach(ob.builder, ob._bit_of, depth, through, own=depth == _OWN)
            if not ob.nested:
                self._reach[key] = known
        return known

    def _values(self, t: Tensor, losses: Sequence[Var], reached: int) -> list[Var]:
        """Values of a target that the losses depend on: the present one, and earlier ones of a leaf written since."""
        ob = self.observer
        now = ob.read(t, True) if t.requires_grad else ob.present(t)
        now = self.hooks.before(now)
        out = [now] if self.reach().among(losses, [now]) else []
        if t.is_leaf and t.requires_grad:
            bits = ob.leaf_bits.get(id(t), 0) & ~ob._bit_of.get(now, 0)
            if bits & reached:  # written since the loss read it
                history = reversed(ob.leaf_history[id(t)])
                out += [v for v in history if v is not now and ob._bit_of.get(v, 0) & reached]
        return out

    def taken(self, pairs: list[tuple[Var, Var]], wrt: Sequence[Tensor]) -> tuple[list[Var | None], list[bool]]:
        """The value of each gradient (None: no path), and whether it goes ways that PyTorch's graph does not have."""
        ob = self.observer
        values = [v for v, _ in pairs]
        reach = self.reach()
        own, beyond = self.reach(_OWN).bits(values), reach.beyond(values)
        groups = [self._values(t, values, own) for t in wrt]
        outs = iter(self.equation(pairs, [v for g in groups for v in g], *ob.locate(), ob.depth()))
        found: list[Var | None] = []
        for g in groups:
            parts = [next(outs) for _ in g]
            total = parts[0] if parts else None
            for p in parts[1:]:
                (total,) = ob._emit(torch.ops.aten.add.Tensor, (total, p), (p.type,))
            found.append(total)
        more = [any(ob._bit_of.get(v, 0) & beyond for v in g) for g in groups]
        lost = self.reach(through=True).beyond(values) & ~beyond
        for g, total in zip(groups, found, strict=True):
            if total is not None and ob._bit_of.get(g[0], 0) & lost:
                ob.dropped[total] = (tuple(values), g[0], ob.place(), ob.depth())
        if lost:
            self._unreached(values, wrt, lost)
        return found, more

    def _unreached(self, values: Sequence[Var], wrt: Sequence[Tensor], lost: int) -> None:
        """Leaves that get no gradient at all here, though a training leads to them."""
        ob = self.observer
        have = {id(t) for t in wrt}
        for t in ob.leaves.values():
            now = ob.leaf_history.get(id(t), [None])[-1]
            if id(t) not in have and now is not None and ob._bit_of.get(now, 0) & lost:
                self.stopped.setdefault(id(t), (t, tuple(values), now, ob.place(), ob.depth()))

    def _taken(self, values: Sequence[Var | None], more: Sequence[bool], found: Any, create_graph: bool) -> Any:
        """What ``autograd.grad`` gave."""
        ob = self.observer
        found = list(found)
        for i, v in enumerate(values):
            if v is None and found[i] is not None:
                self.zero(found[i])
            elif v is not None:
                if more[i]:
                    found[i] = ob.evaluate(v)
                found[i] = self.bound(found[i], v, create_graph)
        return tuple(found)

    def zero(self, g: Tensor) -> None:
        """PyTorch has a path that carries nothing (through integers, or an input that a rule ignores).

        Raises:
            CaptureError: where it carries something.
        """
        ob = self.observer
        with ob.pause():
            carries = g.layout is not torch.strided or bool((g != 0).any())
        if carries:
            ob.refusal = ob.refusal or CaptureError(
                "PyTorch's graph has a way to this gradient that mlc did not see being made", loc=ob.place(),
                advice="take the operator on that way apart into torch functions, or report it",
            )  # fmt: skip
            raise ob.refusal
        ob.zero(g)

    def bound(self, g: Tensor | None, v: Var, create_graph: bool) -> Tensor:
        """The gradient as a tensor with a memory of its own, laid out as the program has it."""
        ob = self.observer
        ty = v.type
        assert isinstance(ty, TensorType)
        with ob.pause(), torch.set_grad_enabled(create_graph):
            if g is None:
                g = torch.zeros(ty.shape, dtype=ty.dtype, device=ty.device)
            if ob.memories.find(g) is not None or (g._is_view() and not g.is_contiguous()):
                g = g.clone()
            if g.stride() != ty.stride and 0 not in ty.stride:
                g = _laid_out(g, ty)
        h = ob.bind(g, v)
        h.storage.soft = not create_graph
        return g

    def _accumulated(self, before: Sequence[tuple[Tensor, Tensor | None]], values: Sequence[Var | None],
                     more: Sequence[bool], create_graph: bool) -> None:  # fmt: skip
        ob = self.observer
        unread: list[tuple[Tensor, list[Var]]] = []
        for (t, old), v, beyond in zip(before, values, more, strict=True):
            if v is not None and beyond and not create_graph:
                self._undo(t, old)
                ob.grads.setdefault(id(t), (t, None))
                unread.append((t, [v]))
            else:
                with self.later.kept(t):
                    self.accumulate(t, old, v, beyond, create_graph)
        self.later.note(unread, list)  # nobody may ever look at it

    def _undo(self, t: Tensor, old: Tensor | None) -> None:
        """``t.grad`` as it was: PyTorch added what is only a part."""
        ob = self.observer
        if old is not None and get_grad(t) is old:
            ob.will_write(old)
            with ob.pause(), torch.no_grad():
                old.copy_(self._held[id(t)])
        put_grad(t, old)

    def accumulate(self, t: Tensor, old: Tensor | None, v: Var | None, beyond: bool, create_graph: bool) -> None:
        """What ``backward()`` did to ``t.grad``, which was ``old``."""
        ob = self.observer
        ob.set_grad(t)
        now = get_grad(t)
        if v is None:
            if old is None and now is not None:
                self.zero(now)
            return
        if beyond:
            now = self._set_beyond(t, old, ob.evaluate(v))
        if now is None:
            now = torch.zeros_like(t)
            put_grad(t, now)
        if old is None:
            self._hold(t, now, v, create_graph)
            return
        total = ob.add(ob.present(old), v)
        if now is old:
            ob.write(old, total)
        else:
            ob.bind(now, total).storage.soft = not create_graph

    def _set_beyond(self, t: Tensor, old: Tensor | None, g: Tensor) -> Tensor:
        ob = self.observer
        if old is None or get_grad(t) is not old:
            with ob.pause(), torch.no_grad():
                put_grad(t, g if old is None else old + g)
        else:  # in place, as PyTorch adds; what it added of its own is no part of the sum
            ob.will_write(old)
            with ob.pause(), torch.no_grad():
                old.copy_(self._held.get(id(t), old) + g)
        now = get_grad(t)
        assert now is not None
        return now

    def _hold(self, t: Tensor, g: Tensor, v: Var, create_graph: bool) -> None:
        ob = self.observer
        ty = v.type
        assert isinstance(ty, TensorType)
        if ob.memories.find(g) is not None:
            with ob.pause(), torch.set_grad_enabled(create_graph):
                g = g.clone()
                put_grad(t, g)
        if g.stride() != ty.stride and 0 not in ty.stride and g.dtype == ty.dtype:
            with ob.pause(), torch.set_grad_enabled(create_graph):
                g = _laid_out(g, ty)
                put_grad(t, g)
        h = ob.bind(g, v)
        h.storage.soft = not create_graph


def _laid_out(g: Tensor, ty: TensorType) -> Tensor:
    return torch.empty_strided(ty.shape, ty.stride, dtype=g.dtype, device=g.device).copy_(g)
