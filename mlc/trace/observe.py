"""The first call of a structure: the user's function runs for real, and what it did becomes a recording."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils import _pytree as pytree
from torch.utils.data import DataLoader

from mlc.ir.core import Var
from mlc.trace.capture import Effect, Recording, Ref, arg_names, changed, place_of
from mlc.trace.environment import current, default_dtype_kept, eager_dynamo, iterators_elsewhere, quiet
from mlc.trace.inputs import Roots, walk
from mlc.trace.interception import intercepted
from mlc.trace.iterables import Sources, loader_patches, substitute
from mlc.trace.observer import Observer
from mlc.trace.optimizers import narrow_counts, restore_flags
from mlc.trace.patches import _set
from mlc.trace.randomness import RandomWatch
from mlc.trace.state import Change, Watch
from mlc.trace.tracer import External

__all__ = ["Observation", "observe"]

_BASE: Any = torch._C.TensorBase


@dataclass
class Observation:
    """What one real run left: the recording, what it returned, and how to undo it.

    Attributes:
        recording: The run as equations.
        out: What the user's function returned.
        reals: The tensor (or number) that the run computed for each result of the recording.
        observer: Keeps what memories held before.
        random: States of the generators at the start and at the end of the run.
    """

    recording: Recording
    out: Any
    reals: list[Any]
    observer: Observer
    watch: Watch
    random: tuple[list[Any], list[Any]]
    items: dict[tuple[int, int], list[Any]] = field(default_factory=dict)

    def initial(self, x: External) -> Tensor:
        """What a tensor from outside held before the call."""
        return self.observer.snapshots.before(x.held)

    def release(self) -> None:
        """The call is over: let go of what only its first run needed."""
        self.observer.snapshots.clear()
        self.observer.memories.clear()
        self.reals = []
        self.out = None
        for src in self.recording.sources:
            src.visits = [([None] * len(items), done) for items, done in src.visits]

    def undo(self) -> None:
        """Put everything of the user's back as it was before the call."""
        _undo(self.observer, self.watch)
        RandomWatch.put(self.random[0])


def observe(fn: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any], roots: Roots | None = None
            ) -> Observation:  # fmt: skip
    """Run one call for real and record it.

    Raises:
        CaptureError: when something in the loop cannot be represented exactly (nothing of the user's is changed then).
        Exception: what the user's function itself raises.
    """
    roots = roots or walk(fn, args, kwargs)
    generators = [g for g in roots.objects.values() if isinstance(g, torch.Generator)]
    ob = Observer(roots.tensors, list(roots.at.values()), generators)
    sources = Sources(ob, roots.loaders)
    sources.known_objects = {id(o) for o in roots.objects.values()} | {id(o) for o in roots.modules.values()}  # type: ignore[attr-defined]
    watch = Watch(roots)
    try:
        return _observed(fn, args, kwargs, roots, ob, sources, watch)
    except BaseException as e:
        for saved in ob.flags:
            restore_flags(saved)
        _undo(ob, watch)
        RandomWatch.put(list(ob.random.start.values()))
        if ob.refusal is not None and e is not ob.refusal:
            raise ob.refusal from e
        raise


def _observed(fn: Any, args: Any, kwargs: Any, roots: Roots, ob: Observer, sources: Sources, watch: Watch
              ) -> Observation:  # fmt: skip
    with contextlib.ExitStack() as stack:
        put = stack.enter_context
        put(quiet())
        put(default_dtype_kept())
        active = put(intercepted(ob))
        iterate, length = loader_patches(sources, roots.loaders, active)
        new_args = tuple(substitute(a, ("args", i), roots.batches, roots.iterators, sources) for i, a in enumerate(args))
        new_kwargs = {
            k: substitute(v, ("args", k), roots.batches, roots.iterators, sources) for k, v in kwargs.items()
        }
        put(_set(DataLoader, "__iter__", iterate))
        put(_set(DataLoader, "__len__", length))
        put(iterators_elsewhere(fn, roots, sources))
        put(sdpa_kernel(SDPBackend.MATH))
        put(torch.backends.mkldnn.flags(enabled=False))
        put(torch.enable_grad())
        put(eager_dynamo())
        put(current(ob))
        with ob:
            out = _call(ob, fn, new_args, new_kwargs)
            sources.check_random()
            ob.sites.end()
            if ob.refusal is not None:
                raise ob.refusal
            with ob.pause():
                calm, end = ob.random.undisturbed(), ob.random.states()
            narrow_counts(ob)
            found = _Finish(ob, roots, watch).finish(fn, out, sources, calm)
    start = list(ob.random.start.values())
    found[0].ignore = changed(roots, walk(fn, args, kwargs))
    return Observation(found[0], out, found[1], ob, watch, (start, end))


def _call(ob: Observer, fn: Callable[..., Any], args: Any, kwargs: Any) -> Any:
    ob.sites.begin(sys._getframe())
    return fn(*args, **kwargs)


def _undo(ob: Observer, watch: Watch) -> None:
    watch.restore()
    with torch.no_grad():
        for t in ob.rebound.values():
            held = next((x.held for x in ob.externals.values() if x.tensor is t), None)
            if held is not None:
                _BASE.data.__set__(t, held)
        ob.snapshots.restore()
    for t, g in ob.initial_grads.values():
        _BASE.grad.__set__(t, g)


def roots_generators(roots: Roots) -> Iterator[torch.Generator]:
    """Generators that can be found again at a later call."""
    return (g for g in roots.objects.values() if isinstance(g, torch.Generator))


def _needed(ob: Observer, results: Sequence[Var]) -> set[Var]:
    """Values that what the function returns is computed from."""
    live = set(results)
    for e in reversed(ob.builder.eqns):
        if any(v in live for v in e.outs):
            live.update(e.inputs)
    return live


class _Finish:
    """Results and effects of a run, while its tensors are still known."""

    def __init__(self, ob: Observer, roots: Roots, watch: Watch) -> None:
        self.ob = ob
        self.roots = roots
        self.watch = watch
        self.results: list[Var] = []
        self.reals: list[Any] = []
        self.known = {id(x.tensor) for x in ob.externals.values()}

    def finish(self, fn: Any, out: Any, sources: Sources, calm: bool) -> tuple[Recording, list[Any]]:
        """The recording, and the real value of each result."""
        ob = self.ob
        leaves, spec = pytree.tree_flatten(out)
        out_leaves = [self.output(x) for x in leaves]
        n_outputs = len(self.results)
        effects = self.effects()
        decisions = []
        for var, outcome, what, loc in ob.decisions:
            self.results.append(var)
            self.reals.append(None)
            decisions.append((len(self.results) - 1, outcome, what, loc))
        reusable, notes = self.reuse(sources, calm)
        grads = [(self.roots.tensors.get(id(t)), t, none) for t, none in ob.grad_reads.values()]
        warned = ob.gradients.dropped_ways(_needed(ob, self.results[:n_outputs]))
        recording = Recording(
            ob.builder.eqns, list(ob.externals.values()), self.results, n_outputs, spec, out_leaves, effects,
            sources.all, ob.steps, self.roots, reusable, notes, [], grads, getattr(fn, "__name__", "program"),
            place_of(fn), ob.stop_log, set(), arg_names(fn), decisions, list(roots_generators(self.roots)), warned,
        )  # fmt: skip
        return recording, self.reals

    def output(self, x: Any) -> Any:
        """A leaf of what the function returned."""
        if not isinstance(x, Tensor):
            return x
        return self.ref(x, self.ob.read(x, True))

    def ref(self, x: Tensor, var: Var) -> Ref:
        """A result of the program."""
        self.results.append(var)
        self.reals.append(x)
        return Ref(len(self.results) - 1, param=x.requires_grad)

    def value(self, x: Any) -> Any:
        """A value that an object of the user's now has."""
        if isinstance(x, dict):
            return {k: self.value(v) for k, v in x.items()}
        if isinstance(x, (list, tuple)) and not hasattr(x, "_fields"):
            return type(x)(self.value(v) for v in x)
        if not isinstance(x, Tensor) or x.layout is not torch.strided or id(x) in self.known:
            return x
        return self.ref(x, self.ob.current(x))

    def effects(self) -> list[Effect]:
        """Final values of everything of the user's that the run wrote."""
        ob = self.ob
        effects: list[Effect] = []
        for x in list(ob.externals.values()):
            if id(x.tensor) in ob.rebound and x.path is not None:
                effects.append(Effect("data", x.tensor, x.path, None, self.ref(x.tensor, ob.current(x.tensor))))
                x.written = True
            elif x.written and not x.parts:
                effects.append(Effect("copy", x.tensor, x.path, None, self.ref(x.held, ob.value(ob.handle(x.held)))))
        by_tensor = {id(x.tensor): x for x in ob.externals.values()}
        for t, g in ob.initial_grads.values():
            ext = by_tensor.get(id(t))
            if ext is None:
                continue
            if not ext.written:
                _BASE.grad.__set__(t, g)  # a meta-parameter: it receives the hypergradient alone
                if g is not None:
                    ob.snapshots.put(g)
                continue
            now = _BASE.grad.__get__(t)
            effects.append(Effect("grad", t, ext.path, None, None if now is None else self.value(now)))
        return effects + [self.effect(c) for c in self.watch.changes()]

    def effect(self, c: Change) -> Effect:
        """A change of Python state."""
        if c.kind == "state":
            p, name = c.key
            return Effect("state", c.owner, c.path, (p, name), self.value(c.value), self.roots.tensors.get(id(p)))
        return Effect(c.kind, c.owner, c.path, c.key, self.value(c.value))

    def reuse(self, sources: Sources, calm: bool) -> tuple[bool, list[str]]:
        """Whether later calls may use this recording, and what a reader should know."""
        ob = self.ob
        notes = []
        if sources.host_random:
            notes.append("recorded anew at every call: the loop draws from Python's or NumPy's random generator")
        if any(s.mixed for s in sources.all):
            notes.append("recorded anew at every call: an iterable yields values that are not tensors")
        if ob.random_is_data or ob.reordered or not calm:
            notes.append("recorded anew at every call: a random generator is set, forked or made in the loop")
        if ob.unplaced:
            where = next((str(x) for x in ob.unplaced if x is not None), "the loop")
            notes.append(f"recorded anew at every call: data is made at {where}")
        return not notes, notes

