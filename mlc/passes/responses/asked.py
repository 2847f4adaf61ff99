"""Which response each level has: what the code asked for with ``mlc.level``, and ``flows=``, which goes before it."""

from __future__ import annotations

import json
import warnings
from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from typing import Any

from mlc.errors import MlcWarning, PlanError
from mlc.ir.lowered.contract import Modes
from mlc.ir.lowered.decision import Decision
from mlc.ir.lowered.responses import (
    Evolution,
    FiniteDifference,
    FirstOrder,
    ForwardGradient,
    FullyFirstOrder,
    Implicit,
    Response,
    Truncated,
    read,
)
from mlc.ir.program import Level, Program

__all__ = ["asked", "counts_steps", "decided", "lost", "needs_reverse", "refuse_forward", "uncut", "unreached"]

_WHY: dict[type[Response], str] = {
    Truncated: "exact through the last steps, the state before them is a constant",
    FirstOrder: "inner gradients are constants, the update is followed",
    FiniteDifference: "every step, second-order products as differences of gradients",
    Implicit: "a solve with the Hessian of the level's loss at its final point",
    ForwardGradient: "directional derivatives along random tangents",
    Evolution: "differences of results at random meta-parameters",
    FullyFirstOrder: "a second run beside the first, no second derivatives",
}
_FORWARD = (Truncated, FirstOrder)  # what forward mode through the loops can do, too


def asked(program: Program, flows: Any) -> dict[str, Response]:
    """Responses of a program's levels, by name, those left out that are exact.

    Args:
        program: Its levels hold what the code asked for.
        flows: As :func:`mlc.compile` takes it; names of levels, declared or as ``plan.explain()`` prints them.

    Raises:
        PlanError: for a name that is no level's.
    """
    found = {x.name: read(json.loads(x.response)) for x in program.levels if x.response}
    if isinstance(flows, Mapping):
        for name, response in flows.items():
            if isinstance(response, Response):
                found.update((x.name, response) for x in _named(program, name))
    return {name: r for name, r in found.items() if not r.exact}


def _named(program: Program, name: Any) -> list[Level]:
    source = str(name).partition(" -> ")[0]
    levels = [x for x in program.levels[1:] if source in (x.name, x.declared)]
    if not levels:
        known = dict.fromkeys(x.title for x in program.levels[1:])
        raise PlanError(
            f"flows gives a response to {name!r}, which is no level of this program",
            advice="there are " + ", ".join(known) if known else "it has no level: nothing in it is trained",
        )
    return levels


def counts_steps(program: Program, flows: Any) -> bool:
    """Whether a response counts the steps of its level, which must be known then."""
    return any(isinstance(r, Truncated) for r in asked(program, flows).values())


def needs_reverse(responses: Mapping[str, Response]) -> bool:
    """Whether forward mode through the loops is no way to these."""
    return any(not isinstance(r, _FORWARD) for r in responses.values())


def refuse_forward(modes: Modes) -> None:
    """Refuse forward mode beside a response that is a rule of its own.

    Raises:
        PlanError: naming both.
    """
    if modes.mode == "forward" and needs_reverse(modes.responses):
        name, r = next((n, r) for n, r in modes.responses.items() if not isinstance(r, _FORWARD))
        raise PlanError(
            f"flows asks for forward mode and level {name} for {r}",
            advice=f"leave one of them out: {type(r).__name__} says itself which way its derivative goes",
        )


def lost(program: Program, responses: Mapping[str, Response]) -> list[str]:
    """Warnings: meta-parameters whose every path goes where a response has no derivative.

    Raises:
        PlanError: when that is so for all of them.
    """
    gone = _cut_off(program, responses)
    if not gone:
        return []
    why = f"{_given(program, responses)} takes it for constant where it enters"
    _refuse_nothing_left(program, gone, why)
    return [f"the gradient of {_which(gone)} is zero: {why}"]


def uncut(program: Program, responses: Mapping[str, Response]) -> list[str]:
    """Warnings: cuts in the losses of a level that its response does not see, as it only compares runs of them."""
    said = []
    for level in program.levels:
        r = responses.get(level.name)
        if not isinstance(r, (Evolution, FullyFirstOrder)):
            continue
        sources = {level.name} if isinstance(r, FullyFirstOrder) else {level.name, *_reaching(program)}
        cuts = [f for f in program.flows if f.kind == "stop" and f.target == level.name and f.source in sources]
        for why, loc in dict.fromkeys((f.why, f.loc) for f in cuts):
            at = f" at {loc.file}, line {loc.line}" if loc is not None else ""
            said.append(
                f"{r} of level {level.title} compares runs: {why}{at} is no constant for it, its derivative goes"
                " through it. Try: mlc.Implicit(), mlc.FiniteDifference() or mlc.ForwardGradient()"
            )  # fmt: skip
    return said


def unreached(program: Program, responses: Mapping[str, Response], gradients: Collection[int]) -> None:
    """Hold the differentiated program against the flows: a response may leave out a path that no flow shows.

    A level that is reached only through what another one trained is such a path.

    Args:
        program: The program.
        responses: By name of the level.
        gradients: Positions of the inputs that have a hypergradient.

    Raises:
        PlanError: when no meta-parameter has a derivative left; a warning where some have none.
    """
    if not responses:
        return
    have = {program.inputs[i].name for i in gradients}
    gone = [n for n in _reaching(program) if n not in have]
    why = f"{_given(program, responses)} leaves out every way to the result"
    _refuse_nothing_left(program, gone, why)
    said = _cut_off(program, responses)
    new = [n for n in gone if n not in said]
    if new:
        warnings.warn(MlcWarning(f"the gradient of {_which(new)} will be None: {why}"), stacklevel=2)


def _reaching(program: Program) -> list[str]:
    """Meta-parameters with a path to the result."""
    names = [program.inputs[i].name for i in program.metas]
    return [n for n in names if program.graph.paths(n)]


def _cut_off(program: Program, responses: Mapping[str, Response]) -> list[str]:
    """Those whose every path enters a level where its response takes it for constant."""
    if not responses:
        return []
    flows = []
    for f in program.flows:
        r = responses.get(f.target)
        if f.kind == "value" and isinstance(r, FirstOrder) and f.why == "loss":
            f = replace(f, carries=False)
        elif f.kind == "value" and isinstance(r, (Implicit, FullyFirstOrder)) and f.why and "loss" not in f.why:
            f = replace(f, carries=False) if f.why != "trained above" else f
        flows.append(f)
    after = replace(program, flows=tuple(flows)).graph
    return [n for n in _reaching(program) if not after.paths(n)]


def _refuse_nothing_left(program: Program, gone: Sequence[str], why: str) -> None:
    if gone and len(gone) == len(_reaching(program)):
        raise PlanError(
            f"no meta-parameter has a derivative left: {_which(gone)}; {why}", loc=program.loc,
            advice="use mlc.Unroll() or mlc.Truncated(steps) for that level",
        )  # fmt: skip


def _given(program: Program, responses: Mapping[str, Response]) -> str:
    titles = {x.name: x.title for x in program.levels}
    return ", ".join(f"{r} of level {titles[n]}" for n, r in responses.items())


def _which(names: Sequence[str]) -> str:
    return ", ".join(names[:4]) + (f" and {len(names) - 4} more" if len(names) > 4 else "")


def decided(program: Program, responses: Mapping[str, Response]) -> list[Decision]:
    """A decision for every flow out of a level whose response is not the exact unroll."""
    out = []
    for level in program.levels:
        r = responses.get(level.name)
        if r is None:
            continue
        ends = [f.target for f in program.flows if f.kind == "response" and f.source == level.name]
        subjects = [f"response {level.name} -> {end}" for end in ends] or [f"response of {level.name}"]
        out += [Decision(subject=s, choice=str(r), reason=_WHY[type(r)], runner_up="Unroll(): exact") for s in subjects]
    return out
