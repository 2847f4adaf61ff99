"""The end of a recording: what the run returned and left, as results of a program."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from mlc.ir.core import Var
from mlc.trace.capture import Effect, Recording, Ref, arg_names, path_name, place_of
from mlc.trace.gradients.dropped import dropped_ways, needed, unstepped
from mlc.trace.gradients.grads import put_grad
from mlc.trace.gradients.taken import Gradients
from mlc.trace.iterables import Sources
from mlc.trace.numbers.links import Linked, alive
from mlc.trace.python.changes import Changes, changes, place
from mlc.trace.python.found import Found
from mlc.trace.python.places import Roots
from mlc.trace.python.state import parts
from mlc.trace.python.world import World
from mlc.trace.recorder.observer import Observer

__all__ = ["Finish"]


class Finish:
    """Results and effects of a run, while its tensors are still known."""

    def __init__(self, ob: Observer, gradients: Gradients, roots: Roots, world: World) -> None:
        self.ob = ob
        self.gradients = gradients
        self.roots = roots
        self.world = world
        self.changes = Changes()
        self.results: list[Var] = []
        self.reals: list[Any] = []
        self.texts = False
        self.unknown = False  # something was left that no program has a value for
        self.by_tensor = {id(x.tensor): x for x in ob.externals.values()}

    def finish(self, fn: object, out: object, found: Found, sources: Sources, calm: bool) -> Recording:
        """The recording."""
        ob = self.ob
        self.place_externals()
        leaves, spec = pytree.tree_flatten(out)
        out_leaves = [self.output(x) for x in leaves]
        n_outputs = len(self.results)
        optimizers = list(self.roots.optimizers.values())
        names = {i: path_name(path, arg_names(fn)) for i, path in self.roots.tensors.items()}
        warned = unstepped(ob.initial_grads.values(), optimizers, self.trained, names)
        effects = self.effects(fn, found)
        texts = [*leaves, *(x for e in effects for x in parts(e.value))]
        self.texts = ob.linked and any(isinstance(x, str) for x in texts)
        decisions = []
        for var, outcome, what, loc in ob.decisions:
            self.results.append(var)
            self.reals.append(None)
            decisions.append((len(self.results) - 1, outcome, what, loc))
        reusable, notes = self.reuse(sources, calm)
        grads = [
            (self.roots.tensors.get(id(t)), t, none)
            for t, none in ob.grad_reads.values()
            if id(t) in self.by_tensor and (id(t) in ob.grads_seen or self.trained(t))
        ]
        given = self.results[:n_outputs]
        ends = [v for v, x in zip(given, self.reals, strict=False) if isinstance(x, Tensor) and x.requires_grad]
        warned += [*dropped_ways(self.gradients, needed(ob.builder.eqns, given)), *self.gradients.hooks.unheard(ends)]
        generators = [g for g in self.roots.objects.values() if isinstance(g, torch.Generator)]
        return Recording(
            ob.builder.eqns, list(ob.externals.values()), self.results, n_outputs, spec, out_leaves, effects,
            sources.all, ob.steps, self.roots, reusable, notes, [], grads, getattr(fn, "__name__", "program"),
            place_of(fn), ob.stop_log, arg_names(fn), decisions, generators, warned,
            responses=ob.responses,
        )  # fmt: skip

    def place_externals(self) -> None:
        """Where later calls find the tensors from outside: only where Python itself went."""
        for x in self.ob.externals.values():
            if x.path is not None:
                x.path = self.roots.tensors.get(id(x.tensor))
                if x.path is None:
                    self.ob.unplaced.append(x.read)

    def output(self, x: object) -> Any:
        """A leaf of what the function returned."""
        if isinstance(x, Linked):
            return self.number(x)
        if not isinstance(x, Tensor) or x.layout is not torch.strided:
            self.unknown |= isinstance(x, Tensor)
            return x
        return self.ref(x, self.ob.read(x, True))

    def number(self, x: Linked) -> Any:
        """A number that follows from tensors."""
        if not alive(x):
            return x.value
        ref = self.ref(x.value, self.ob.number_out(x.tensor))
        return Ref(ref.index, number=True, kind=type(x.value))

    def ref(self, real: object, var: Var) -> Ref:
        """A result of the program."""
        self.results.append(var)
        self.reals.append(real)
        return Ref(len(self.results) - 1)

    def value(self, x: object) -> Any:
        """A tensor that the call made, or a number, that an object of the user's now holds."""
        if isinstance(x, Linked):
            return self.number(x)
        if not isinstance(x, Tensor):
            return x
        if x.layout is not torch.strided:
            self.unknown = True
            return x
        return self.ref(x.detach(), self.ob.present(x))

    def effects(self, fn: object, found: Found) -> list[Any]:
        """Final values of everything of the user's that the run wrote."""
        ob = self.ob
        effects: list[Any] = []
        kept = {id(g) for t, g in ob.initial_grads.values() if g is not None and not self.trained(t)}
        for x in list(ob.externals.values()):
            if x.written and not x.parts and id(x.tensor) not in kept:
                effects.append(Effect("copy", x.tensor, x.path, None, self.ref(x.held, ob.value(ob.handle(x.held)))))
        for t, g in ob.initial_grads.values():
            if not self.trained(t):
                put_grad(t, g)  # a meta-parameter: it receives the hypergradient alone
                if g is not None:
                    with ob.pause():
                        ob.snapshots.put(g)
        with ob.pause():
            self.changes = changes(self.world, self.roots, found, arg_names(fn), self.value)
        return effects + [c for c in self.changes.all if c.kind != "grad" or self.trained(c.owner)]

    def trained(self, t: object) -> bool:
        """Whether the loop writes a tensor, or made an optimizer for it (what it only reads is a meta-parameter)."""
        ext = self.by_tensor.get(id(t))
        return ext is None or ext.written or id(t) in self.ob.rebound or id(t) in self.ob.optimized

    def reuse(self, sources: Sources, calm: bool) -> tuple[bool, list[str]]:
        """Whether later calls may use this recording, and what a reader should know."""
        ob = self.ob
        notes = []
        if self.changes.odd or self.unknown:
            where = ", ".join(self.changes.odd[:3]) or "what the function returns"
            notes.append(f"recorded anew at every call: {where} holds something that only the loop itself can make")
        if self.texts:
            notes.append("recorded anew at every call: a text that is left may hold numbers of this call")
        if self.changes.counters:
            notes.append(f"recorded anew at every call: {', '.join(self.changes.counters[:3])} is read and changed")
        followed = {s.path for s in sources.all}
        held = [p for p in self.roots.iterators if p not in followed]
        if held:
            notes.append(f"recorded anew at every call: an iterator is kept at {place(held[0])}")
        if sources.host_random or self.world.drew():
            notes.append("recorded anew at every call: the loop draws from Python's or NumPy's random generator")
        if any(s.mixed for s in sources.all):
            notes.append("recorded anew at every call: an iterable yields values that are not tensors")
        if ob.random_is_data or ob.reordered or not calm:
            notes.append("recorded anew at every call: a random generator is set, forked or made in the loop")
        if ob.unplaced:
            where = next((str(x) for x in ob.unplaced if x is not None), "the loop")
            notes.append(f"recorded anew at every call: data is made at {where}")
        if ob.files:
            where = next((str(x) for x in ob.files if x is not None), "the loop")
            notes.append(f"recorded anew at every call: a file is written at {where}")
        return not [n for n in notes if "is read and changed" not in n], notes
