"""Tools of the responses for changing programs: regions with other equations, values under new names, copies.

A value that shall reach what reads it by another way keeps its name: what makes it gets a new one, and an equation
that gives the old name follows.  So nothing that reads it changes, and gradient equations stay the objects they are.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace

from mlc.ir.core import Eqn, Loop, Region, Stop, Var, map_vars
from mlc.ir.origin import Origin
from mlc.ir.program import Program

__all__ = ["ALWAYS", "carrying", "copied", "everywhere", "holding", "put", "renamed_outs"]

ALWAYS = Stop(-1)  # nothing passes


def everywhere(region: Region, change: Callable[[Eqn], Sequence[Eqn]]) -> Region:
    """The region with every equation that is no loop, those of loop bodies included, replaced."""
    eqns: list[Eqn] = []
    for e in region.eqns:
        if isinstance(e.op, Loop):
            body = everywhere(e.op.body, change)
            eqns.append(e if body is e.op.body else e.with_(op=replace(e.op, body=body)))
        else:
            eqns += change(e)
    if len(eqns) == len(region.eqns) and all(a is b for a, b in zip(eqns, region.eqns, strict=True)):
        return region
    return Region(region.inputs, tuple(eqns), region.outputs, region.names)


def put(program: Program, path: Sequence[int], region: Region) -> Program:
    """The program with another region at the place that these positions of loops lead to."""
    return replace(program, region=_put(program.region, tuple(path), region))


def _put(outer: Region, path: tuple[int, ...], region: Region) -> Region:
    if not path:
        return region
    e = outer.eqns[path[0]]
    assert isinstance(e.op, Loop)
    eqns = list(outer.eqns)
    eqns[path[0]] = e.with_(op=replace(e.op, body=_put(e.op.body, path[1:], region)))
    return Region(outer.inputs, tuple(eqns), outer.outputs, outer.names)


def renamed_outs(e: Eqn, names: dict[Var, Var]) -> Eqn:
    """The equation with other names for some of its results; ``names``: old to new."""
    return e.with_(outs=tuple(names.get(v, v) for v in e.outs)) if any(v in names for v in e.outs) else e


def holding(e: Eqn, vs: Iterable[Var], tag: Origin = Origin.RESPONSE) -> tuple[Eqn, list[Eqn]]:
    """The equation, and stops behind it through which its results ``vs`` go from now on."""
    names = {v: Var(v.type, v.mask) for v in vs}
    return renamed_outs(e, names), [Eqn(ALWAYS, (new,), (old,), (), e.loc, tag) for old, new in names.items()]


def carrying(e: Eqn, start: Sequence[Var], body: Region, ends: Sequence[Var], more: Sequence[Var],
             emits: Sequence[Var] = ()) -> tuple[Eqn, list[Var], list[Var]]:  # fmt: skip
    """A loop that carries more, and hands out more.

    Args:
        e: The loop.
        start: Values at the start.
        body: Its body with what makes the next values; inputs as they were.
        ends: The next values, in the body.
        more: Their names at the start of a trip.
        emits: Values of the body that it hands out trip by trip.

    Returns:
        The loop, the last values behind it, and the sequences.
    """
    op = e.op
    assert isinstance(op, Loop)
    n = op.n_carry
    names = (*body.names[:n], *[""] * len(start), *body.names[n:]) if body.names else ()
    ins = (*body.inputs[:n], *more, *body.inputs[n:])
    larger = Region(ins, body.eqns, (*body.outputs[:n], *ends, *body.outputs[n:], *emits), names)
    op = replace(op, body=larger, n_carry=n + len(start))
    last, every = [Var(v.type) for v in start], [Var(op.sequence(v.type)) for v in emits]
    outs = (*e.outs[:n], *last, *e.outs[n:], *every)
    return e.with_(op=op, args=(*e.args[:n], *start, *e.args[n:]), outs=outs), last, every


def copied(region: Region) -> Region:
    """The same region over new values, those of loop bodies in it included."""
    env: dict[Var, Var] = {v: Var(v.type, v.mask) for v in region.inputs}
    inputs = tuple(env.values())
    eqns = [_copied(e, env) for e in region.eqns]
    return Region(inputs, tuple(eqns), tuple(env[v] for v in region.outputs), region.names)


def _copied(e: Eqn, env: dict[Var, Var]) -> Eqn:
    op = replace(e.op, body=copied(e.op.body)) if isinstance(e.op, Loop) else e.op
    args = map_vars(e.args, env.__getitem__)
    kwargs = tuple((k, map_vars(v, env.__getitem__)) for k, v in e.kwargs)
    outs = tuple(Var(v.type, v.mask) for v in e.outs)
    env.update(zip(e.outs, outs, strict=True))
    return e.with_(op=op, args=args, kwargs=kwargs, outs=outs)
