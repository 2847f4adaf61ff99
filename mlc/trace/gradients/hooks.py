"""Backward hooks: PyTorch's engine runs them where it always does, and what they do is recorded there.

A tensor with a hook gets two values, the one that its operator gave and, after a ``stop``, the one that everything
reads.  When the engine reaches the hook, the gradient of the second value is one ``grad`` equation; the user's function
runs on it, recorded as any other code; what it leaves is the seed of the first value in every gradient that the same
``backward()`` takes further up::

    d loss / d p  =  grad([loss, before], p, seeds=[1, hook(grad(loss, after))])

So a hook may do what it likes, and nothing of it is a rule of its own.  The stop holds for gradients taken here or
deeper; the gradient of the result passes it: it is the derivative of the value (decision 15).

Hooks of leaves run on the gradient before it is accumulated, or after that; a ``.grad`` that a hook looks at is entered
when it does.  PyTorch runs hooks with gradients switched off (without ``create_graph``); that is no cut of the user's.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from mlc.errors import CaptureError
from mlc.ir.core import Stop, Var
from mlc.ir.origin import Origin
from mlc.ir.types import TensorType
from mlc.trace.gradients.hookruns import Run
from mlc.trace.gradients.hooksites import Recorded, Site, Sites, key_of
from mlc.trace.gradients.store import GradientStore

__all__ = ["Hooks"]

_TABLES = ("_backward_hooks", "_post_accumulate_grad_hooks")


class Hooks(Sites):
    """Backward hooks of one recorded run of the user's function."""

    def __init__(self, gradients: GradientStore) -> None:
        super().__init__(gradients)
        self.runs: list[Run] = []  # of autograd's engine, the innermost last

    # ---- registration

    def register(self, t: Tensor, fn: Any, table: str) -> Any:
        """``t.register_hook(fn)`` in the loop, or ``register_post_accumulate_grad_hook``."""
        if torch._C._functorch.is_functorch_wrapped_tensor(t) or t.layout is not torch.strided:
            raise self.refused(
                "is put on a tensor inside torch.func, or on a sparse one",
                "take the gradient with torch.autograd.grad, of a dense tensor",
            )
        put = self._originals[table]
        with torch._C.DisableTorchFunction():
            if t.is_leaf or not t.requires_grad or table != "_backward_hooks":
                handle = put(t, fn)
                if self.runs:
                    self._wrap(t)
                return handle
            site = self._site(t)
            site.keys.add(key_of(fn))
            return put(t, Recorded(fn, lambda f, g: self._changed(site, f, g)))

    def _site(self, t: Tensor) -> Site:
        """Where the hooks of a tensor that is no leaf are."""
        ob = self.observer
        part = bool(ob.handle(t).chain)
        known = None if part else self.sites.get(ob.present(t))
        if known is not None and known.table is not None:
            return known
        if ob.nested:
            raise self.refused(
                "is put on a tensor inside the forward or backward of a custom Function",
                "put it on the tensor that goes in or comes out",
            )
        site = self.of_view(t) if part else self.of_whole(t)
        # Stays when the user's hooks are removed: then the gradient goes on as it is.
        self._originals["_backward_hooks"](t, Recorded(None, lambda _, g: self._arrived(site, [g])))
        site.table = t._backward_hooks
        return site

    # ---- while the engine runs

    def check(self, tensors: Iterable[Tensor]) -> None:
        """Refuse hooks of tensors that were computed before the call."""
        with torch._C.DisableTorchFunction():
            tables = [t._backward_hooks for t in tensors if not t.is_leaf and t._backward_hooks]
        if any(not isinstance(f, Recorded) for table in tables for f in table.values()):
            raise self.refused("is on a tensor that was computed before the call", "remove it before the call")

    def expected(self, wrt: Sequence[Tensor]) -> bool:
        """Whether any hook can run in a gradient of these."""
        with torch._C.DisableTorchFunction():
            return bool(self.sites) or any(getattr(t, name) for t in wrt if t.is_leaf for name in _TABLES)

    @contextlib.contextmanager
    def during(self, run: Run | None) -> Iterator[None]:
        """The engine runs: on this thread, and hooks of leaves by way of the recording."""
        if run is None:
            yield
            return
        self.runs.append(run)
        tables = [d for t in run.wrt for d in self._wrap(t)]
        try:
            with torch.autograd.set_multithreading_enabled(False):
                yield
        finally:
            self.runs.pop()
            for d in tables:
                d.update([(k, f.fn) for k, f in d.items() if isinstance(f, Recorded)])

    def _wrap(self, t: Tensor) -> list[dict[int, Any]]:
        """Hooks of a leaf run by way of the recording; the tables in which that was changed."""
        out = []
        for name, run in zip(_TABLES, (self._on_leaf, self._after), strict=True):
            table: dict[int, Any] = (getattr(t, name) if t.is_leaf else None) or {}
            plain = [(k, f) for k, f in table.items() if not isinstance(f, Recorded)]
            for k, f in plain:
                table[k] = Recorded(f, lambda f, g, t=t, run=run: run(t, f, g))
            if plain:
                out.append(table)
        return out

    def settle(self, t: Tensor) -> None:
        """``t.grad`` is read."""
        if self.runs and not self.observer.paused:
            self.runs[-1].settle(t)

    def forget(self, t: Tensor) -> None:
        """``t.grad`` is set."""
        if self.runs and not self.observer.paused:
            self.runs[-1].forget(t)

    @contextlib.contextmanager
    def _recording(self) -> Iterator[None]:
        """The engine runs unseen, what a hook does is recorded."""
        ob = self.observer
        before = ob.paused, ob.inside
        ob.paused, ob.inside = 0, False
        try:
            yield
        finally:
            ob.paused, ob.inside = before

    def _call(self, run: Run, fn: Any, *args: Any) -> Any:
        """Run a function of the user's."""
        ob = self.observer
        before, ob.in_hook = ob.in_hook, not torch.is_grad_enabled()
        ob.next_stretch()
        try:
            out = fn(*args)
            run.seen()
            return out
        finally:
            ob.in_hook = before
            self.gradients.create_graph = run.create_graph
            ob.next_stretch()

    def _after(self, t: Tensor, fn: object, _: object) -> None:
        """A hook that runs when a gradient was accumulated."""
        run = self.runs[-1]
        with self._recording():
            run.settle(t)
            self._call(run, fn, t)

    def _on_leaf(self, t: Tensor, fn: object, g: Tensor) -> Any:
        """A hook that sees the gradient of a leaf."""
        run = self.runs[-1]
        with self._recording():
            given = run.given.get(id(t))
            if given is None:
                v, beyond = run.value(t)
                if beyond:
                    raise self.beyond()
                given = run.given[id(t)] = self._bound(run, g, v)
            out, v = self._result(run, fn, given, g)
        run.given[id(t)] = given if out is None else out
        run.hooked(t, v)
        return out

    def _arrived(self, site: Site, grads: Sequence[Tensor | None]) -> None:
        """The engine has the gradients at a site."""
        if self.runs:
            with self._recording():
                self._enter_gradients(self.runs[-1], site, grads)

    def _enter_gradients(self, run: Run, site: Site, grads: Sequence[Tensor | None]) -> None:
        ob = self.observer
        self._lower(site, run)
        losses = [v for v, _ in run.pairs]
        reach = self.gradients.reach()
        there = reach.among(losses, [w for w, g in zip(site.after, grads, strict=True) if g is not None])
        beyond = reach.beyond(losses)
        if any(ob.bit_of[w] & beyond for w in there):
            raise self.beyond()
        targets = [w for w in site.after if w in there]
        outs = dict(zip(targets, self.gradients.equation(run.pairs, targets, *run.where, run.level), strict=True))
        for v, w, g in zip(site.before, site.after, grads, strict=True):
            if g is not None:
                given = run.given[id(w)] = self._bound(run, g, outs.get(w))
                run.seeds[v] = self._value(run, given, given)

    def _changed(self, site: Site, fn: Any, g: Tensor) -> Any:
        """A hook of a tensor that is no leaf."""
        if not self.runs:
            return fn(g)
        run, w = self.runs[-1], site.after[0]
        given, run.at_site = run.given[id(w)], True
        with self._recording():
            out, run.seeds[site.before[0]] = self._result(run, fn, given, g)
        run.at_site = False
        if out is not None:
            run.given[id(w)] = out
        return out

    def at_module(self, site: Site, positions: Sequence[int], fn: Any, grads: Sequence[Tensor | None]) -> Any:
        """PyTorch's hook of a module, which runs those of the user's."""
        if not self.runs:
            return fn(grads, grads)
        run = self.runs[-1]
        with self._recording():
            self._enter_gradients(run, site, [grads[i] for i in positions])
            given = list(grads)
            for i, w in zip(positions, site.after, strict=True):
                given[i] = run.given.get(id(w)) if grads[i] is not None else None
            self._ran |= site.keys
            before = [self._state(g) for g in given]
            run.at_site = True
            out = self._call(run, fn, tuple(given), tuple(given))
            run.at_site = False
            for i, v in zip(positions, site.before, strict=True):
                g, new = given[i], given[i] if out is None else out[i]
                written = self._state(g) != before[i]
                if written and g is not grads[i]:
                    raise self._in_place()
                if new is g and not written:
                    continue
                self._changing |= site.keys
                if new is None:
                    run.seeds.pop(v)
                else:
                    run.seeds[v] = self._value(run, new, new if g is None else g)
        return out

    def _state(self, g: Tensor | None) -> Any:
        """What is different when a gradient was written."""
        if g is None:
            return None
        s = self.observer.handle(g).storage
        return g._version, id(s), s.version

    def _result(self, run: Run, fn: object, given: Tensor, g: Tensor) -> tuple[Tensor | None, Var]:
        """What a hook returned, and the value of the gradient after it."""
        before = self._state(given)
        self._ran.add(key_of(fn))
        out = self._call(run, fn, given)
        written = self._state(given) != before
        if written and given is not g:
            raise self._in_place()
        if written or out is not None:
            self._changing.add(key_of(fn))
        new = given if out is None else out
        return out, self._value(run, new, given)

    def _bound(self, run: Run, g: Tensor, v: Var | None) -> Tensor:
        if g.layout is not torch.strided:
            raise self.refused(f"sees a {g.layout} gradient", "use dense gradients (sparse=False)")
        if v is None:
            self.gradients.zero(g)
            return g
        return self.gradients.bound(g, v, run.create_graph)

    def _value(self, run: Run, g: object, like: Tensor) -> Any:
        if not isinstance(g, Tensor):
            return None  # PyTorch refuses it
        return self.observer.fitted(self.observer.read(g, run.create_graph), TensorType.of(like))

    def _lower(self, site: Site, run: Run) -> None:
        """A gradient of an outer level, taken with PyTorch's graph, sees the hook, too."""
        ob = self.observer
        if run.level >= site.level:
            return
        b = ob.builder
        first = min(b.position[w] for w in site.after)
        if any(run.level <= e.op.depth < site.level and b.position[e.outs[0]] > first for e in ob.grad_eqns):  # type: ignore[union-attr]
            raise self.beyond()
        for w in site.after:
            e = b.producer(w)
            assert e is not None
            b.replace(e, e.with_(op=Stop(run.level)))
        site.level = run.level
        self.gradients.changed(first)

    # ---- afterwards

    def unheard(self, results: Sequence[Var]) -> list[str]:
        """Warnings: hooks that PyTorch would run when the result is differentiated, after the call.

        Raises:
            CaptureError: where they would change that gradient, or nobody knows what they would do.
        """
        found = []
        for w, through in self._on_the_way(results).items():
            site = self.sites[w]
            hooks = site.alive
            changing = bool(hooks & self._changing)
            if not through and (changing or hooks - self._ran):
                raise CaptureError(
                    "a backward hook stands between the loop and its result: it would run when the result is "
                    "differentiated, outside of the call",
                    loc=site.loc,
                    advice="put it only on tensors that backward() in the loop reaches (such as: if self.training), "
                    "remove it before the last forward pass, or write it as a torch.autograd.Function",
                )
            if hooks and (changing or not through):
                found.append(
                    f"the backward hook put on at {site.loc} does not run when the result is differentiated: the "
                    "hypergradient is the derivative of the value that the loop computes"
                )
        return list(dict.fromkeys(found))

    def _on_the_way(self, results: Sequence[Var]) -> dict[Var, bool]:
        """Sites that PyTorch's graph of the results has; whether only by way of gradients taken with create_graph."""
        b = self.observer.builder
        found: dict[Var, bool] = {}
        seen: set[tuple[Var, bool]] = set()
        todo = [(v, False) for v in results] if self.sites else []
        while todo:
            v, through = todo.pop()
            e = b.producer(v)
            if (v, through) in seen or e is None or not v.mask:
                continue
            seen.add((v, through))
            if v in self.sites:
                found[v] = found.get(v, True) and through
            elif isinstance(e.op, Stop) or e.impure or self.gradients.constant(e):
                continue
            todo.extend((x, through or e.origin is Origin.GRAD) for x in e.inputs)
        return found
