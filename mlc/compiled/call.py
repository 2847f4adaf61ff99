"""One call of a compiled function, and its result as a node of autograd."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from mlc.compiled.commit import commit, storages
from mlc.compiled.entry import Entry, generator_states, inputs_of, iterable
from mlc.compiled.nonfinite import Again, check_gradients, check_results
from mlc.compiled.particles import Particles
from mlc.compiled.precise import Exact, cost_of, differs, run_exact, with_cost
from mlc.compiled.report import Report
from mlc.compiled.slope import compare_slope
from mlc.compiled.together import agreed, averaged
from mlc.compiled.validate import Redrawn, compare, same
from mlc.errors import DifferentiationError, PlanError
from mlc.passes.planning.options import planning
from mlc.runtime.call import Executor, Run
from mlc.runtime.circle import Circle
from mlc.runtime.interpreter.feeds import Drawer, Stale
from mlc.runtime.interpreter.particles import Window
from mlc.runtime.interpreter.solve import Windowed
from mlc.trace.capture import Recording, Ref
from mlc.trace.iterables import batch_tensors
from mlc.trace.observe import Observation
from mlc.trace.python.places import Roots
from mlc.trace.recorder.randomness import RandomWatch

__all__ = ["Call", "Node", "leaf"]


class Owner(Protocol):
    """Whose call it is: a compiled function.

    Attributes:
        options: Those it was compiled with.
        report: What its last call measured.
        particles: Those that live from call to call (:class:`mlc.Evolution`, ``persistent=True``).
        circle: Processes that have to call alike.
    """

    options: dict[str, Any]
    particles: Particles
    report: Report | None
    circle: Circle | None


class Node(torch.autograd.Function):
    """The result in autograd: meta-parameters in, outputs out."""

    @staticmethod
    def forward(ctx: Any, call: Call, *metas: Tensor) -> Any:
        """Run the call; its outputs."""
        outs = call.run()
        ctx.call = call
        ctx.save_for_backward(*metas)
        differentiable = set(call.differentiable())
        ctx.mark_non_differentiable(*[t for i, t in enumerate(outs) if i not in differentiable])
        ctx.set_materialize_grads(True)
        return tuple(outs)

    @staticmethod
    def backward(ctx: Any, *cts: Tensor) -> Any:
        """The hypergradient, from the gradients of the outputs."""
        if torch.is_grad_enabled():
            raise DifferentiationError(
                "create_graph=True on the result of a compiled function",
                advice="put the level that differentiates this hypergradient inside the compiled function",
            )
        _ = ctx.saved_tensors  # raises as autograd does when the graph was freed or a meta-parameter changed
        keep = torch._C._autograd._get_current_graph_task_keep_graph()
        return (None, *ctx.call.gradients(cts, keep))


class Call:
    """One call of a compiled function; ``seen``: the run that was recorded, where this is the first."""

    def __init__(self, owner: Owner, entry: Entry, roots: Roots, seen: Observation | None = None) -> None:
        self.owner = owner
        self.entry = entry
        self.roots = roots
        self.seen = seen
        self.inputs = inputs_of(entry, roots)
        self.done: Run | None = None
        self.differentiated = torch.is_grad_enabled()  # of the user's call: off inside the node of autograd
        self.drawer = Drawer(self._open, batch_tensors) if seen is None else Redrawn(seen)
        self.again: Again | None = None  # what is kept to find where something began that is not finite

    def differentiable(self) -> Sequence[int]:
        """Outputs that carry a derivative; where no path leads to any of them (see ``build``), it is zero."""
        entry = self.entry
        outs = entry.program.region.outputs[: entry.program.n_outputs]
        return entry.executor.stages.cotangents or [i for i, v in enumerate(outs) if v.type.is_float]

    def metas(self) -> list[Tensor]:
        """The meta-parameters of this call."""
        return [self.inputs[i] for i in self.entry.program.metas]

    def _open(self, source: int, visit: int) -> Iterator[Any]:
        return iter(iterable(self.entry, self.roots, source))

    def run(self) -> list[Tensor]:
        """Forward stage, then the user's objects are brought to their final state."""
        return self._later() if self.seen is None else self._first(self.seen)

    def _first(self, seen: Observation) -> list[Tensor]:
        """The user's function has run: the program must reproduce it; what is given out is what it computed."""
        entry, recording = self.entry, self.entry.recording
        own = [seen.initial(x) for x in recording.externals]
        narrow = differs(entry.plan, entry.executor.stages.forward)
        verify = self.owner.options.get("verify", "values")
        exact = agreed(self.owner.circle, lambda: self._exact(seen, own)) if narrow and verify is not None else None
        window = self._window(own)
        run = self._run_as_then(seen, entry.executor, own, self.drawer, window)
        self._guard(own, seen.random[0], run)
        if exact is not None:
            entry.cost = cost_of(entry.executor, run, exact)
            entry.plan = with_cost(entry.plan, entry.cost)
        elif not narrow:
            agreed(self.owner.circle, lambda: self._verify(seen, own, run))
        run.results = []
        self.done = run
        outs = [_tensor(t) for t in seen.reals[: entry.program.n_outputs]]
        self._kept(window, run, outs)
        self.owner.report = Report.of(entry.plan, run)
        return outs

    def _window(self, values: Sequence[Tensor]) -> Window | None:
        """The particles of this call, if it has any.

        Raises:
            PlanError: on several processes.
        """
        op = self.entry.particles
        if op is None:
            return None
        if self.owner.circle is not None:
            raise PlanError(
                f"level {op.level}: Evolution(persistent=True) in a call that communicates",
                loc=self.entry.program.loc, advice="run it on one process, or use Evolution(persistent=False)",
            )  # fmt: skip
        return self.owner.particles.begin(op, self.entry.program, self.inputs, values)

    def _kept(self, window: Window | None, run: Run, outs: Sequence[Tensor]) -> None:
        """The call has succeeded: its particles live on."""
        if window is not None:
            count = self.owner.particles.end(window, self.entry.recording, self.roots, self.inputs, outs)
            run.told.append(Windowed(window.level, count))

    def _verify(self, seen: Observation, own: list[Tensor], run: Run) -> None:
        entry, circle = self.entry, self.owner.circle
        verify = self.owner.options.get("verify", "values")
        if verify is not None:
            self._reproduces(seen, own, entry.executor, run)
        if verify == "gradient" and self.differentiated and not entry.plan.responses:
            compare_slope(seen, entry.program, entry.executor, own, run, total=float if circle is None else circle.sum)

    def _run_as_then(self, seen: Observation, executor: Executor, own: list[Tensor], drawer: Drawer,
                     window: Window | None = None) -> Run:  # fmt: skip
        """A forward stage with the generators as the recorded run found them; they are left as it left them."""
        RandomWatch.put(seen.random[0])
        try:
            return executor.forward(own, drawer, window)
        finally:
            RandomWatch.put(seen.random[1])

    def _reproduces(self, seen: Observation, own: list[Tensor], executor: Executor, run: Run) -> None:
        """Hold a run of the program against the recorded one."""

        def again(change: Callable[[Tensor], Tensor]) -> list[Any]:
            return self._run_as_then(seen, executor, [change(t) for t in own], Redrawn(seen)).results

        circle = self.owner.circle
        compare(
            seen, run.results, lambda i: _made_at(self.entry.recording, i), again,
            anywhere=bool if circle is None else circle.any,
        )  # fmt: skip

    def _exact(self, seen: Observation, own: list[Tensor]) -> Exact | str:
        """What the program computes without the policy; it must reproduce the run."""
        return run_exact(
            self.entry.program, self.entry.plan, planning(self.owner.options),
            lambda executor: self._run_as_then(seen, executor, own, Redrawn(seen)),
            lambda executor, run: self._reproduces(seen, own, executor, run),
        )  # fmt: skip

    def _later(self) -> list[Tensor]:
        entry = self.entry
        written = {id(self.roots.at.get(e.path or (), e.owner)) for e in entry.recording.effects if e.kind == "copy"}
        own = [t.detach().clone() if id(t) in written else t for t in self.inputs]
        states = generator_states(entry)
        window = self._window(own)
        run = self._current(own, window)
        self._guard(own, states, run)
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
        self._kept(window, run, outs)
        self.owner.report = Report.of(entry.plan, run)
        return outs

    def _guard(self, own: list[Tensor], states: list[Any], run: Run) -> None:
        """Results must be finite, where that is asked for; nothing of the user's is changed yet."""
        if self.owner.options.get("nonfinite") is not None:
            self.again = Again(self.entry, own, self.drawer, states)
            check_results(self.again, run.results, self.owner.circle)

    def _current(self, own: list[Tensor], window: Window | None) -> Run:
        """The forward stage; on every process its guards must hold.

        Raises:
            Stale: where they do not.
        """
        why: Stale | None = None
        run: Run | None = None
        try:
            run = self.entry.executor.forward(own, self.drawer, window)
            self._guards(run)
        except Stale as e:
            why = e
        if self.owner.circle is not None and self.owner.circle.any(why is not None) and why is None:
            why = Stale("another process found another one")
        if why is not None:
            raise why
        assert run is not None
        return run

    def _guards(self, run: Run) -> None:
        entry = self.entry
        for i, outcome, what, loc in entry.recording.decisions:
            if not same(run.results[i], outcome):
                raise Stale(f"{what} is another one at {loc}")
        for s, src in enumerate(entry.recording.sources):
            for v, (_, exhausted) in enumerate(src.visits):
                if exhausted and not src.indexed and not self.drawer.finished(s, v):
                    raise Stale("an iterable has more items than before")

    def gradients(self, cts: Sequence[Tensor], keep: bool) -> list[Tensor | None]:
        """Hypergradient for every meta-parameter (None: no path)."""
        assert self.done is not None
        stages = self.entry.executor.stages
        by_input: dict[int, Tensor] = {}
        if stages.cotangents:
            found = self.entry.executor.backward(self.done, [cts[i] for i in stages.cotangents], keep)
            if self.again is not None:
                seeds = [cts[i] for i in stages.cotangents]
                check_gradients(self.again, found, seeds, self.owner.circle)
                self.again = self.again if keep else None
            self.owner.report = Report.of(self.entry.plan, self.done)
            self.entry.health.look(self.owner.report.solves)
            by_input = dict(zip(stages.gradients, found, strict=True))
        else:
            by_input = {i: torch.zeros_like(self.inputs[i]) for i in self.entry.program.metas}
        with torch.no_grad():
            by_input = averaged(self.entry, by_input, self.inputs)
        return [by_input.get(i) for i in self.entry.program.metas]


def _tensor(real: object) -> Tensor:
    """What the run returned, apart from PyTorch's graph of it."""
    if isinstance(real, Tensor):
        return real.detach()
    return torch.tensor(real, dtype=_KINDS.get(type(real), torch.float64))


_KINDS = {bool: torch.bool, int: torch.int64, complex: torch.complex128}


def _made_at(recording: Recording, i: int) -> Any:
    """The user's line that made a result."""
    v = recording.results[i]
    return next((e.loc for e in reversed(recording.eqns) if v in e.outs), recording.loc)


def leaf(x: object, outs: list[Tensor]) -> Any:
    """A leaf of what the function returns."""
    if not isinstance(x, Ref):
        return x
    return x.kind(outs[x.index].item()) if x.number else outs[x.index]
