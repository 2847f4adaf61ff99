"""Forward mode as stages: the forward stage computes Jacobian columns, the backward stage contracts them.

The k columns of an output are its derivatives by every element of every meta-parameter that reaches a result; they
come out of one sweep together with the values (:mod:`mlc.passes.autodiff.tangents`).  A hypergradient is then the inner
product of the columns with the cotangents: sum over outputs of ``columns[k, ...] * cotangent[...]``.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate

import torch
from torch import Tensor

from mlc.ir.builder import Builder, contiguous_type
from mlc.ir.core import Custom, Eqn, Loop, Region, Stop, Var
from mlc.ir.lowered.nesting import map_bodies
from mlc.ir.lowered.stages import Stages
from mlc.ir.origin import Origin
from mlc.ir.program import Program
from mlc.ir.types import TensorType, Type
from mlc.passes.autodiff.adjoint import Tape, lower_grads
from mlc.passes.autodiff.forward import NotForward
from mlc.passes.autodiff.policy import Policy
from mlc.passes.autodiff.reverse import Inside, Passing, active_vars, loop_activity, outermost
from mlc.passes.autodiff.tangents import Pusher
from mlc.passes.remat.prune import prune
from mlc.passes.rules.recorded import fake_mode
from mlc.record.recorder import Recorder

__all__ = ["MOST_COLUMNS", "count", "forward_stages", "legal"]

# One derivative for each of so many elements is never the better way, and would not fit before it was refused.
MOST_COLUMNS = 1024


def count(program: Program) -> int:
    """k, the number of tangents: elements of all meta-parameters with a flow that carries derivative."""
    carrying = {f.source for f in program.flows if f.carries}
    found = [program.inputs[i] for i in program.metas if program.inputs[i].name in carrying]
    return sum(_elements(x.type) for x in found)


def legal(program: Program, policy: Policy) -> str | None:
    """Why forward mode cannot be used, as far as that shows without differentiating; None when nothing does.

    An operator without a forward rule shows only in :func:`forward_stages`.
    """
    if any(_is_complex(program.inputs[i].type) for i in program.metas):
        return "a meta-parameter is complex"
    k = count(program)
    if k > MOST_COLUMNS:
        return f"{k} elements of meta-parameters are too many for one tangent each"
    through: Inside = outermost(policy.stop)
    for e in _active(program.region, [program.region.inputs[i] for i in program.metas], through):
        if isinstance(e.op, Custom):
            where = f" (line {e.loc.line})" if e.loc is not None else ""
            return f"{e.op.title} is a custom autograd.Function: its backward is differentiated in reverse{where}"
    return None


def _active(region: Region, wrt: Sequence[Var], through: Inside) -> Iterator[Eqn]:
    """Equations that read what depends on ``wrt``, those in loops included."""
    active = active_vars(region.eqns, wrt, through_stops=through)
    for e in region.eqns:
        if not any(v in active for v in e.inputs):
            continue
        yield e
        if isinstance(e.op, Loop):
            carries, _ = loop_activity(e, active, through)
            ins = e.op.body.inputs
            entering = [x for x, v in zip(ins, e.args, strict=True) if v in active]
            yield from _active(e.op.body, [*entering, *[ins[i] for i in carries]], through)


def _elements(t: Type) -> int:
    assert isinstance(t, TensorType)
    return t.numel


def _is_complex(t: Type) -> bool:
    return isinstance(t, TensorType) and t.dtype.is_complex


@dataclass(frozen=True)
class _Reach:
    """What depends on what: meta-parameters (input positions) with a path to a result, and results with one."""

    metas: tuple[int, ...]
    outputs: tuple[int, ...]


def forward_stages(program: Program, policy: Policy) -> Stages:
    """Stages of a program differentiated in forward mode.

    Args:
        program: The program.
        policy: ``stop`` as for reverse mode; ``mode`` is not read: gradients that a level above differentiates
            are mixed products.

    Raises:
        NotForward: with the reason, when the program cannot be differentiated so.
    """
    reason = legal(program, policy)
    if reason is not None:
        raise NotForward(reason)
    region, passing = _without_gradients(program, replace(policy, mode="mixed"))
    through: Inside = outermost(policy.stop)
    reach = _reach(program, region, Passing(passing, through))
    if not reach.metas:
        return Stages(prune(region), None, len(region.outputs), (), reach.outputs, (), program.handed)
    forward, columns = _push(program, region, passing, reach, through)
    forward = prune(forward)
    n = len(region.outputs)
    backward = _contraction(program, region, reach, columns)
    saved = tuple(("out", n + j) for j in range(len(columns)))
    return Stages(forward, backward, n, saved, reach.outputs, reach.metas, program.handed)


def _without_gradients(program: Program, policy: Policy) -> tuple[Region, frozenset[Eqn]]:
    """The program with inner gradients lowered, and the stops of its outermost region that let derivatives pass."""
    b = Builder(policy=policy)
    source = program.region
    env = {v: b.input(v.type, x.name) for v, x in zip(source.inputs, program.inputs, strict=True)}
    body, twins = source, None
    if policy.casts is not None:
        body, twins = policy.casts.whole(source, program.n_outputs)
        if twins or policy.casts.losses != policy.casts.products:
            raise NotForward("its flows are to compute in another precision than its levels")
    tape = Tape(b, body, env, Policy("reverse", policy.stop, casts=policy.casts), twins=twins)
    cut = tape.outer_cut()
    passing = frozenset(e for e in tape.eqns if isinstance(e.op, Stop) and e not in cut)
    region = b.region([env[v] for v in source.outputs])
    return map_bodies(region, lambda r: lower_grads(r, policy)), passing


def _reach(program: Program, region: Region, through: Passing) -> _Reach:
    metas, outputs = [], set()
    results = region.outputs[: program.n_outputs]
    for i in program.metas:
        active = active_vars(region.eqns, [region.inputs[i]], through_stops=through)
        found = {j for j, v in enumerate(results) if v in active}
        if found:
            metas.append(i)
            outputs |= found
    return _Reach(tuple(metas), tuple(sorted(outputs)))


def _push(program: Program, region: Region, passing: frozenset[Eqn], reach: _Reach, through: Inside,
          ) -> tuple[Region, dict[int, Var]]:  # fmt: skip
    """Values and columns in one region; columns by output position, those that are zero left out."""
    k = sum(_elements(region.inputs[i].type) for i in reach.metas)
    b = Builder()
    pusher = Pusher(b, k, through, lambda e: e in passing)
    pusher.env.update((v, b.input(v.type, n)) for v, n in zip(region.inputs, region.names, strict=True))
    metas = [pusher.env[region.inputs[i]] for i in reach.metas]
    for v, seed in zip(metas, _seeds(b, [v.type for v in metas], k), strict=True):
        pusher.tan[v] = seed
    pusher.run(region)
    outs = [pusher.env[v] for v in region.outputs]
    columns = {j: pusher.tan[outs[j]] for j in reach.outputs if outs[j] in pusher.tan}
    return b.region([*outs, *columns.values()]), columns


def _seeds(b: Builder, types: Sequence[Type], k: int) -> list[Var]:
    """One-hot tangents: element j of all meta-parameters together moves in tangent j."""
    if k == 1:
        return [b.one(types[0])]
    ends = list(accumulate((_elements(t) for t in types), initial=0))
    rec = Recorder(merge=True, fake_mode=fake_mode())
    with rec:
        made: list[Tensor] = []
        for t, start in zip(types, ends[:-1], strict=True):
            assert isinstance(t, TensorType)
            own = torch.arange(start, start + t.numel, device=t.device)
            rows = torch.arange(k, device=t.device).unsqueeze(1) == own
            made.append(rows.to(t.dtype).reshape(k, *t.shape))
    values = [rec.value(rec.handle(x)) for x in made]
    return list(b.inline(rec.builder.region(values), [], tag=Origin.TANGENT))


def _contraction(program: Program, region: Region, reach: _Reach, columns: dict[int, Var]) -> Region:
    """Backward stage: ``(columns..., cotangents...) -> hypergradients``."""
    rec = Recorder(merge=True, fake_mode=fake_mode())
    metas = [region.inputs[i].type for i in reach.metas]
    saved = {j: rec.fresh(rec.builder.input(v.type, f"columns_{j}")) for j, v in columns.items()}
    given = {j: rec.fresh(rec.builder.input(contiguous_type(region.outputs[j].type), f"ct_{j}")) for j in reach.outputs}
    for t in (*saved.values(), *given.values()):
        rec.handle(t).leaf = True
    with rec:
        found = _contract(metas, [(saved[j], given[j]) for j in saved])
    return rec.builder.region([rec.value(rec.handle(t)) for t in found])


def _contract(metas: Sequence[Type], pairs: Sequence[tuple[Tensor, Tensor]]) -> list[Tensor]:
    """Inner products of columns (k, ...) and cotangents (...), cut into gradients of the meta-parameters' shapes."""
    k = sum(_elements(t) for t in metas)
    total: Tensor | None = None
    for column, ct in pairs:
        product = column.reshape(k, -1) * (ct.conj() if ct.is_complex() else ct).reshape(1, -1)
        row = (product.real if product.is_complex() else product).sum(1)
        total = row if total is None else total + row
    out, start = [], 0
    for t in metas:
        assert isinstance(t, TensorType)
        if total is None:
            out.append(torch.zeros(t.shape, dtype=t.dtype, device=t.device))
        else:
            part = total[start : start + math.prod(t.shape)]
            out.append(part.reshape(t.shape).to(device=t.device, dtype=t.dtype, copy=True))
        start += t.numel
    return out
