"""The front door: :func:`compile` turns a training loop into a function with an exact hypergradient."""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, overload

import torch
from torch.utils import _pytree as pytree

from mlc.compiled.call import Call, Node, leaf
from mlc.compiled.entry import Entry, executor_of, fits, generator_states, given_back, iterable
from mlc.compiled.growth import longer, open_loops, planned_again
from mlc.compiled.particles import Particles, asked
from mlc.compiled.report import Report
from mlc.compiled.together import agreed, averages, check_stages, mark, plan_together, world_now
from mlc.errors import BudgetError, MemoryWarning, MlcWarning, PlanError, PrecisionWarning
from mlc.ir.digest import digest
from mlc.ir.lowered.contract import Pass
from mlc.ir.program import Program
from mlc.passes.cost.equations import device_of
from mlc.passes.planning.options import check_options, planning
from mlc.passes.responses.asked import lost, uncut
from mlc.progress import progress
from mlc.runtime.circle import Circle, circle_of
from mlc.runtime.interpreter.feeds import Stale
from mlc.trace.build import build_program
from mlc.trace.observe import Observation, observe
from mlc.trace.python.inputs import walk
from mlc.trace.python.places import Path, Roots
from mlc.trace.recorder.randomness import RandomWatch
from mlc.units import size_text, time_text
from mlc.view.plan import Plan, make_plan

__all__ = ["CompiledFunction", "compile"]


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
        self.particles = Particles()
        self._missed = 0  # calls in a row that a guard sent back to be recorded
        self._why = ""
        self.circle: Circle | None = None  # processes that have to call alike, once a call has communicated
        self._entries: list[Entry] = []
        self._planned: dict[str, Entry] = {}
        self._last: Entry | None = None

    @property
    def program(self) -> Program | None:
        """The program of the last call."""
        return None if self._last is None else self._last.program

    @property
    def plan(self) -> Plan | None:
        """The plan of the last call."""
        return None if self._last is None else self._last.plan

    def restart(self) -> None:
        """The next call is the first window of a new unroll.

        For :class:`mlc.Evolution` with ``persistent=True``, whose particles live from call to call: where the user's
        state goes back to a beginning.  Without it, state that was changed from outside is found out, and said once.
        """
        self.particles.restart()

    def __get__(self, instance: Any, owner: Any = None) -> Any:
        return self if instance is None else functools.partial(self, instance)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Run the loop; the result has the structure that the function returns."""
        drawn: dict[Path, list[Any]] = {}
        if self.circle is not None and not self.circle.stands:
            self.circle = None
        for entry, roots in self._agreed(self._find(args, kwargs)):
            if entry.loops and self.circle is None:
                self._fit(entry, roots)
            call = Call(self, entry, roots)
            try:
                found = self._run(call)
            except Stale as why:
                entry.stale += 1
                self._why = str(why)
                if entry.stale == _TRIES and entry in self._entries:
                    self._entries.remove(entry)
                drawn = given_back(entry, roots, call.drawer)
                if drawn or self.circle is not None:
                    break
            else:
                entry.stale = self._missed = 0
                return found
        return self._record(args, kwargs, drawn)

    def _record(self, args: Any, kwargs: Any, drawn: dict[Path, list[Any]]) -> Any:
        """The function runs for real; what is compiled from that must reproduce it.

        Args:
            args: Of the call.
            kwargs: Of the call.
            drawn: Items that were taken from iterators before it turned out that this call is to be recorded.
        """
        self.recordings += 1
        self._tell_of_misses()
        with progress(f"compiling {getattr(self.fn, '__name__', 'a function')}") as say:
            say("recording")
            seen = observe(self.fn, args, kwargs, drawn, self.options.get("flows"))
            try:
                self.circle = circle_of(seen.recording.circle) or self.circle
                entry = self._compile(seen, say)
                result = self._run(Call(self, entry, seen.recording.roots, seen), seen)
            except BaseException:
                seen.undo()
                raise
        responses = entry.plan.modes.responses
        said = (*lost(entry.program, responses), *uncut(entry.program, responses))
        for w in (*entry.program.warnings, *map(MlcWarning, said)):
            warnings.warn(w, stacklevel=3)
        if entry.cost is not None and not entry.cost.ok:
            warnings.warn(PrecisionWarning(entry.cost.warning), stacklevel=3)
        if seen.recording.reusable:
            self._entries.insert(0, entry)
            del self._entries[_MOST:]
        seen.release()
        return result

    def _tell_of_misses(self) -> None:
        """A call whose guards never hold costs a recording each time: say so, once."""
        self._missed += bool(self._why)
        if self._missed == _MISSES:
            name = getattr(self.fn, "__name__", "the function")
            said = f"{name} was recorded anew at {_MISSES} calls in a row, the last time because {self._why}"
            warnings.warn(
                MlcWarning(f"{said}: every call costs a recording (explain() lists the guards)"), stacklevel=4
            )
        self._why = ""

    def _run(self, call: Call, seen: Observation | None = None) -> Any:
        entry = call.entry
        self._last = entry
        entry.calls += 1
        states = generator_states(entry)
        metas = call.metas()
        try:
            apply: Any = Node.apply
            outs = list(apply(call, *metas)) if torch.is_grad_enabled() and metas else call.run()
        except BaseException as e:
            RandomWatch.put(states)
            if not _refused_memory(e) or entry.smaller or self.circle is not None:
                raise
            self._shrink(entry)
            return self._run(Call(self, entry, call.roots, seen), seen)
        rec = entry.recording
        leaves = [leaf(x, outs) for x in rec.out_leaves]
        return pytree.tree_unflatten(leaves, rec.out_spec)

    def _fit(self, entry: Entry, roots: Roots) -> None:
        """Plan again when loops are longer than any that is known to fit, and would need more than the budget.

        Raises:
            BudgetError: when no plan fits; the entry stays as it was.
        """
        more = longer(entry.loops, lambda s: iterable(entry, roots, s), entry.fitting)
        if not more:
            return
        made = planned_again(
            entry.program, entry.plan, {**entry.fitting, **more}, planning(self.options), entry.smaller
        )
        if made is not None:
            entry.program, entry.plan, needed = made
            entry.executor = executor_of(entry.program, entry.plan)
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

    def _shrink(self, entry: Entry) -> None:
        """Plan again for half the memory, or for as little as can be."""
        budget = entry.plan.peak_bytes // 2
        try:
            entry.plan = make_plan(entry.program, **{**planning(self.options), "memory": max(budget, 1)})
        except BudgetError as why:
            entry.plan = make_plan(entry.program, **{**planning(self.options), "memory": why.least})
        entry.executor = executor_of(entry.program, entry.plan)
        entry.smaller = True
        warnings.warn(
            MemoryWarning(
                f"the device refused memory; planned again for {size_text(entry.plan.peak_bytes)}, called once more. "
                f"Nothing of yours was changed in between. Try: memory={entry.plan.peak_bytes}"
            ),
            stacklevel=4,
        )

    def _find(self, args: Any, kwargs: Any) -> Iterator[tuple[Entry, Roots]]:
        """Recordings that this call may use, if their guards hold, and the call's objects at their places."""
        walks: dict[Any, Roots] = {}
        left = _TRIES
        for entry in list(self._entries):
            roots = walks.get(entry.found)
            if roots is None:
                roots = walks[entry.found] = walk(self.fn, args, kwargs, entry.found)
            if left and entry.world == world_now() and fits(entry, roots):
                left -= 1
                yield entry, roots

    def _agreed(self, found: Iterator[tuple[Entry, Roots]]) -> Iterator[tuple[Entry, Roots]]:
        """Recordings that this call may use; on many processes the first one, if it is the same on all of them."""
        if self.circle is None:
            yield from found
            return
        entry, roots = next(found, (None, None))
        lengths = [] if entry is None or roots is None else [
            len(x) for s in entry.loops if hasattr(x := iterable(entry, roots, s), "__len__")
        ]  # fmt: skip
        number = mark(entry, lengths)
        if self.circle.alike(number) and entry is not None and roots is not None:
            yield entry, roots

    def _compile(self, seen: Observation, say: Callable[[str], None]) -> Entry:
        """A program and its plan; a plan made before for an equal program serves again."""
        rec = seen.recording
        roots = rec.roots
        circle, options = self.circle, self.options
        program = agreed(circle, lambda: build_program(rec, options.get("stop_gradient", "all"), options.get("flows")))
        key = digest(program)
        before = self._planned.get(key)
        have = before is not None and not before.smaller
        have = have if circle is None else circle.all(have)  # all of them ask, whatever they have
        if before is not None and have:
            plan, executor = before.plan, executor_of(program, before.plan)
        else:
            say("planning")
            plan, executor = plan_together(
                circle, program, lambda: make_plan(program, **planning(self.options)), device_of(program.region),
                lambda p: executor_of(program, p), self.options.get("passes"),
            )  # fmt: skip
        check_stages(circle, executor.stages, program.loc)
        lengths = {
            s.path: len(s.object) for s in rec.sources
            if s.path is not None and hasattr(s.object, "__len__") and not s.generic
        }  # fmt: skip
        lengths.update({p: len(b) for p, b in roots.batches.items() if p not in {s.path for s in rec.sources}})
        entry = Entry(seen.key, seen.found, seen.ignored, rec, program, plan, executor, lengths)
        entry.loops = open_loops(program) if rec.reusable else {}
        entry.world = world_now()
        entry.particles = asked(executor.stages.forward)
        entry.averages = averages(rec, self.options.get("mesh"))
        self._planned[key] = entry
        return entry


_MOST = 16  # recordings kept of one function
_MISSES = 4  # calls in a row that were recorded anew because a guard did not hold: worth a warning
_TRIES = 3  # recordings whose guards are tried before a call is recorded; times in a row that one may fail


def _refused_memory(e: BaseException) -> bool:
    """Whether an allocator gave up."""
    return isinstance(e, (torch.OutOfMemoryError, MemoryError)) or (
        isinstance(e, RuntimeError) and "can't allocate memory" in str(e)
    )


@overload
def compile(fn: Callable[..., Any], /) -> CompiledFunction: ...


@overload
def compile(
    fn: None = None, *, memory: int | str | None = None, backend: str = "auto", stop_gradient: str = "all",
    flows: Any = None, precision: Any = None, mesh: Any = None, levers: Mapping[str, Any] | None = None,
    passes: Sequence[Pass] | None = None, verify: str | None = "values", nonfinite: str | None = None,
) -> Callable[[Callable[..., Any]], CompiledFunction]: ...  # fmt: skip


def compile(fn: Any = None, *, memory: Any = None, backend: str = "auto", stop_gradient: str = "all",
            flows: Any = None, precision: Any = None, mesh: Any = None, levers: Mapping[str, Any] | None = None,
            passes: Sequence[Pass] | None = None, verify: str | None = "values",
            nonfinite: str | None = None) -> Any:  # fmt: skip
    """Compile a training loop so that its result can be differentiated through the training.

    Args:
        fn: An ordinary function with a training loop in it; returns a scalar loss or a tuple, list or dict with
            tensors.  Meta-parameters are found: every tensor requiring grad that the loop reads and does not train.
        memory: Budget for what a call allocates beyond its inputs: bytes, ``"800MiB"``, ``"min"`` or None (what the
            device has free).
        backend: ``"interpreter"``, ``"inductor"`` (compiles; see ``docs/backends.md``) or ``"auto"``: Inductor where
            its compilation is predicted to be paid back within some hundred calls.
        stop_gradient: ``"all"``: a ``detach``, a read of ``.data`` or a value computed under ``no_grad`` stops the
            gradient at every level on its way into a loss (what is written into state in place is an update, and
            passes); ``"inner"``: only the gradient taken by the level it stands in; ``"torch"``: state that PyTorch's
            own autograd would not follow (running statistics, averages) is constant, too.
        flows: Which way derivatives go; None: chosen. ``"mixed"`` (reverse through the loops, inner gradients by one
            forward sweep), ``"reverse"`` (reverse over reverse) or ``"forward"`` (one tangent per element of the
            meta-parameters through the loops: memory does not grow with the number of steps). Or a dict of these by
            name of a level (``"L1"``), meta-parameter (``"lr"``) or flow (``"lr -> L1"``) as ``plan.explain()`` prints
            them. ``"forward"`` falls back to ``"mixed"`` where an operator cannot go forward; the plan says why.
        precision: None (exact: the precision of the program), or what may compute and be saved in fewer bits, over
            float32 master values: ``"bf16"``, ``"tf32"``, :class:`mlc.Precision`, or a dict of these by name of a level
            (``"L1"``) or flow (``"L1 -> L0"``). Results are approximate then; the first call measures how much, and
            warns (:class:`mlc.PrecisionWarning`); see ``docs/precision.md``.
        mesh: A ``DeviceMesh`` of processes that own different inner problems: hypergradients are averaged over it (each
            process returns its own value). Loops that communicate by themselves need none; see ``docs/distributed.md``.
        levers: Decisions about memory that are not the planner's but yours, whatever the budget: ``"price"`` (seconds
            that keeping a byte is worth, float; 0 keeps all that saves time), ``"slots"`` (sets of states kept per
            loop, or None: all), ``"parts"`` (micro-batches), ``"offload"`` (bytes from which on what a step saves
            rests on the host, or None: never).
        passes: The pipeline from a program to its graphs, where it is not :data:`mlc.PIPELINE`: a tuple of passes, some
            of them yours (see ``docs/passes.md``).
        verify: What the first call of a program compares with the real run of the function: ``"values"`` (results and
            final states), ``"gradient"`` (one directional difference of the gradient, too) or None.
        nonfinite: ``"raise"``: a result, a final state or a hypergradient with NaN or infinity in it is a
            :class:`mlc.NonfiniteError` that names the level, the step and the line where it began, and (but for the
            hypergradient) nothing of yours is changed; costs one look at the results per call. None: as in PyTorch.

    Returns:
        A :class:`CompiledFunction` (or a decorator, when called without ``fn``).

    Raises:
        PlanError: for options that make no sense.
    """
    options = dict(
        memory=memory, backend=backend, stop_gradient=stop_gradient, flows=flows, precision=precision, mesh=mesh,
        levers=levers, passes=passes,
    )  # fmt: skip
    check_options(options)
    if verify not in ("values", "gradient", None):
        raise PlanError(f"verify={verify!r}", advice='use "values", "gradient" or None')
    if nonfinite not in ("raise", None):
        raise PlanError(f"nonfinite={nonfinite!r}", advice='use "raise" or None (steps are skipped by mlc.Training)')
    options |= {"verify": verify, "nonfinite": nonfinite}
    if fn is None:
        return lambda f: CompiledFunction(f, options)
    return CompiledFunction(fn, options)
