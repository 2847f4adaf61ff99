"""Gradients that the user's loop takes: PyTorch computes them, the recording gets one first-class ``grad`` each.

Which leaves ``backward()`` reaches, whether a gradient is None, what is accumulated where: PyTorch's own doing, looked
at afterwards.  What PyTorch's graph does not have is a way through an inner training that the user declared
(``mlc.level``, ``mlc.clone``); such a gradient is computed from the recording, at once, so that the run goes on with
the right numbers.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from mlc.ir.core import Var
from mlc.trace.gradients.grads import get_grad, put_grad
from mlc.trace.gradients.hookruns import Run
from mlc.trace.gradients.hooks import Hooks
from mlc.trace.gradients.later import Later
from mlc.trace.gradients.store import GradientStore
from mlc.trace.recorder.observer import Observer

__all__ = ["Gradients"]

_BASE: Any = torch._C.TensorBase


class Gradients(GradientStore):
    """Takes and records the gradients of one run."""

    def __init__(self, observer: Observer, original: Callable[..., Any]) -> None:
        super().__init__(observer)
        self.original = original
        self.later = Later(observer)
        self.hooks = Hooks(self)
        observer.watchers += [self.hooks, self.later]

    def before(self, v: Var) -> Var:
        """See :meth:`GradientStore.before`."""
        return self.hooks.before(v)

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
            self.held = {id(t): g.clone() for t, g in before if g is not None} if ob.farther else {}
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
            ob.parallel.synchronise({id(t) for t in wrt}, create_graph)
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
        found = [t for t in more if ob.bit_of.get(ob.read(t, True), 0) & beyond]
        for t in found:
            ob.keep_grad(t)
        (loc, site), depth = ob.locate(), ob.depth()
        self.later.note([(t, [ob.read(t, True)]) for t in found], lambda vs: self.equation(pairs, vs, loc, site, depth))

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
                old.copy_(self.held[id(t)])
        put_grad(t, old)
