"""Storage dtype: what loops emit for their adjoints is cast where it is emitted, and back where it is read.

Three kinds of values are saved per trip: *states* (the carries as a trip found them), *gradients* (inner gradients,
which replay the updates) and *residuals* (other values of the step that the adjoint had better not compute again).
Each may be kept in bfloat16.  Activations among the residuals may be int8 with a scale per row
(:mod:`mlc.passes.precision.rows`); a part of a gradient may not: one that becomes zero makes an Adam step's derivative
wrong by orders of magnitude.  Residuals of an update (moments, roots of them) stay as they are: the terms of that
derivative cancel only together.  States that are kept sparsely stay float32: every replay starts from one, and the
others are not stored at all.  Only sequences that nothing but loops reads, element by element, are touched; draws,
integers and small values stay as they are.  The pass comes after it was decided what is emitted.  O(equations).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import ClassVar

import torch

from mlc.ir.builder import dce
from mlc.ir.core import Eqn, Loop, Random, Region, Var, aten
from mlc.ir.lowered.contract import Context, Graphs
from mlc.ir.lowered.precision import Resolved
from mlc.ir.lowered.stages import Joint
from mlc.ir.lowered.storage import Storage
from mlc.ir.origin import Origin
from mlc.ir.program import Level, Program
from mlc.ir.types import TensorType, nbytes
from mlc.passes.cost.memory import rebuilt_of
from mlc.passes.precision import rows
from mlc.passes.precision.compute import TAG as CAST
from mlc.passes.precision.policy import dtype_of
from mlc.record.retype import shared

__all__ = ["Store", "dtype_for", "labels", "narrowly", "saved_bytes", "storage_of", "stored"]

_CAST = aten("_to_copy")

TAG = Origin.STORE
_FORWARD = (Origin.FORWARD, CAST)  # equations of a loss; what leads to its gradient is tagged otherwise
_LEAST = 64  # elements: below, a cast costs more than the bytes are worth


def dtype_for(storage: Storage, label: str, v: Var, carried: bool) -> torch.dtype | None:
    """In which dtype a loop stores a value of its body; None: as it is.

    Args:
        storage: What a policy says.
        label: Of the loop.
        v: The value.
        carried: Whether it is a carry as a trip found it.
    """
    t = v.type
    if label not in storage.kinds or not isinstance(t, TensorType) or t.numel < _LEAST:
        return None
    if t.dtype not in (torch.float32, torch.bfloat16):
        return None
    kind = "states" if carried else "gradients" if v in storage.gradients else "residuals"
    dtype = dtype_of(storage.kinds[label].get(kind))
    if dtype is torch.int8 and t.numel < rows.LEAST:
        dtype = torch.bfloat16
    return None if dtype is None or dtype.itemsize >= t.dtype.itemsize else dtype


def storage_of(program: Program, policy: Resolved, joint: Region) -> Storage | None:
    """What a policy stores narrowly in a differentiated program; None where it is nothing.

    Args:
        program: The program.
        policy: The policy.
        joint: The program differentiated, before it was decided what else than states and gradients is emitted.
    """
    kinds: dict[str, dict[str, str]] = {}
    for level in program.levels:
        wanted = policy.store.get(level.name)
        for loop in _loops(program, level) if wanted else ():
            assert wanted is not None
            mine: dict[str, str] = {str(k): str(v) for k, v in wanted.items()}
            kinds[loop.label] = _both(kinds[loop.label], mine) if loop.label in kinds else mine
    if not kinds:
        return None
    loops = [e.op for e in joint.walk() if isinstance(e.op, Loop)]
    made = {v for op in loops for e in op.body.eqns if not e.impure for v in e.outs}
    emitted = frozenset(v for op in loops for v in op.body.outputs[op.n_carry :] if v in made)
    return Storage(kinds, emitted)


def labels(program: Program, level: Level) -> tuple[str, ...]:
    """The labels of a level's loops."""
    return tuple(dict.fromkeys(loop.label for loop in _loops(program, level)))


def _loops(program: Program, level: Level) -> Iterator[Loop]:
    """The loops whose bodies take a level's gradients."""
    for *outer, loop, _ in (path for path in level.at if len(path) > 1):
        op = program.region_at(outer).eqns[loop].op
        assert isinstance(op, Loop)
        yield op


def _both(a: Mapping[str, str], b: Mapping[str, str]) -> dict[str, str]:
    """What two levels in one loop both allow."""
    return {k: a[k] if a[k] == b[k] else "bf16" for k in a if k in b}


@dataclass(frozen=True)
class _Form:
    """How one emission is stored: the values emitted instead, and what makes them in the body."""

    values: tuple[Var, ...]
    eqns: tuple[Eqn, ...]


@dataclass(frozen=True)
class Store:
    """What loops emit for their adjoints, in the dtypes of a precision policy (``joint -> joint``)."""

    name: ClassVar[str] = "store"
    takes: ClassVar[type[Joint]] = Joint
    ensures: ClassVar[str] = "what a policy names is emitted in its dtype and read back from it; the rest is as it was"

    def apply(self, graphs: Graphs, context: Context) -> Graphs:
        """Where the policy of the context says so; exact without one."""
        assert isinstance(graphs, Joint)
        return graphs if graphs.storage is None else replace(graphs, region=stored(graphs.region, graphs.storage))


def stored(region: Region, storage: Storage) -> Region:
    """The region with the emissions of its loops, and of those inside their bodies, in their storage dtypes."""
    eqns = [
        e.with_(op=replace(e.op, body=stored(e.op.body, storage))) if isinstance(e.op, Loop) else e
        for e in region.eqns
    ]  # fmt: skip
    region = Region(region.inputs, tuple(eqns), region.outputs, region.names)
    for i, e in enumerate(region.eqns):
        if isinstance(e.op, Loop) and e.origin not in (Origin.ADJOINT, Origin.TANGENT) and e.op.label in storage.kinds:
            region = _narrowed(region, i, storage)
    return region


def _narrowed(region: Region, at: int, storage: Storage) -> Region:
    """One loop of the region emits narrowly."""
    e = region.eqns[at]
    op = e.op
    assert isinstance(op, Loop)
    forms: dict[int, _Form] = {}
    updates = _updates(op, storage)
    activations = {v for x in op.body.eqns if x.origin in _FORWARD for v in x.outs}
    for j, (out, v) in enumerate(zip(e.outs[op.n_carry :], op.body.outputs[op.n_carry :], strict=True)):
        if not _plain(region, out) or (op.replay is not None and v in rebuilt_of(op)) or _drawn(op, v):
            continue
        dtype = dtype_for(storage, op.label, v, v in op.body.inputs[: op.n_carry])
        if v in updates or (dtype is torch.int8 and v not in activations):
            dtype = None
        form = None if dtype is None else narrowly(v, dtype)
        if form is not None:
            forms[j] = form
    if not forms:
        return region
    forward, instead = _emitting(e, forms)
    eqns = [forward if i == at else _reading(x, instead) for i, x in enumerate(region.eqns)]
    return Region(region.inputs, tuple(eqns), region.outputs, region.names)


def _updates(op: Loop, storage: Storage) -> set[Var]:
    """Values of a body that an update computes.

    The two terms of the derivative of an Adam step nearly cancel; rounded apart from each other they do not, and what
    is left is larger than the derivative by many orders of magnitude.
    """
    found: set[Var] = set()
    for e in op.body.eqns:
        if e.origin is Origin.UPDATE or any(v in found or v in storage.gradients for v in e.inputs):
            found.update(e.outs)
    return found


def saved_bytes(region: Region) -> dict[str, tuple[int, int]]:
    """For each loop by label, bytes of all trips that narrow emissions would take as they were computed, and take."""
    found: dict[str, tuple[int, int]] = {}
    for e in region.walk():
        op = e.op
        if not isinstance(op, Loop):
            continue
        made = {v: x for x in op.body.eqns if x.origin is TAG for v in x.outs}
        emitted = dict.fromkeys(v for v in op.body.outputs[op.n_carry :] if v in made)
        sources: dict[Var, None] = {}
        todo, seen = list(emitted), set[Var]()
        while todo:
            v = todo.pop()
            if v in made and v not in seen:
                seen.add(v)
                todo.extend(made[v].inputs)
            elif v not in made:
                sources[v] = None
        before, after = found.get(op.title, (0, 0))
        before += op.count * sum(nbytes(v.type) for v in sources)
        found[op.title] = before, after + op.count * sum(nbytes(v.type) for v in emitted)
    return {label: sizes for label, sizes in found.items() if sizes[1]}


def _plain(region: Region, seq: Var) -> bool:
    """Whether a sequence is read by loops only, element by element, and by one at least."""
    readers = [e for e in region.eqns if seq in e.inputs]
    each = all(isinstance(e.op, Loop) and seq not in e.args[: e.op.n_carry + e.op.n_const] for e in readers)
    return bool(readers) and each and seq not in region.outputs


def _drawn(op: Loop, v: Var) -> bool:
    return any(v in x.outs and (x.impure or isinstance(x.op, Random)) for x in op.body.eqns)


def narrowly(v: Var, dtype: torch.dtype) -> _Form | None:
    """A value of a loop's body in its storage dtype; None where its layout would not come back."""
    t = v.type
    assert isinstance(t, TensorType)
    if dtype is torch.int8:
        found = rows.quantised(v, TAG)
        return None if found is None else _Form(found[1:], tuple(found[0]))
    (narrow,) = shared().types(_CAST, (v,), (("dtype", dtype),))
    low = Var(narrow)
    if shared().types(_CAST, (low,), (("dtype", t.dtype),)) != (t,):
        return None
    return _Form((low,), (Eqn(_CAST, (v,), (low,), (("dtype", dtype),), tag=TAG),))


def _emitting(e: Eqn, forms: Mapping[int, _Form]) -> tuple[Eqn, dict[Var, tuple[Var, ...]]]:
    """The loop with narrow emissions, and for each sequence that is gone those that stand for it.

    A replay that reads one of them casts it back.
    """
    op = e.op
    assert isinstance(op, Loop)
    nc = op.n_carry
    values, outs = list(op.body.outputs[:nc]), list(e.outs[:nc])
    instead: dict[Var, tuple[Var, ...]] = {}
    place: dict[int, tuple[int, ...]] = {}
    made: list[Eqn] = []
    for j, (out, v) in enumerate(zip(e.outs[nc:], op.body.outputs[nc:], strict=True)):
        form = forms.get(j)
        new = (v,) if form is None else form.values
        seqs = (out,) if form is None else tuple(Var(op.sequence(x.type)) for x in new)
        place[j] = tuple(range(len(values) - nc, len(values) - nc + len(new)))
        values.extend(new)
        outs.extend(seqs)
        if form is not None:
            instead[out] = seqs
            made.extend(form.eqns)
    body = Region(op.body.inputs, (*op.body.eqns, *made), tuple(values), op.body.names)
    replay = op.replay
    if replay is not None:
        n = len(replay.carries) + len(replay.consts) + len(replay.seqs)
        head = replay.body.inputs[:n]
        inner, inputs = _read(replay.body, dict(zip(replay.body.inputs[n:], replay.dense, strict=True)), forms)
        dense = tuple(k for j in replay.dense for k in place[j])
        replay = replace(replay, body=Region((*head, *inputs), inner.eqns, inner.outputs), dense=dense)
    return e.with_(op=replace(op, body=body, replay=replay), outs=tuple(outs)), instead


def _read(body: Region, emitted: Mapping[Var, int], forms: Mapping[int, _Form]) -> tuple[Region, list[Var]]:
    """A replay's body that casts what it reads back, and its inputs that are emissions."""
    inputs: list[Var] = []
    head: list[Eqn] = []
    for v, j in emitted.items():
        if j not in forms:
            inputs.append(v)
            continue
        fresh = [Var(x.type) for x in forms[j].values]
        inputs.extend(fresh)
        head.extend(_back(fresh, v))
    return Region((), (*head, *body.eqns), body.outputs), inputs


def _reading(e: Eqn, instead: Mapping[Var, tuple[Var, ...]]) -> Eqn:
    """A loop that reads what is stored, and casts it back in its body."""
    op = e.op
    if not isinstance(op, Loop) or not any(v in instead for v in e.inputs):
        return e
    split = op.n_carry + op.n_const
    args, inputs, head = list(e.args[:split]), list(op.body.inputs[:split]), []
    names = list(op.body.names[:split]) if op.body.names else []
    for k, (arg, v) in enumerate(zip(e.args[split:], op.body.inputs[split:], strict=True)):
        seqs = instead.get(arg)
        fresh = [v] if seqs is None else [Var(s.type.elem) for s in seqs]  # type: ignore[union-attr]
        args.extend((arg,) if seqs is None else seqs)
        inputs.extend(fresh)
        if op.body.names:
            names.extend([op.body.names[split + k]] * len(fresh))
        if seqs is not None:
            head.extend(_back(fresh, v))
    body = Region(tuple(inputs), (*head, *op.body.eqns), op.body.outputs, tuple(names))
    return e.with_(op=replace(op, body=dce(body)), args=tuple(args))


def _back(low: list[Var], v: Var) -> list[Eqn]:
    """Equations that make ``v`` of its stored form."""
    if len(low) == 2:
        return rows.dequantised(low[0], low[1], v, TAG)
    assert isinstance(v.type, TensorType)
    return [Eqn(_CAST, (low[0],), (v,), (("dtype", v.type.dtype),), tag=TAG)]
