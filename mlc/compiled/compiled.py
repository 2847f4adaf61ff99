"""The front door: :func:`compile` turns a training loop into a function with an exact hypergradient."""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, overload

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from mlc.compiled.commit import commit, storages
from mlc.compiled.growth import Counts, longer, open_loops, planned_again
from mlc.compiled.report import Report
from mlc.compiled.validate import Redrawn, compare, same
from mlc.errors import BudgetError, DifferentiationError, MemoryWarning, MlcWarning, PlanError
from mlc.ir.digest import digest
from mlc.ir.program import Program
from mlc.passes.explain import size_text, time_text
from mlc.passes.options import check_options
from mlc.passes.plan import Plan, stages_for
from mlc.passes.planner import make_plan
from mlc.passes.retrip import Group
from mlc.progress import progress
from mlc.runtime.call import Executor, Run
from mlc.runtime.feeds import Drawer, Stale
from mlc.trace.build import build_program
from mlc.trace.capture import Recording, Ref
from mlc.trace.changes import without
from mlc.trace.inputs import Path, Roots, walk
from mlc.trace.iterables import batch_tensors
from mlc.trace.observe import Observation, observe
from mlc.trace.randomness import RandomWatch
from mlc.trace.reads import Found
from mlc.trace.tracer import External

__all__ = ["CompiledFunction", "compile"]


@dataclass
class _Entry:
    """One traced program with everything needed to use it again."""

    key: list[Any]
    found: Found
    ignored: set[Path]
    recording: Recording
    program: Program
    plan: Plan
    executor: Executor
    lengths: dict[Path, int]
    calls: int = 0
    smaller: bool = False  # planned again because memory was refused
    loops: dict[int, Group] = field(default_factory=dict)  # open ones, by the iterable that they run over
    fitting: Counts = field(default_factory=dict)  # trips that were found to fit


class _Node(torch.autograd.Function):
    """The result in autograd: meta-parameters in, outputs out."""

    @staticmethod
    def forward(ctx: Any, call: _Call, *metas: Tensor) -> Any:
        outs = call.run()
        ctx.call = call
        ctx.save_for_backward(*metas)
        differentiable = {i for i in call.entry.executor.stages.cotangents}
        ctx.mark_non_differentiable(*[t for i, t in enumerate(outs) if i not in differentiable])
        ctx.set_materialize_grads(True)
        return tuple(outs)

    @staticmethod
    def backward(ctx: Any, *cts: Tensor) -> Any:
        if torch.is_grad_enabled():
            raise DifferentiationError(
                "create_graph=True on the result of a compiled function",
                advice="put the level that differentiates this hypergradient inside the compiled function",
            )
        _ = ctx.saved_tensors  # raises as autograd does when the graph was freed or a meta-parameter changed
        keep = torch._C._autograd._get_current_graph_task_keep_graph()
        return (None, *ctx.call.gradients(cts, keep))


class _Call:
    """One call of a compiled function; ``seen``: the run that was recorded, where this is the first."""

    def __init__(self, owner: CompiledFunction, entry: _Entry, roots: Roots, seen: Observation | None = None) -> None:
        self.owner = owner
        self.entry = entry
        self.roots = roots
        self.seen = seen
        self.inputs = _inputs(entry, roots)
        self.done: Run | None = None
        self.drawer = Drawer(self._open, batch_tensors) if seen is None else Redrawn(seen)

    def metas(self) -> list[Tensor]:
        return [self.inputs[i] for i in self.entry.program.metas]

    def _open(self, source: int, visit: int) -> Iterator[Any]:
        return iter(_iterable(self.entry, self.roots, source))

    def run(self) -> list[Tensor]:
        """Forward stage, then the user's objects are brought to their final state."""
        return self._later() if self.seen is None else self._first(self.seen)

    def _first(self, seen: Observation) -> list[Tensor]:
        """The user's function has run: the program must reproduce it; what is given out is what it computed."""
        entry = self.entry
        recording = entry.recording
        own = [seen.initial(x) for x in recording.externals]
        RandomWatch.put(seen.random[0])
        try:
            run = entry.executor.forward(own, self.drawer)
        finally:
            RandomWatch.put(seen.random[1])
        if self.owner.options.get("verify", "values") is not None:
            compare(seen, run.results, lambda i: _made_at(recording, i))
        run.results = []
        self.done = run
        self.owner.report = Report.of(entry.plan, run)
        return [_tensor(t) for t in seen.reals[: entry.program.n_outputs]]

    def _later(self) -> list[Tensor]:
        entry = self.entry
        written = {id(self.roots.at.get(e.path or (), e.owner)) for e in entry.recording.effects if e.kind == "copy"}
        own = [t.detach().clone() if id(t) in written else t for t in self.inputs]
        run = entry.executor.forward(own, self.drawer)
        for i, outcome, what, loc in entry.recording.decisions:
            if not same(run.results[i], outcome):
                raise Stale(f"{what} is another one at {loc}")
        for s, src in enumerate(entry.recording.sources):
            for v, (_, exhausted) in enumerate(src.visits):
                if exhausted and not src.indexed and not self.drawer.finished(s, v):
                    raise Stale("an iterable has more items than before")
        n = entry.program.n_outputs
        kept = storages([*run.saved, *self.inputs])
        outs = []
        for t in run.results[:n]:
            mine = t.untyped_storage()._cdata
            outs.append(t.clone() if mine in kept else t)
            kept.add(mine)
        commit(entry.recording.effects, run.results, self.roots, kept)
        run.results = []
        self.done = run
        self.owner.report = Report.of(entry.plan, run)
        return outs

    def gradients(self, cts: Sequence[Tensor], keep: bool) -> list[Tensor | None]:
        """Hypergradient for every meta-parameter (None: no path)."""
        assert self.done is not None
        stages = self.entry.executor.stages
        found = self.entry.executor.backward(self.done, [cts[i] for i in stages.cotangents], keep)
        self.owner.report = Report.of(self.entry.plan, self.done)
        by_input = dict(zip(stages.gradients, found, strict=True))
        return [by_input.get(i) for i in self.entry.program.metas]


def _tensor(real: Any) -> Tensor:
    """What the run returned, apart from PyTorch's graph of it."""
    return real.detach() if isinstance(real, Tensor) else torch.tensor(real, dtype=_KINDS.get(type(real), torch.float64))


_KINDS = {bool: torch.bool, int: torch.int64, complex: torch.complex128}


def _made_at(recording: Recording, i: int) -> Any:
    """The user's line that made a result."""
    v = recording.results[i]
    return next((e.loc for e in reversed(recording.eqns) if v in e.outs), recording.loc)


def _iterable(entry: _Entry, roots: Roots, source: int) -> Any:
    """The iterable that now stands where this one stood."""
    src = entry.recording.sources[source]
    if src.path is None:
        return src.object
    found = roots.batches.get(src.path)
    found = roots.iterators.get(src.path) if found is None else found
    found = roots.objects.get(src.path) if found is None else found
    return src.object if found is None else found


def _inputs(entry: _Entry, roots: Roots) -> list[Tensor]:
    return [_found(x, roots) for x in entry.recording.externals]


class CompiledFunction:
    """A function that runs a traced training loop and can be differentiated through it.

    Attributes:
        program: The program of the last call (None before the first).
        plan: Its plan.
        report: What the last call measured.
        recordings: How often the user's function itself ran: at the first call of every structure, and where a later
            call found something else than a recording had.
    """

    def __init__(self, fn: Callable[..., Any], options: dict[str, Any]) -> None:
        functools.update_wrapper(self, fn)
        self.fn = fn
        self.options = options
        self.report: Report | None = None
        self.recordings = 0
        self._entries: list[_Entry] = []
        self._planned: dict[str, _Entry] = {}
        self._last: _Entry | None = None

    @property
    def program(self) -> Program | None:
        """The program of the last call."""
        return None if self._last is None else self._last.program

    @property
    def plan(self) -> Plan | None:
        """The plan of the last call."""
        return None if self._last is None else self._last.plan

    def __get__(self, instance: Any, owner: Any = None) -> Any:
        return self if instance is None else functools.partial(self, instance)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Run the loop; the result has the structure that the function returns."""
        entry, roots = self._find(args, kwargs)
        if entry is None:
            return self._record(args, kwargs, {})
        if entry.loops:
            self._fit(entry, roots)
        call = _Call(self, entry, roots)
        try:
            return self._run(call)
        except Stale:
            if entry in self._entries:
                self._entries.remove(entry)
        return self._record(args, kwargs, _given_back(entry, roots, call.drawer))

    def _record(self, args: Any, kwargs: Any, drawn: dict[Path, list[Any]]) -> Any:
        """The function runs for real; what is compiled from that must reproduce it.

        Args:
            args: Of the call.
            kwargs: Of the call.
            drawn: Items that were taken from iterators before it turned out that this call is to be recorded.
        """
        self.recordings += 1
        with progress(f"compiling {getattr(self.fn, '__name__', 'a function')}") as say:
            say("recording")
            seen = observe(self.fn, args, kwargs, drawn)
            try:
                entry = self._compile(seen, say)
                result = self._run(_Call(self, entry, seen.recording.roots, seen), seen)
            except BaseException:
                seen.undo()
                raise
        for w in entry.program.warnings:
            warnings.warn(MlcWarning(w), stacklevel=3)
        if seen.recording.reusable:
            self._entries.insert(0, entry)
            del self._entries[_MOST:]
        seen.release()
        return result

    def _run(self, call: _Call, seen: Observation | None = None) -> Any:
        entry = call.entry
        self._last = entry
        entry.calls += 1
        states = _states(entry)
        metas = call.metas()
        try:
            if torch.is_grad_enabled() and metas and entry.executor.stages.cotangents:
                outs = list(_Node.apply(call, *metas))  # type: ignore[no-untyped-call]
            else:
                outs = call.run()
        except BaseException as e:
            RandomWatch.put(states)
            if not _refused_memory(e) or entry.smaller:
                raise
            self._shrink(entry)
            return self._run(_Call(self, entry, call.roots, seen), seen)
        rec = entry.recording
        leaves = [_leaf(x, outs) for x in rec.out_leaves]
        return pytree.tree_unflatten(leaves, rec.out_spec)

    def _fit(self, entry: _Entry, roots: Roots) -> None:
        """Plan again when loops are longer than any that is known to fit, and would need more than the budget.

        Raises:
            BudgetError: when no plan fits; the entry stays as it was.
        """
        more = longer(entry.loops, lambda s: _iterable(entry, roots, s), entry.fitting)
        if not more:
            return
        made = planned_again(entry.program, entry.plan, {**entry.fitting, **more}, _planning(self.options), entry.smaller)
        if made is not None:
            entry.program, entry.plan, needed = made
            entry.executor = Executor(stages_for(entry.program, entry.plan), entry.plan.backend)
            entry.loops = open_loops(entry.program)
            what = ", ".join(f"{n} trips ({place.split('/')[-1]})" for (place, _), n in more.items())
            warnings.warn(
                MemoryWarning(
                    f"a loop is longer than planned for: {what}; {size_text(needed)} would not fit. Planned again: "
                    f"{time_text(entry.plan.seconds)}, {size_text(entry.plan.peak_bytes)}"
                ),
                stacklevel=3,
            )
        entry.fitting.update(more)

    def _shrink(self, entry: _Entry) -> None:
        """Plan again for half the memory, or for as little as can be."""
        budget = entry.plan.peak_bytes // 2
        try:
            entry.plan = make_plan(entry.program, **{**_planning(self.options), "memory": max(budget, 1)})
        except BudgetError as why:
            entry.plan = make_plan(entry.program, **{**_planning(self.options), "memory": why.least})
        entry.executor = Executor(stages_for(entry.program, entry.plan), entry.plan.backend)
        entry.smaller = True
        warnings.warn(
            MemoryWarning(
                f"the device refused memory; planned again for {size_text(entry.plan.peak_bytes)}, called once more. "
                f"Nothing of yours was changed in between. Try: memory={entry.plan.peak_bytes}"
            ),
            stacklevel=4,
        )

    def _find(self, args: Any, kwargs: Any) -> tuple[_Entry | None, Roots]:
        """A recording that this call may use, and the call's objects at its places."""
        walks: dict[Any, Roots] = {}
        for entry in self._entries:
            roots = walks.get(entry.found)
            if roots is None:
                roots = walks[entry.found] = walk(self.fn, args, kwargs, entry.found)
            if _fits(entry, roots):
                return entry, roots
        return None, Roots()

    def _compile(self, seen: Observation, say: Callable[[str], None]) -> _Entry:
        """A program and its plan; a plan made before for an equal program serves again."""
        rec = seen.recording
        roots = rec.roots
        program = build_program(rec, self.options.get("stop_gradient", "all"))
        key = digest(program)
        before = self._planned.get(key)
        if before is not None and not before.smaller:
            plan, executor = before.plan, Executor(stages_for(program, before.plan), before.plan.backend)
        else:
            say("planning")
            plan = make_plan(program, **_planning(self.options))
            executor = Executor(stages_for(program, plan), plan.backend)
        lengths = {
            s.path: len(s.object) for s in rec.sources
            if s.path is not None and hasattr(s.object, "__len__") and not s.generic
        }  # fmt: skip
        lengths.update({p: len(b) for p, b in roots.batches.items() if p not in {s.path for s in rec.sources}})
        entry = _Entry(seen.key, seen.found, seen.ignored, rec, program, plan, executor, lengths)
        entry.loops = open_loops(program) if rec.reusable else {}
        self._planned[key] = entry
        return entry


def _planning(options: dict[str, Any]) -> dict[str, Any]:
    """The options that planning takes."""
    return {k: v for k, v in options.items() if k != "verify"}


_MOST = 16  # recordings kept of one function


def _states(entry: _Entry) -> list[Any]:
    """States of the generators that a program draws from."""
    return [(None, torch.get_rng_state()), *((g, g.get_state()) for g in entry.recording.generators)]


def _given_back(entry: _Entry, roots: Roots, drawer: Drawer) -> dict[Path, list[Any]]:
    """Items that a call drew from iterators before it turned out to be another program: they come first now."""
    sources = enumerate(entry.recording.sources)
    return {src.path: drawer.items[s] for s, src in sources if src.once and src.path is not None and s in drawer.items}


def _refused_memory(e: BaseException) -> bool:
    """Whether an allocator gave up."""
    return isinstance(e, (torch.OutOfMemoryError, MemoryError)) or (
        isinstance(e, RuntimeError) and "can't allocate memory" in str(e)
    )


def _fits(entry: _Entry, roots: Roots) -> bool:
    rec = entry.recording
    if list(without(roots.key, entry.ignored)) != entry.key:
        return False
    for path, n in entry.lengths.items():
        found = roots.batches.get(path, roots.objects.get(path))
        if found is not None and len(found) != n:
            return False
    for where, t, none in rec.grad_guards:
        now = roots.at.get(where, t) if where is not None else t
        if (now.grad is None) != none:
            return False
    return all(g.holds(lambda x: _found(x, roots)) for g in rec.guards)


def _found(x: External, roots: Roots) -> Tensor:
    """The tensor that now stands where ``x`` stood."""
    if x.parts:
        return _whole(_found(x.parts[0], roots), x.held.dtype)
    now = roots.at.get(x.path) if x.path is not None else None
    return x.tensor if now is None else now


def _whole(t: Tensor, dtype: torch.dtype) -> Tensor:
    """Everything in the memory of a tensor, as one vector."""
    s = t.untyped_storage()
    with torch.no_grad():
        return torch.empty(0, dtype=dtype, device=t.device).set_(s, 0, (s.nbytes() // dtype.itemsize,), (1,))


def _leaf(x: Any, outs: list[Tensor]) -> Any:
    if not isinstance(x, Ref):
        return x
    return x.kind(outs[x.index].item()) if x.number else outs[x.index]


@overload
def compile(fn: Callable[..., Any], /) -> CompiledFunction: ...


@overload
def compile(
    fn: None = None, *, memory: int | str | None = None, backend: str = "auto", stop_gradient: str = "all",
    flows: Any = None, precision: Any = None, mesh: Any = None, levers: Mapping[str, Any] | None = None,
    verify: str | None = "values",
) -> Callable[[Callable[..., Any]], CompiledFunction]: ...  # fmt: skip


def compile(fn: Any = None, *, memory: Any = None, backend: str = "auto", stop_gradient: str = "all",
            flows: Any = None, precision: Any = None, mesh: Any = None, levers: Mapping[str, Any] | None = None,
            verify: str | None = "values") -> Any:  # fmt: skip
    """Compile a training loop so that its result can be differentiated through the training.

    Args:
        fn: An ordinary function with a training loop in it; returns a scalar loss or a tuple, list or dict with
            tensors.  Meta-parameters are found: every tensor requiring grad that the loop reads and does not train.
        memory: Budget for what a call allocates beyond its inputs: bytes, ``"800MiB"``, ``"min"`` or None (what the
            device has free).
        backend: ``"interpreter"``, ``"inductor"`` (compiles; see ``docs/backends.md``) or ``"auto"``: Inductor where
            its compilation is predicted to be paid back within some hundred calls.
        stop_gradient: ``"all"``: a ``detach``, a read of ``.data`` or a value computed under ``no_grad`` stops the
            gradient at every level on its way into a loss (what is written into state in place is an update and passes);
            ``"inner"``: only the gradient taken by the level it stands in; ``"torch"``: state that PyTorch's own
            autograd would not follow (running statistics, averages) is constant, too.
        flows: Which way derivatives go; None: chosen. ``"mixed"`` (reverse through the loops, inner gradients by one
            forward sweep), ``"reverse"`` (reverse over reverse) or ``"forward"`` (one tangent per element of the
            meta-parameters through the loops: memory does not grow with the number of steps). Or a dict of these by
            name of a level (``"L1"``), meta-parameter (``"lr"``) or flow (``"lr -> L1"``) as ``plan.explain()`` prints
            them. ``"forward"`` falls back to ``"mixed"`` where an operator cannot go forward; the plan says why.
        precision: Reserved; must be None (exact: the precision of the program).
        mesh: Reserved; must be None (one device).
        levers: Decisions about memory that are not the planner's but yours, whatever the budget: ``"price"`` (seconds
            that keeping a byte is worth, float; 0 keeps all that saves time), ``"slots"`` (sets of states kept per
            loop, or None: all), ``"parts"`` (micro-batches), ``"offload"`` (bytes from which on what a step saves
            rests on the host, or None: never).
        verify: What the first call of a program compares with the real run of the function: ``"values"`` (results and
            final states), ``"gradient"`` (one directional difference of the gradient, too) or None.

    Returns:
        A :class:`CompiledFunction` (or a decorator, when called without ``fn``).

    Raises:
        PlanError: for options that make no sense.
    """
    options = dict(
        memory=memory, backend=backend, stop_gradient=stop_gradient, flows=flows, precision=precision, mesh=mesh,
        levers=levers,
    )  # fmt: skip
    check_options(options)
    if verify not in ("values", "gradient", None):
        raise PlanError(f"verify={verify!r}", advice='use "values", "gradient" or None')
    options["verify"] = verify
    if fn is None:
        return lambda f: CompiledFunction(f, options)
    return CompiledFunction(fn, options)
