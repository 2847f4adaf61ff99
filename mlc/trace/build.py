"""From a recording to a program: roll, name, find meta-parameters, diagnose paths, find what may change its length."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from mlc.errors import CaptureError, MlcWarning, PlanError
from mlc.ir.core import Draw, EffectCall, Eqn, Feed, Loop, NestedEffects, Region, Stop, Var, map_vars
from mlc.ir.lowered.responses import written
from mlc.ir.origin import Origin
from mlc.ir.program import Input, Level, Program
from mlc.ir.types import SeqType, Type
from mlc.ir.verify import verify
from mlc.passes.autodiff.reverse import dependence, outermost
from mlc.passes.levels.flows import find_levels
from mlc.passes.levels.updates import told_of_updates
from mlc.passes.responses.asked import counts_steps
from mlc.passes.rolling.apart import apart
from mlc.passes.rolling.roll import roll
from mlc.trace.capture import Recording, path_name

__all__ = ["build_program"]


def build_program(rec: Recording, stop: str = "all", flows: Any = None) -> Program:
    """Roll a recording and find its meta-parameters.

    Args:
        rec: One traced call.
        stop: Meaning of stops (see :func:`mlc.compile`), for the diagnosis of paths.
        flows: As :func:`mlc.compile` takes it: a response that counts steps fixes how many there are.

    Raises:
        PlanError: for a response of a level that trains nothing.
        CaptureError: when no meta-parameter is found, or one has no path to any output.
    """
    externals = rec.externals
    names = [_name(rec, e.path, i) for i, e in enumerate(externals)]
    rolled = roll(rec.eqns, [e.var for e in externals], rec.results, names)
    fixed = apart(verify(rolled.region))
    region = _open_lengths(fixed, rec)
    inputs = tuple(Input(n, _role(e), e.var.type, e.path) for n, e in zip(names, externals, strict=True))
    notes = tuple(dict.fromkeys([*rec.notes, *rolled.notes]))
    program = Program(rec.function, region, inputs, rec.n_outputs, notes=notes, loc=rec.loc, binding=rec)
    more, warnings = _diagnose(program, stop, _decided(rec))
    notes += more
    steps = [(type(s.optimizer).__name__, s.loc) for s in rec.steps]
    levels, edges = find_levels(program, steps)
    updates = told_of_updates(program)
    notes += tuple(map(str, updates))
    warned = (*map(MlcWarning, (*rec.warnings, *warnings)), *updates)
    levels = tuple(_asked(x, rec) for x in levels)
    _refuse_idle(rec, levels)
    if region is not fixed and counts_steps(replace(program, levels=levels), flows):
        for s in rec.sources:
            s.generic = False
        region, program = fixed, replace(program, region=fixed)
        levels = tuple(_asked(x, rec) for x in find_levels(program, steps)[0])
    return replace(program, levels=levels, flows=edges, notes=notes, warnings=warned, guards=_guards(rec))


def _asked(level: Level, rec: Recording) -> Level:
    """A level with what the code asked for it."""
    response = rec.responses.get(level.declared)
    return level if response is None else replace(level, response=json.dumps(written(response)))


def _refuse_idle(rec: Recording, levels: Sequence[Level]) -> None:
    """A response is asked of a level in which nothing is trained."""
    for name, response in rec.responses.items():
        if response is not None and not any(x.declared == name for x in levels):
            raise PlanError(
                f"level {name!r} asks for {response}, but nothing is trained in it", loc=rec.loc,
                advice="put the loop whose gradients train something into the block, or leave response out",
            )  # fmt: skip


def _guards(rec: Recording) -> tuple[str, ...]:
    """What later calls must find again, one line for each place in the user's code."""
    found = Counter((what, str(loc)) for _, _, what, loc in rec.decisions)
    return tuple(f"{what} at {loc}" + (f" ({n} times)" if n > 1 else "") for (what, loc), n in found.items())


def _name(rec: Recording, path: Any, i: int) -> str:
    if path is None:
        return f"constant{i}"
    return path_name(path, rec.arg_names)


def _role(e: Any) -> str:
    if e.tensor.requires_grad and e.tensor.dtype.is_floating_point | e.tensor.dtype.is_complex:
        return "trained" if e.written else "meta"
    return "state" if e.written else "data"


# ---- lengths that may change


def _open_lengths(region: Region, rec: Recording) -> Region:
    """Loops over a whole iterable whose length the loop does not otherwise depend on take any number of items."""
    for s in rec.sources:
        s.generic = False
    if not rec.reusable:
        return region
    opened: dict[Var, Eqn] = {}
    for e in region.eqns:
        if isinstance(e.op, Feed) and _whole(e.op, rec) and _independent(region, e):
            opened.update((v, e) for v in e.outs)
            first = e.op.effects[0]
            assert isinstance(first, EffectCall) and isinstance(first.op, Draw)
            rec.sources[first.op.source].generic = True
    return _reopen(region, opened) if opened else region


def _whole(op: Feed, rec: Recording) -> bool:
    first = op.effects[0]
    draws = [x for x in op.effects if isinstance(x, EffectCall) and isinstance(x.op, Draw)]
    if any(isinstance(x, NestedEffects) for x in op.effects) or len(draws) != 1 or first is not draws[0]:
        return False
    assert isinstance(draws[0].op, Draw)
    s = rec.sources[draws[0].op.source]
    if s.length_used or s.indexed or s.changing or s.path is None or len(s.visits) != 1:
        return False
    items, exhausted = s.visits[draws[0].op.visit]
    return exhausted and len(items) == op.trips


def _independent(region: Region, feed: Eqn) -> bool:
    """Nothing but one loop reads the feed, and it reads no other sequence, and none of its emissions is picked from."""
    users = [e for e in region.eqns if any(v in feed.outs for v in e.inputs)]
    if len(users) != 1 or not isinstance(users[0].op, Loop):
        return False
    loop = users[0]
    op = users[0].op
    seqs = loop.args[op.n_carry + op.n_const :]
    if any(v not in feed.outs for v in seqs):
        return False
    emitted = set(loop.outs[op.n_carry :])
    return not any(v in emitted for e in region.eqns if e is not loop for v in e.inputs) and not emitted & set(
        region.outputs
    )


def _reopen(region: Region, opened: dict[Var, Eqn]) -> Region:
    new: dict[Var, Var] = {}

    def open_type(t: Type) -> Type:
        return SeqType(t.elem, None, t.length) if isinstance(t, SeqType) else t

    eqns: list[Eqn] = []
    for e in region.eqns:
        if isinstance(e.op, Feed) and e.outs and e.outs[0] in opened:
            outs = tuple(Var(open_type(v.type)) for v in e.outs)
            new.update(zip(e.outs, outs, strict=True))
            e = e.with_(op=Feed(e.op.effects, None), outs=outs)
        elif isinstance(e.op, Loop) and any(v in new for v in e.inputs):
            outs = tuple(Var(open_type(v.type)) for v in e.outs)
            new.update(zip(e.outs, outs, strict=True))
            e = e.with_(
                op=replace(e.op, trips=None, usual=e.op.trips), args=tuple(new.get(v, v) for v in e.args), outs=outs
            )
        elif any(v in new for v in e.inputs):
            e = e.with_(args=map_vars(e.args, lambda v: new.get(v, v)))
        eqns.append(e)
    outs = tuple(new.get(v, v) for v in region.outputs)
    return Region(region.inputs, tuple(eqns), outs, region.names)


# ---- meta-parameters and their paths


def _decided(rec: Recording) -> Any:
    """Where a meta-parameter decides a branch; None if none does."""
    metas = {e.var for e in rec.externals if _role(e) == "meta"}
    made = {v: e for e in rec.eqns for v in e.outs}
    for i, _, _, loc in rec.decisions:
        seen: set[Var] = set()
        todo = [rec.results[i]]
        while todo:
            v = todo.pop()
            if v in metas:
                return loc
            if v not in seen and v in made:
                seen.add(v)
                todo.extend(made[v].inputs)
    return None


def _diagnose(program: Program, stop: str, decided: object) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Notes and warnings about meta-parameters without a path, or with a path that is cut.

    Args:
        program: It.
        stop: Meaning of stops.
        decided: Where a meta-parameter decides a branch, if one does: its derivative is then zero, not missing.

    Raises:
        CaptureError: when no meta-parameter has a path to the result.
    """
    region, metas = program.region, program.metas
    if not metas:
        raise CaptureError(
            "no meta-parameter: the loop reads no tensor that requires grad except those it trains",
            loc=program.loc,
            advice="set requires_grad on what you want the gradient of, and use it in the loop",
        )
    outs = region.outputs[: program.n_outputs]
    marks = {region.inputs[i]: 1 << k for k, i in enumerate(metas)}
    passing = dependence(region.eqns, marks, through_stops=outermost(stop))
    reached = _union(passing, outs)
    cuts_of = _cuts(region, marks)
    if not reached:
        every = [e for e, bits in cuts_of if bits]
        if decided is not None and not every:
            names = [program.inputs[i].name for i in metas]
            return (), (f"the gradient of {_names(names)} is zero: it only decides a branch, at {decided}",)
        raise _no_path(program, [program.inputs[i].name for i in metas], every)
    notes: list[str] = []
    lost: dict[str, list[str]] = {}
    for k, i in enumerate(metas):
        cuts = [
            e for e, bits in cuts_of if bits >> k & 1 and e.origin is not Origin.SOLVER
        ]  # which is no cut of the user's
        name = program.inputs[i].name
        if reached >> k & 1:
            notes += [f"one path of {name} is cut at {c.loc}" for c in cuts if c.loc is not None]
        elif cuts:
            copied = all(c.origin is Origin.COPY for c in cuts)
            where = next((str(c.loc) for c in cuts if c.loc is not None), "the loop")
            why = (
                f"it is copied by deepcopy at {where} (mlc.clone keeps the path)" if copied else f"it is cut at {where}"
            )
            lost.setdefault(why, []).append(name)
        else:
            notes.append(f"{name} is read but does not reach the result: its gradient is None")
    warned = [f"the gradient of {_names(names)} will be None: {why}" for why, names in lost.items()]
    return tuple(dict.fromkeys([*notes, *warned])), tuple(warned)


def _names(names: Sequence[str]) -> str:
    return ", ".join(names[:4]) + (f" and {len(names) - 4} more" if len(names) > 4 else "")


def _union(marks: Mapping[Var, int], vs: Iterable[Var]) -> int:
    out = 0
    for v in vs:
        out |= marks.get(v, 0)
    return out


def _cuts(region: Region, marks: dict[Var, int]) -> list[tuple[Eqn, int]]:
    """Stops that lie between meta-parameters and a result, each with the marks of these meta-parameters."""
    through = dependence(region.eqns, marks, through_stops=True)
    arriving = _union(through, region.outputs)
    outer = {id(e) for e in region.eqns}
    return [
        (e, arriving & (through.get(e.args[0], 0) if id(e) in outer else -1))
        for e in region.walk()
        if isinstance(e.op, Stop) and not e.op.inner
    ]


def _no_path(program: Program, names: list[str], cuts: list[Eqn]) -> CaptureError:
    which = _names(names)
    loc = next((c.loc for c in cuts if c.loc is not None), program.loc)
    if cuts:
        return CaptureError(
            f"meta-parameter {which} has no path to the result: it is cut by detach() or no_grad() here",
            loc=loc,
            advice='remove the detach, or pass stop_gradient="inner" if it is meant for the inner gradient only',
        )
    return CaptureError(
        f"meta-parameter {which} has no path to the result",
        loc=loc,
        advice="use it in the inner loss, in the update or in the returned value",
    )
