"""NaN and infinity in a compiled call: noticed by one look at its results, then traced to where they began.

With ``nonfinite="raise"`` the results of a forward stage are looked at before anything of the user's is changed, and so
is the hypergradient.  Where one is not finite the stage is run once more from the same state, on the same items and
random numbers, with every value watched (:mod:`mlc.runtime.interpreter.watching`).  An infinity that a program writes
down itself, or that was in its state before (a best loss that begins at infinity), is no fault of a step.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from mlc.compiled.entry import Entry, generator_states
from mlc.errors import CommunicationError, MlcError, NonfiniteError
from mlc.ir.core import Eqn, Loop, Region
from mlc.ir.levels.view import LevelView
from mlc.ir.program import Program
from mlc.runtime.call import Executor
from mlc.runtime.circle import Circle
from mlc.runtime.interpreter.feeds import Drawer
from mlc.runtime.interpreter.watching import Origin, Watch, finite
from mlc.trace.recorder.randomness import RandomWatch
from mlc.view.plan import stages_for

__all__ = ["Again", "check_gradients", "check_results"]

_ADVICE = "smaller steps, clipping, or an eps where it divides or takes a logarithm"


@dataclass
class Again:
    """What a call needs to run once more.

    Attributes:
        entry: Whose call.
        inputs: As they were before it.
        drawer: What it drew.
        states: Its generators before it.
    """

    entry: Entry
    inputs: list[Tensor]
    drawer: Drawer
    states: list[Any]

    def results(self, watch: Watch) -> Sequence[Any]:
        """The results of the forward stage, watched."""
        with self._then():
            return self._executor(watch).forward(self.inputs, self.drawer.again()).results

    def gradients(self, watch: Watch, cotangents: Sequence[Tensor]) -> Sequence[Any]:
        """The hypergradient, watched from the beginning of the call."""
        with self._then():
            executor = self._executor(watch)
            run = executor.forward(self.inputs, self.drawer.again())
            watch.backward = True
            return executor.backward(run, cotangents, False)

    def _executor(self, watch: Watch) -> Executor:
        return Executor(stages_for(self.entry.program, self.entry.plan), watch=watch)

    @contextlib.contextmanager
    def _then(self) -> Iterator[None]:
        now = generator_states(self.entry)
        RandomWatch.put(self.states)
        try:
            yield
        finally:
            RandomWatch.put(now)


def check_results(again: Again, results: Sequence[Any], circle: Circle | None) -> None:
    """Refuse results that are not finite.

    Raises:
        NonfiniteError: naming the level, the step and the operator where it began.
    """
    entry = again.entry
    bad = not finite([x for i, x in enumerate(results) if i not in entry.infinite])
    if not (bad if circle is None else circle.any(bad)):
        return
    watch = Watch()
    found = again.results(watch)
    for i, x in enumerate(found):
        origin = watch.origin(x)
        if origin is None or i in entry.infinite:
            continue
        if i >= entry.program.n_outputs and origin.harmless:
            entry.infinite.add(i)
            continue
        raise _error(entry.program, origin)
    if bad and not finite([x for i, x in enumerate(results) if i not in entry.infinite]):
        raise NonfiniteError(
            "a result is not finite, and the interpreter does not find it so: it began in compiled code",
            loc=entry.program.loc, advice='backend="interpreter"',
        )  # fmt: skip
    _elsewhere(bad, circle)


def check_gradients(again: Again, found: Sequence[Any], cotangents: Sequence[Tensor], circle: Circle | None) -> None:
    """Refuse a hypergradient that is not finite.

    Raises:
        NonfiniteError: naming the level, the step and the operator where it began.
    """
    bad = not finite(found)
    if not (bad if circle is None else circle.any(bad)):
        return
    if bad and not finite(cotangents):
        raise NonfiniteError("the gradient handed to backward() is not finite")
    watch = Watch()
    origins = [o for x in again.gradients(watch, cotangents) if (o := watch.origin(x)) is not None]
    if origins:
        raise _error(again.entry.program, min(origins, key=lambda o: o.kind != "NaN"))
    if bad:
        raise NonfiniteError("the hypergradient is not finite", loc=again.entry.program.loc, advice=_ADVICE)
    _elsewhere(bad, circle)


def _elsewhere(bad: bool, circle: Circle | None) -> None:
    """Another process has raised, where it was not this one that found something."""
    if circle is not None and not bad:
        raise CommunicationError(
            "another process of this compiled function found NaN or infinity", advice="look at its error"
        )


# ---- saying it


def _error(program: Program, o: Origin) -> MlcError:
    level, trips = _level(program, o), f", step {' of '.join(map(str, reversed(o.trips)))}" if o.trips else ""
    who = f"level {level!r}{trips}: " if level else f"the result{trips}: "
    if o.name:
        return NonfiniteError(
            f"{who}{o.kind} was there already, in {o.name}", level=level, steps=o.trips, kind=o.kind,
            loc=o.loc or program.loc, advice="look at the data, and at the parameters before the step",
        )  # fmt: skip
    what = f"{who}{o.kind} began in {'the derivative of ' if o.adjoint else ''}this line ({o.op})"
    if o.cause is not None:
        what += f", of an infinity in {o.cause.op or o.cause.name} at {o.cause.loc or program.loc}"
    return NonfiniteError(what, level=level, steps=o.trips, kind=o.kind, operator=o.op, loc=o.loc, advice=_ADVICE)


def _level(program: Program, o: Origin) -> str:
    """The level whose loss or update a line stands in; the innermost where several do."""
    key = _key(o.loc)
    if key is None:
        return _by_loops(program, o)
    for x in sorted(program.levels, key=lambda x: -x.depth):
        try:
            view = LevelView(program, x)
            regions = [view.loss_region] + ([view.update_region] if x.at else [])
        except (MlcError, IndexError, KeyError, ValueError):
            continue
        if any(_key(e.loc) == key for r in regions for e in _walk(r)):
            return x.title
    return _by_loops(program, o)


def _by_loops(program: Program, o: Origin) -> str:
    """Without a line: the outermost level, or the first one in loops that deep."""
    inside = [x for x in program.levels if x.at and o.trips]
    return (inside or list(program.levels[:1]))[0].title if program.levels else ""


def _key(loc: Any) -> Any:
    if loc is None:
        return None
    return str(loc), None if loc.caller is None else str(loc.caller)


def _walk(region: Region) -> Iterator[Eqn]:
    for e in region.eqns:
        yield e
        if isinstance(e.op, Loop):
            yield from _walk(e.op.body)
