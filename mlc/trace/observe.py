"""The first call of a structure: the user's function runs for real, and what it did becomes a recording."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils import _pytree as pytree
from torch.utils.data import DataLoader

from mlc.errors import CaptureError
from mlc.ir.core import Var
from mlc.ir.types import Loc
from mlc.trace.capture import Effect, Recording, Ref, arg_names, place_of
from mlc.trace.communication.rollcall import rollcall
from mlc.trace.environment import current, default_dtype_kept, eager_dynamo, iterators_elsewhere, quiet
from mlc.trace.gradients.dropped import dropped_ways
from mlc.trace.gradients.grads import put_grad
from mlc.trace.gradients.taken import Gradients
from mlc.trace.interception import intercepted
from mlc.trace.iterables import Sources, loader_patches, substitute, swapped
from mlc.trace.numbers.ending import retire
from mlc.trace.numbers.links import Linked, alive
from mlc.trace.numbers.mode import NumberMode
from mlc.trace.numbers.patches import followed
from mlc.trace.numbers.types import conversions, linked_max, linked_min
from mlc.trace.optimizers import narrow_counts, restore_flags
from mlc.trace.patches import replaced
from mlc.trace.python.changes import Changes, changes, place, without
from mlc.trace.python.found import Found
from mlc.trace.python.frames import is_user_module
from mlc.trace.python.inputs import walk
from mlc.trace.python.places import Path, Roots
from mlc.trace.python.reads import Reads
from mlc.trace.python.state import parts
from mlc.trace.python.world import World
from mlc.trace.recorder.externals import External
from mlc.trace.recorder.observer import Observer
from mlc.trace.recorder.randomness import RandomWatch

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
        world: The user's objects as they were.
        found: What Python read.
        key: What must be equal for the recording to be used again.
        ignored: Places that the call changes without reading them.
        random: States of the generators at the start and at the end of the run.
    """

    recording: Recording
    out: Any
    reals: list[Any]
    observer: Observer
    world: World
    found: Found
    key: list[Any]
    ignored: set[Any]
    random: tuple[list[Any], list[Any]]
    items: dict[tuple[int, int], list[Any]] = field(default_factory=dict)

    def initial(self, x: External) -> Tensor:
        """What a tensor from outside held before the call."""
        return self.observer.snapshots.before(x.held) if x.kept is None else x.kept

    def release(self) -> None:
        """The call is over: let go of what only its first run needed."""
        self.observer.snapshots.clear()
        self.observer.memories.clear()
        self.observer.ended = True
        self.observer.rehearsal.clear()
        self.reals = []
        self.out = None
        for src in self.recording.sources:
            src.visits = [([None] * len(items), done) for items, done in src.visits]

    def undo(self) -> None:
        """Put everything of the user's back as it was before the call."""
        _undo(self.observer, self.world)
        RandomWatch.put(self.random[0])


def observe(
    fn: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any], drawn: dict[Path, list[Any]] | None = None
) -> Observation:
    """Run one call for real and record it.

    Args:
        fn: The user's function.
        args: Of the call.
        kwargs: Of the call.
        drawn: Items taken from iterators before, which come first.

    Raises:
        CaptureError: when something in the loop cannot be represented exactly (nothing of the user's is changed then).
        Exception: what the user's function itself raises.
    """
    roots = walk(fn, args, kwargs)
    roots.drawn = drawn or {}
    world = World(roots)
    generators = [g for g in roots.objects.values() if isinstance(g, torch.Generator)]
    ob = Observer(roots.tensors, list(roots.at.values()), generators)
    sources = Sources(ob, roots)
    ob.roll = rollcall(getattr(fn, "__qualname__", type(fn).__name__))
    try:
        seen = _observed(fn, args, kwargs, roots, ob, sources, world)
        if ob.roll is not None:
            ob.roll.end()
            seen.recording.circle = ob.roll.circle
            seen.recording.averaged = ob.parallel.averaged()
        return seen
    except BaseException as e:
        if ob.roll is not None:
            ob.roll.failed(e)
        for saved in ob.flags:
            restore_flags(saved)
        _undo(ob, world)
        RandomWatch.put(list(ob.random.start.values()))
        if ob.refusal is not None and e is not ob.refusal:
            raise ob.refusal from e
        raise
    finally:
        retire(ob)
        ob.ended = True


def _observed(
    fn: Any, args: Any, kwargs: Any, roots: Roots, ob: Observer, sources: Sources, world: World
) -> Observation:
    with contextlib.ExitStack() as stack:
        put = stack.enter_context
        put(quiet())
        put(default_dtype_kept())
        active, gradients = put(intercepted(ob))
        iterate, length = loader_patches(sources, roots.loaders, active)
        swaps = put(swapped())
        given = {**dict(enumerate(args)), **kwargs}
        new = {k: substitute(v, ("args", k), roots.batches, roots.iterators, sources, swaps) for k, v in given.items()}
        new_args, new_kwargs = tuple(new[i] for i in range(len(args))), {k: new[k] for k in kwargs}
        put(replaced(DataLoader, "__iter__", iterate))
        put(replaced(DataLoader, "__len__", length))
        put(_optimizers_numbers())
        put(sdpa_kernel(SDPBackend.MATH))
        put(torch.backends.mkldnn.flags(enabled=False))
        put(torch.enable_grad())
        put(eager_dynamo())
        put(current(ob))
        with (
            ob,
            iterators_elsewhere(fn, roots, sources, swaps),
            followed(),
            conversions(_user_modules(fn)),
            NumberMode(ob),
        ):
            swaps.ready()
            out = _call(ob, fn, new_args, new_kwargs)
            swaps.back()
        reads = ob.reads
        assert reads is not None
        with ob:
            sources.check_random()
            ob.sites.end()
            _refuse_hooks_of_nodes(ob, reads)
            ob.parallel.end()
            _refuse_unseen(ob)
            if ob.refusal is not None:
                raise ob.refusal
            with ob.pause():
                calm, end = ob.random.undisturbed(), ob.random.states()
            narrow_counts(ob)
            with ob.pause():
                found = reads.found(fn, args, kwargs, world)
                kept = walk(fn, args, kwargs, found, world)
                grown = world.grown(kept.batches)
                if grown:
                    found = replace(found, changed=grown)
                    kept = walk(fn, args, kwargs, found, world)
            finish = _Finish(ob, gradients, kept, world)
            recording = finish.finish(fn, out, found, sources, calm)
    start = list(ob.random.start.values())
    ignored = finish.changes.ignored
    key = list(without(kept.key, ignored))
    return Observation(recording, out, finish.reals, ob, world, found, key, ignored, (start, end))


def _call(ob: Observer, fn: Callable[..., Any], args: Any, kwargs: Any) -> Any:
    with Reads() as reads:
        ob.reads = reads
        ob.sites.begin(sys._getframe())
        return fn(*args, **kwargs)


def _refuse_hooks_of_nodes(ob: Observer, reads: Reads) -> None:
    """Hooks that the loop put on nodes of PyTorch's graph (``grad_fn``), which run unseen."""
    if reads.hooked_nodes:
        code, line = reads.hooked_nodes[0]
        ob.refusal = ob.refusal or CaptureError(
            "a backward hook is put on a node of PyTorch's graph (grad_fn)",
            loc=Loc(code.co_filename, line, code.co_name),
            advice="put it on the tensor instead: t.register_hook(...)",
        )


def _refuse_unseen(ob: Observer) -> None:
    """Processes communicated in a backward pass, by other code than what is recorded."""
    if ob.unseen and not ob.parallel.seen:
        ob.refusal = ob.refusal or CaptureError(
            "processes communicate in the backward pass, unseen", loc=ob.unseen[0],
            advice="let gradients be averaged by DistributedDataParallel, or by all_reduce after backward()",
        )  # fmt: skip


def _user_modules(fn: object) -> list[dict[str, Any]]:
    """Globals of the user's modules: of the function's own, and of all that are no library."""
    scopes = [vars(m) for m in list(sys.modules.values()) if is_user_module(m)]
    own = getattr(getattr(fn, "__func__", fn), "__globals__", None)
    return scopes if own is None or any(s is own for s in scopes) else [*scopes, own]


@contextlib.contextmanager
def _optimizers_numbers() -> Iterator[None]:
    """Adafactor takes ``max(1.0, norm.item())``: the link is kept there."""
    from torch.optim import _adafactor

    scope = vars(_adafactor)
    scope.update(min=linked_min, max=linked_max)
    try:
        yield
    finally:
        del scope["min"], scope["max"]


def _undo(ob: Observer, world: World) -> None:
    with torch.no_grad():
        ob.snapshots.restore()
    world.restore()
    for t, g in ob.initial_grads.values():
        put_grad(t, g)


def _needed(ob: Observer, results: Sequence[Var]) -> set[Var]:
    """Values that what the function returns is computed from."""
    live = set(results)
    for e in reversed(ob.builder.eqns):
        if any(v in live for v in e.outs):
            live.update(e.inputs)
    return live


class _Finish:
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
        warned = [*dropped_ways(self.gradients, _needed(ob, given)), *self.gradients.hooks.unheard(ends)]
        generators = [g for g in self.roots.objects.values() if isinstance(g, torch.Generator)]
        return Recording(
            ob.builder.eqns, list(ob.externals.values()), self.results, n_outputs, spec, out_leaves, effects,
            sources.all, ob.steps, self.roots, reusable, notes, [], grads, getattr(fn, "__name__", "program"),
            place_of(fn), ob.stop_log, arg_names(fn), decisions, generators, warned,
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
