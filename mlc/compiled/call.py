"""One call of a compiled function, and its result as a node of autograd."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from mlc.compiled.commit import commit, storages
from mlc.compiled.entry import Entry, inputs_of, iterable
from mlc.compiled.report import Report
from mlc.compiled.slope import compare_slope
from mlc.compiled.validate import Redrawn, compare, same
from mlc.errors import DifferentiationError
from mlc.runtime.call import Run
from mlc.runtime.interpreter.feeds import Drawer, Stale
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
    """

    options: dict[str, Any]
    report: Report | None


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
        self.drawer = Drawer(self._open, batch_tensors) if seen is None else Redrawn(seen)

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
        entry = self.entry
        recording = entry.recording
        own = [seen.initial(x) for x in recording.externals]
        RandomWatch.put(seen.random[0])
        try:
            run = entry.executor.forward(own, self.drawer)
        finally:
            RandomWatch.put(seen.random[1])
        verify = self.owner.options.get("verify", "values")
        if verify is not None:
            compare(seen, run.results, lambda i: _made_at(recording, i), functools.partial(self._again, seen, own))
        if verify == "gradient" and torch.is_grad_enabled() and not entry.plan.responses:
            compare_slope(seen, entry.program, entry.executor, own, run)
        run.results = []
        self.done = run
        self.owner.report = Report.of(entry.plan, run)
        return [_tensor(t) for t in seen.reals[: entry.program.n_outputs]]

    def _again(self, seen: Observation, own: list[Tensor], change: Callable[[Tensor], Tensor]) -> list[Any]:
        """Results of the program from other inputs."""
        RandomWatch.put(seen.random[0])
        try:
            return self.entry.executor.forward([change(t) for t in own], Redrawn(seen)).results
        finally:
            RandomWatch.put(seen.random[1])

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
        if not stages.cotangents:
            return [torch.zeros_like(t) for t in self.metas()]
        found = self.entry.executor.backward(self.done, [cts[i] for i in stages.cotangents], keep)
        self.owner.report = Report.of(self.entry.plan, self.done)
        self.entry.health.look(self.owner.report)
        by_input = dict(zip(stages.gradients, found, strict=True))
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
