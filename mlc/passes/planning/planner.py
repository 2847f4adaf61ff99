"""Planning: options and a program become a plan in which every decision has a reason, a cost and a runner-up."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch

from mlc.errors import BudgetError
from mlc.ir.core import Region
from mlc.ir.digest import digest
from mlc.ir.lowered.contract import Context, Findings, Modes
from mlc.ir.lowered.decision import Decision
from mlc.ir.lowered.responses import written
from mlc.ir.program import Program
from mlc.passes.autodiff.jacobian import count, legal
from mlc.passes.autodiff.policy import Policy
from mlc.passes.cost.equations import Meter, device_of
from mlc.passes.lowering.modes import resolve
from mlc.passes.lowering.pipeline import PIPELINE, Passes, check_passes, differentiated, names
from mlc.passes.planning.alternatives import Alternatives
from mlc.passes.planning.options import check_options, free_memory
from mlc.passes.planning.plan import PlanDocument
from mlc.passes.planning.planned import PlannedProgram
from mlc.passes.planning.search import Candidate, Search, front, thrift
from mlc.passes.precision import policy as told
from mlc.passes.precision.effects import effects
from mlc.passes.responses.asked import asked, decided, lost, needs_reverse, refuse_forward, unreached
from mlc.passes.responses.paths.off import decided_paths, switched_off
from mlc.units import parse_memory, size_text, time_text

__all__ = ["FEW", "budget_of", "plan_program", "planned_sweep", "usable"]

FEW = 8  # most tangents for which forward mode is tried without being asked for
_SHARE = 0.8  # of what the device has free
_SPARE, _OF_BUDGET = 2**20, 16  # bytes left for what libraries allocate beside tensors, at most so much of the budget
_HIDDEN = 0.05  # of a call, that copies add, for them to count as hidden: those of a loop's first trip always show

# Inductor: it leaves so much of the time of elementwise work (W1: 0.5), a different operator takes so many seconds of
# compilation on one core, and must be paid back within so many calls.
_LEFT, _COMPILE, _CALLS = 0.5, 0.3, 500


def plan_program(program: Program, *, memory: Any = None, backend: str = "auto", stop_gradient: str = "all",
              flows: Any = None, precision: Any = None, mesh: Any = None, levers: Any = None, passes: Any = None,
              paths: Any = None) -> PlannedProgram:  # fmt: skip
    """Choose the fastest exact plan that fits the memory.

    Raises:
        BudgetError: when the smallest peak this compiler can reach is above the budget.
        PlanError: for options that make no sense.
    """
    given = {"backend": backend, "stop_gradient": stop_gradient, "flows": flows, "precision": precision, "mesh": mesh}
    check_options({**given, "levers": levers, "passes": passes, "paths": paths})
    wanted = parse_memory(memory)
    with _no_collection():
        planner = _Planner(program, flows, stop_gradient, check_passes(passes), precision, paths)
        if wanted == "min":
            chosen = min((s.frugal() for s in planner.searches), key=thrift)
        else:
            chosen = planner.fastest(budget_of(wanted, planner.searches[0].device))
        if levers:
            chosen = planner.with_levers(chosen, levers)
        return planner.plan(chosen, wanted if isinstance(wanted, int) else None, backend)


@contextmanager
def _no_collection() -> Iterator[None]:
    """Garbage waits: a search makes many small objects and few cycles, and looking for them takes a fifth of it."""
    was = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was:
            gc.enable()


def budget_of(memory: int | str | None, on: torch.device | Region) -> int:
    """Bytes that a call may allocate: what was asked for, else most of what the device has free now."""
    device = device_of(on) if isinstance(on, Region) else on
    return memory if isinstance(memory, int) else int(_SHARE * free_memory(device))


def usable(budget: int) -> int:
    """What of a budget tensors may take; the rest is for what libraries allocate beside them."""
    return budget - min(_SPARE, budget // _OF_BUDGET)


def planned_sweep(program: Program, *, backend: str = "auto", stop_gradient: str = "all", flows: Any = None,
                  precision: Any = None, passes: Any = None, paths: Any = None,
                  say: Callable[[str], None] = lambda text: None) -> list[PlannedProgram]:  # fmt: skip
    """The whole curve of time and memory: one plan for each point, fastest first; ``say`` hears where it is."""
    with _no_collection():
        planner = _Planner(program, flows, stop_gradient, check_passes(passes), precision, paths)
        points = front(c for s in planner.searches for c in s.curve(say))
        return [planner.plan(c, c.peak, backend) for c in points]


class _Planner:
    """Searches of a program, one per mode that may be used."""

    def __init__(self, program: Program, flows: Any, stop: str, passes: Passes, precision: Any, paths: Any) -> None:
        self.precision = told.resolve(program, precision)
        self.program = program
        self.stop = stop
        self.asked = resolve(program, flows)
        self.passes = passes
        self.fixed: frozenset[str] = frozenset()
        self.searches: list[Search] = []
        self.responses = asked(program, flows)
        self.off = switched_off(program, paths, stop)
        modes = replace(self.asked or Modes("mixed"), responses=self.responses, off=self.off)
        refuse_forward(modes)
        lost(program, self.responses)
        self.found = self._search(modes)
        unreached(program, self.responses, self.searches[0].joint.gradients)
        self.modes = Modes(
            self.found.mode, modes.levels if self.found.mode == modes.mode else {}, self.responses, self.off
        )
        few = self.asked is None and not needs_reverse(self.responses) and 0 < count(program) <= FEW
        if few and legal(program, Policy("forward", stop)) is None:
            self._search(Modes("forward", responses=self.responses, off=self.off))

    def _search(self, modes: Modes) -> Findings:
        """A search of the program under these modes, unless one under the mode that they come to is there already."""
        context = Context(modes, self.stop, precision=self.precision or None, findings=Findings())
        joint = differentiated(self.program, context, self.passes)
        found = context.findings
        if not self.searches or not found.why_not:
            self.searches.append(Search(found.mode, joint, self.passes))
        return found

    def fastest(self, budget: int) -> Candidate:
        """The fastest candidate within the budget.

        Raises:
            BudgetError: with the smallest possible peak.
        """
        found = self._within(usable(budget)) or self._within(budget)
        if not found:
            least = min(s.smallest().peak for s in self.searches)
            raise BudgetError(
                f"no plan fits {budget} bytes: the smallest predicted peak is {least} bytes", least=least,
                loc=self.program.loc, advice=f"give at least memory={least}, fewer steps or a smaller batch",
            )  # fmt: skip
        quickest = min(c.seconds for c in found)
        return min((c for c in found if c.seconds <= 1.02 * quickest), key=lambda c: c.peak)

    def _within(self, budget: int) -> list[Candidate]:
        return [c for c in (s.fastest(budget) for s in self.searches) if c is not None]

    def with_levers(self, c: Candidate, levers: Mapping[str, Any]) -> Candidate:
        """The candidate with some levers as the user wants them."""
        self.fixed = frozenset(levers)
        search = next(s for s in self.searches if s.mode == c.mode)
        return search.at(replace(c.levers, **levers))

    def plan(self, c: Candidate, budget: int | None, backend: str) -> PlannedProgram:
        """The plan of a candidate."""
        how, seconds, lowering = self._backend(c, backend)
        made = PlanDocument(
            program=digest(self.program), memory=budget, mode=c.mode, stop=self.stop,
            flows=dict(self.modes.levels) if c.mode == self.modes.mode else {},
            responses={name: written(r) for name, r in self.responses.items()}, off=self.off, backend=how,
            price=c.levers.price, slots=c.levers.slots, parts=c.levers.parts, offload=c.levers.offload,
            decisions=(*self._modes(c), *decided(self.program, self.responses), *decided_paths(self.program, self.off),
                       *self._levers(c, budget), *self._dtypes(c), lowering),
            peak_bytes=c.peak, seconds=seconds,
            host_bytes=c.transfers.bytes, passes=() if self.passes == PIPELINE else names(self.passes),
            precision=self.precision or None,
        )  # fmt: skip
        return PlannedProgram(self.program, made, c.stages, Alternatives(c, self.searches, _LEFT), self.passes)

    def _dtypes(self, c: Candidate) -> list[Decision]:
        """What the precision policy came to."""
        return [
            Decision(subject=x.subject, choice=x.choice, reason=x.reason, bytes=x.bytes)
            for x in effects(self.program, self.precision, c.stages, c.mode)
        ]

    def _backend(self, c: Candidate, asked: str) -> tuple[str, float, Decision]:
        """How regions are lowered, the predicted seconds of a call then, and why."""
        meter = Meter(self.searches[0].device)
        regions = [c.stages.forward, *([c.stages.backward] if c.stages.backward is not None else [])]
        found = [meter.fusible(r) for r in regions]
        saved = (1 - _LEFT) * sum(s for s, _ in found)
        compile = _COMPILE * sum(n for _, n in found) / min(meter.rates.threads, 8)
        pays = saved * _CALLS > compile
        how = asked if asked != "auto" else "inductor" if pays else "interpreter"
        what = f"compiling takes about {time_text(compile)} and saves {time_text(saved)} a call"
        other = (
            f"inductor: {time_text(c.seconds - saved)}"
            if how == "interpreter"
            else f"interpreter: {time_text(c.seconds)}"
        )
        reason = what if asked == "auto" else f"asked for; {what}"
        seconds = c.seconds - saved if how == "inductor" else c.seconds
        return how, seconds, Decision(subject="lowering", choice=how, reason=reason, seconds=seconds, runner_up=other)

    def _modes(self, c: Candidate) -> list[Decision]:
        out = []
        other = next((s.at(s.ladder()[0]) for s in self.searches if s.mode != c.mode), None)
        if self.asked is not None and self.asked.mode != "mixed":
            reason = f"{self.asked.mode} was asked for, but {self.found.why_not}" if self.found.why_not else "asked for"
            out.append(
                Decision(subject="mode", choice=c.mode, reason=reason, runner_up="" if self.found.why_not else "mixed")
            )
        elif other is not None:
            k = count(self.program)
            ahead = f"{k} tangent{'s' * (k != 1)} through the loops, nothing kept per trip"
            reason = ahead if c.mode == "forward" else f"one sweep back serves all {k} elements"
            out.append(Decision(subject="mode", choice=c.mode, reason=reason, seconds=c.seconds, bytes=c.peak,
                                runner_up=_point(other.mode, other)))  # fmt: skip
        for level in self.program.levels[1:]:
            why = self.found.fallbacks.get(str(level.loc))
            if c.mode != "mixed":
                out.append(Decision(subject=level.name, choice=c.mode, reason="the mode of the whole program"))
            elif level.name in self.modes.levels:
                out.append(Decision(subject=level.name, choice=self.modes.levels[level.name], reason="asked for",
                                    runner_up="mixed"))  # fmt: skip
            elif why is None:
                out.append(Decision(subject=level.name, choice="mixed", runner_up="reverse",
                                    reason="one forward sweep over its gradient"))  # fmt: skip
            else:
                out.append(Decision(subject=level.name, choice="reverse", reason=why))
        return out

    def _levers(self, c: Candidate, budget: int | None) -> list[Decision]:
        search = next(s for s in self.searches if s.mode == c.mode)
        faster = [x for x in search.found.values() if x.seconds < c.seconds and x.peak > c.peak]
        smaller = [x for x in search.found.values() if x.peak < c.peak]
        runner = ""
        if faster:
            runner = _point("keep more", min(faster, key=lambda x: x.peak))
        elif smaller:
            runner = _point("keep less", max(smaller, key=lambda x: x.peak))
        price = c.levers.price
        kept = "all that saves time" if not price else f"what saves {price * 2**20 * 1e3:.3g} ms per MiB"
        fits = "it fits" if budget is None else f"within {size_text(budget)}"
        fits = "asked for" if "price" in self.fixed else fits
        asked = {name: "asked for; " for name in self.fixed}
        out = [
            Decision(subject="kept values", choice=kept, reason=fits, seconds=c.seconds, bytes=c.peak, runner_up=runner)
        ]
        if c.mode == "forward":
            return [*out, Decision(subject="states", choice="none kept", reason="there is no way back")]
        if c.levers.slots is None or search.trips <= c.levers.slots:
            reason = asked.get("slots", "") + "no step is redone"
            out.append(Decision(subject="states", choice="all kept", reason=reason))
        else:
            sets = f"{c.levers.slots} set{'s' * (c.levers.slots != 1)} of {search.trips}"
            out.append(Decision(
                subject="states", choice=sets, runner_up="all kept",
                reason=asked.get("slots", "") + "the others are replayed from what is kept of each step",
            ))  # fmt: skip
        if c.levers.offload is not None:
            out.append(_resting(c, search, budget))
        if c.levers.parts > 1:
            why = c.refused[0] if c.refused else None
            where = "" if why is None or why.loc is None else f" (line {why.loc.line})"
            proved = "examples are independent" if why is None else f"where they can be; {why.reason}{where}"
            out.append(Decision(
                subject="micro-batches", choice=f"{c.levers.parts} parts", runner_up="1 part",
                reason=asked.get("parts", "") + proved,
            ))  # fmt: skip
        return out


def _resting(c: Candidate, search: Search, budget: int | None) -> Decision:
    """Saved tensors on the host; the runner-up is the fastest that fits without."""
    here = [x for x in search.found.values() if x.levers.offload is None and x.peak <= (budget or x.peak)]
    hidden = c.transfers.seconds <= _HIDDEN * c.seconds
    how = "copies hidden behind compute" if hidden else f"copies take {time_text(c.transfers.seconds)} more"
    return Decision(
        subject="saved tensors", choice=f"rest on the host: {size_text(c.transfers.bytes)}", reason=how,
        seconds=c.transfers.seconds, bytes=c.transfers.bytes,
        runner_up=_point("on the device", min(here, key=lambda x: x.seconds)) if here else "none that fits",
    )  # fmt: skip


def _point(name: str, c: Candidate) -> str:
    return f"{name}: {time_text(c.seconds)}, {size_text(c.peak)}"
