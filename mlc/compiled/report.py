"""What a call measured."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mlc.compiled.adjoints import Adjoints
from mlc.compiled.health import Solves, heard
from mlc.runtime.call import Run
from mlc.runtime.interpreter.recording import Recording, Span, current
from mlc.shown import Shown
from mlc.units import size_text, time_text
from mlc.view.page import Measured
from mlc.view.plan import Plan

__all__ = ["Report"]


@dataclass(frozen=True)
class Report(Shown):
    """Measured cost of the last call.

    Attributes:
        seconds: Wall time of all stages run so far, seconds.
        peak_bytes: Largest number of bytes allocated beyond the inputs at any time, measured at the first call of a
            plan, and again once its compiled segments have passed their trials (which need more memory); without
            what a compiled segment allocates and frees inside.
        stages: Seconds per stage.
        recorded: Spans and memory, when the call ran inside ``mlc.recording()``.
        plan: The plan that ran.
        variances: By level with a response that is estimated from random directions: the expected squared distance
            of the estimate from its mean (in the norm of all elements together), estimated from the same directions.
        windows: By level with :class:`mlc.Evolution` and ``persistent=True``: which window of its unroll the call was,
            from 1.
        solves: By level with an implicit response: iterations, residual and curvature of its linear solves.
        adjoints: By level: the norm of the adjoint of what it trains after each of its steps, last step first, once
            the result has been differentiated (:class:`mlc.compiled.adjoints.Adjoints`); levels that no adjoint goes
            through step by step (implicit responses, steps outside of loops) are not in it.
    """

    seconds: float
    peak_bytes: int
    stages: dict[str, float] = field(default_factory=dict)
    recorded: Recording | None = field(default=None, compare=False, repr=False)
    plan: Plan | None = field(default=None, compare=False, repr=False)
    solves: dict[str, Solves] = field(default_factory=dict, compare=False)
    variances: dict[str, float] = field(default_factory=dict, compare=False)
    windows: dict[str, int] = field(default_factory=dict, compare=False)
    adjoints: dict[str, Adjoints] = field(default_factory=dict, compare=False)

    @staticmethod
    def of(plan: Plan, run: Run) -> Report:
        """Report of a run so far."""
        found = current()
        peak = run.peak_bytes if found is None else found.peak_bytes
        return Report(sum(run.seconds.values()), peak, dict(run.seconds), found, plan, *heard(run.told))

    @property
    def measured(self) -> Measured:
        """For ``mlc.draw(fn.plan, "x.html", measured=...)``: drawn over what was predicted."""
        samples = self.recorded.samples if self.recorded is not None else ()
        return Measured(self.stages, [(s.stage, s.share, s.bytes) for s in samples])

    def as_dict(self) -> dict[str, Any]:
        """Seconds, peak and stages, for JSON."""
        solves = {name: s.as_dict() for name, s in self.solves.items()}
        return {"seconds": self.seconds, "peak_bytes": self.peak_bytes, "stages": self.stages, "solves": solves,
                "variances": self.variances, "windows": self.windows,
                "adjoints": {name: a.as_dict() for name, a in self.adjoints.items()}}  # fmt: skip

    def __str__(self) -> str:
        stages = ", ".join(f"{name} {time_text(s)}" for name, s in self.stages.items())
        peak = f", peak {size_text(self.peak_bytes)}" if self.peak_bytes else ""
        return "\n".join(
            [f"{time_text(self.seconds)} ({stages}){peak}", *map(str, [*self.solves.values(), *self.adjoints.values()])]
        )

    def save_trace(self, path: str | Path) -> Path:
        """Write the run in the format of Chrome's ``about:tracing`` and of Perfetto.

        Stages are one track, trips of loops one track per nesting depth, named by the levels there; memory is a
        counter. Without ``mlc.recording()`` around the call only the stages are known.

        Returns:
            The path.
        """
        path = Path(path)
        path.write_text(json.dumps({"traceEvents": self._events(), "displayTimeUnit": "ms"}) + "\n")
        return path

    def _events(self) -> list[dict[str, Any]]:
        spans, samples = self._spans(), self.recorded.samples if self.recorded is not None else []
        events = [_named("process_name", 0, "mlc")]
        events += [_named("thread_name", d, self._track(d)) for d in sorted({s.depth for s in spans})]
        for s in sorted(spans, key=lambda s: (s.start, s.depth)):
            what = {"name": s.name, "cat": "trip" if s.depth else "stage"}
            time = {"ts": s.start * 1e6, "dur": (s.end - s.start) * 1e6}
            events.append({**what, "ph": "X", "pid": 0, "tid": s.depth, **time})
        for x in samples:
            events.append({"name": "memory", "ph": "C", "pid": 0, "ts": x.seconds * 1e6, "args": {"bytes": x.bytes}})
        return events

    def _spans(self) -> list[Span]:
        if self.recorded is not None and self.recorded.spans:
            return self.recorded.spans
        out, at = [], 0.0
        for name, seconds in self.stages.items():
            out.append(Span(name, 0, at, at + seconds))
            at += seconds
        return out

    def _track(self, depth: int) -> str:
        program = self.plan.bound if self.plan is not None else None
        names = [x.name for x in program.levels if x.depth == depth] if depth and program is not None else []
        return "stages" if not depth else f"loops at depth {depth}" + (f" ({', '.join(names)})" if names else "")


def _named(what: str, thread: int, name: str) -> dict[str, Any]:
    return {"name": what, "ph": "M", "pid": 0, "tid": thread, "args": {"name": name}}
