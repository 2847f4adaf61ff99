"""Recording a root in a compiled function: the solver runs unseen, its condition becomes a region of its own.

What the condition reads by closure becomes inputs of the node like anything a program reads.  What the solver reads
by closure is watched: tensors become inputs too; a solver that the function itself makes can hold more than that, so
such a function is recorded anew at every call.
"""

from __future__ import annotations

import functools
import time
import types
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from mlc.errors import CaptureError
from mlc.implicit.answer import answer, pieces
from mlc.implicit.calls import HOLE, Recorded, RegionCondition, RootCall, Solver
from mlc.implicit.closed import UserCondition, caller, detached
from mlc.implicit.conditioned import Conditioned
from mlc.implicit.node import Spec, rooted
from mlc.implicit.reading import Reading, noting
from mlc.ir.builder import Builder
from mlc.ir.core import Eqn, Region, Var
from mlc.ir.opaque.call import Call
from mlc.ir.origin import Origin
from mlc.ir.text import print_region
from mlc.ir.types import TensorType
from mlc.trace.numbers.links import Linked

__all__ = ["record"]

_PLAIN = (int, float, bool, str, bytes, complex, type(None), torch.dtype, torch.device, torch.nn.Module, type,
          types.FunctionType, types.BuiltinFunctionType, types.ModuleType)  # fmt: skip


def record(ob: Any, root: Conditioned, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Run a root while ``ob`` observes, and record it as one equation."""
    leaves, spec = pytree.tree_flatten((_plain(ob, args), _plain(ob, kwargs)))
    inputs = [t for t in leaves if isinstance(t, Tensor)]
    own = _made_now(ob, root) and _made_now(ob, root.solve)
    if own:
        ob.unplaced.append(ob.place())
    with ob.pause():
        started = time.perf_counter()
        x, x_spec, foreign = _solve(ob, root, args, kwargs)
        seconds = time.perf_counter() - started
        condition = UserCondition(caller(root.optimality, leaves, spec, x_spec), root.what, x_spec)
        more, depends = condition.explore(x, inputs)
        tracked = torch.is_grad_enabled() and bool(more or any(depends))
        live = [t if d else t.detach() for t, d in zip(inputs, depends, strict=True)]
        real = list(rooted(Spec(condition, root.settings, len(x), root.log), x, [*live, *more])) if tracked else x
    for t in condition.outside:  # in the program itself, so that what they are is known there
        ob.read(t, False)
    reads, region = _Tracing(ob, root, leaves, spec, x, x_spec).region()
    values = [ob.read(t, tracked) if d else _constant(ob, t) for t, d in zip(inputs, depends, strict=True)]
    solver = Solver(
        root.solve, root.solver_name, [HOLE if isinstance(t, Tensor) else _kept(ob, t) for t in leaves], spec, x_spec,
        [TensorType.of(t) for t in x], foreign, _cells(root.solve) if own else [], ob.rehearsal,
    )  # fmt: skip
    beside = [_constant(ob, t) for t in foreign]
    everything = [*values, *reads, *beside]
    n, m = len(values), len(reads)
    parts = ([*range(n), *range(n + m, len(everything))], list(range(n + m)))
    solver.key = _key(root, solver, region, parts, own)
    with ob.pause():
        ob.rehearsal.append(Recorded(solver, [t.detach().clone() for t in (*inputs, *foreign)],
                                   [t.detach().clone() for t in x]))  # fmt: skip
    recorded = RegionCondition(region, root.what)
    callee = RootCall(solver, Spec(recorded, root.settings, len(x), root.log), solver.key, parts)
    mask = 0
    for v in (*values, *reads):
        mask |= v.mask
    outs = tuple(Var(TensorType.of(t), mask) for t in x)
    loc, site = ob.locate()
    ob.builder.append(
        Eqn(Call(root.title, callee, seconds, single=True), tuple(everything), outs, (), loc, ob.tag, site)
    )
    for t, v in zip(real, outs, strict=True):
        ob.wrap(t, v)
    return pytree.tree_unflatten(real, x_spec)


def _constant(ob: Any, t: Tensor) -> Var:
    """The value of a tensor that the solver alone reads."""
    v = ob.present(t)
    return ob._stop_at(v, None, None, tag=Origin.SOLVER) if v.mask and v.type.is_float else v  # type: ignore[no-any-return]


def _key(root: Conditioned, solver: Solver, region: Region, parts: Any, own: bool) -> tuple[Any, ...]:
    """What makes two runs of one root the same node: in a loop they become one."""
    if own:
        return ("root", id(solver))
    constants = repr([x for x in solver.leaves if x is not HOLE])
    foreign = tuple(id(t) for t in solver.foreign)
    return ("root", id(root), constants, repr(solver.spec), foreign, repr(parts), print_region(region))


def _solve(ob: Any, root: Conditioned, args: Any, kwargs: Any) -> tuple[list[Tensor], Any, list[Tensor]]:
    """x, its structure, and the tensors that the solver reads by closure."""
    args, kwargs = detached((_plain(ob, args), _plain(ob, kwargs)))
    given = [t for t in pytree.tree_leaves((args, kwargs)) if isinstance(t, Tensor)]
    with torch.no_grad(), Reading(given) as reading, noting(reading):
        found = root.solve(*args, **kwargs)
    written = reading.written()
    if written is not None:
        raise CaptureError(
            f"{root.solver_name} changes a tensor in place that was there before, of shape {tuple(written.shape)}",
            loc=ob.place(), advice="let it work on a copy, and return the result",
        )  # fmt: skip
    x, spec = answer(found, given, root.solver_name)
    return [t.contiguous() for t in x], spec, list(reading.foreign.values())


def _plain(ob: Any, args: Any) -> Any:
    """The same with plain numbers for those that know where they come from; later calls must find them again."""
    return pytree.tree_map(lambda x: _pinned(ob, x) if isinstance(x, Linked) else x, args)


def _pinned(ob: Any, x: Linked) -> Any:
    ob.guard(x.tensor, x.value, "a number that a solver is given")
    return x.value


def _kept(ob: Any, x: Any) -> Any:
    """An argument that is no tensor, for later calls."""
    if isinstance(x, np.ndarray):
        return x.copy()
    if not isinstance(x, _PLAIN):
        ob.unplaced.append(ob.place())  # it may be another one then
    return x


def _made_now(ob: Any, f: Any) -> bool:
    """Whether an object was made during the call."""
    while isinstance(f, (functools.partial, types.MethodType)):
        f = f.func if isinstance(f, functools.partial) else f.__func__
    return ob.reads is None or ob.reads.made_now(f)


def _cells(f: Any) -> list[tuple[Any, Any]]:
    """Variables that a function and those that it calls by closure read, and what they hold."""
    found: dict[int, tuple[Any, Any]] = {}
    todo, seen = [f], set()
    while todo:
        g = todo.pop()
        if id(g) in seen:
            continue
        seen.add(id(g))
        if isinstance(g, functools.partial):
            todo.append(g.func)
        g = getattr(g, "__func__", g)
        for cell in getattr(g, "__closure__", None) or ():
            try:
                found[id(cell)] = (cell, cell.cell_contents)
            except ValueError:  # not set yet
                continue
            if callable(cell.cell_contents):
                todo.append(cell.cell_contents)
    return list(found.values())


class _Tracing:
    """Records the condition at the solution, as a region over x, the arguments, and what it reads besides."""

    def __init__(self, ob: Any, root: Conditioned, leaves: list[Any], spec: Any, x: list[Tensor], x_spec: Any) -> None:
        self.ob, self.root, self.leaves, self.spec, self.x, self.x_spec = ob, root, leaves, spec, x, x_spec

    def region(self) -> tuple[list[Var], Region]:
        """The values that it reads by closure, and the region: (x, arguments, these) -> F."""
        ob = self.ob
        counts = self._counts()
        with ob.recording_apart():
            ins, outputs = self._run()
            eqns = tuple(ob.builder.eqns)
        if self._counts() != counts:
            raise CaptureError(
                f"{self.root.what} changes state, draws random numbers, takes a decision by a value or leaves torch, "
                "inside a compiled function", loc=ob.place(),
                advice="compute it from its arguments by torch operators alone (torch.where for a choice)",
            )  # fmt: skip
        inside = {o for e in eqns for o in e.outs} | set(ins)
        free = list(dict.fromkeys(v for v in (*(u for e in eqns for u in e.inputs), *outputs) if v not in inside))
        return free, _closed([*ins, *free], eqns, outputs)

    def _counts(self) -> tuple[int, ...]:
        ob = self.ob
        return len(ob.decisions), ob.writes, len(ob.draws), len(ob.frozen), len(ob.files)

    def _run(self) -> tuple[list[Var], list[Var]]:
        ob = self.ob
        ins: list[Var] = []
        points = [self._stand_in(t, True, ins) for t in self.x]
        given = [self._stand_in(t, t.requires_grad, ins) for t in self.leaves if isinstance(t, Tensor)]
        call = caller(self.root.optimality, self.leaves, self.spec, self.x_spec)
        with torch.enable_grad(), torch.autocast(points[0].device.type, enabled=False):
            found = pieces(call(points, given), points, self.x_spec, self.root.what)
        return ins, [ob.read(t, True) for t in found]

    def _stand_in(self, t: Tensor, differentiable: bool, ins: list[Var]) -> Tensor:
        ob = self.ob
        with ob.pause(), torch.no_grad():
            new = torch.empty_strided(t.shape, t.stride(), dtype=t.dtype, device=t.device).copy_(t)
            if differentiable:
                with torch.enable_grad():  # no leaf: it is what it is, cut from nothing
                    new = new.requires_grad_().clone(memory_format=torch.preserve_format)
        var = Var(TensorType.of(new))
        ob.bind(new, var)
        if differentiable:
            ob.new_bit(var)
        ins.append(var)
        return new


def _closed(ins: list[Var], eqns: tuple[Eqn, ...], outputs: list[Var]) -> Region:
    b = Builder(merge=False)
    env = {v: b.input(v.type) for v in ins}
    for e in eqns:
        b.copy_eqn(e, env)
    return b.region([env[v] for v in outputs])
