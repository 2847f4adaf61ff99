"""The verifier: every value is defined once, before it is used, with the types that its operator says.

Invariants, for a region and for all regions inside it:

- inputs are distinct; every value is defined once, before its first use, and used only in its own region;
- a gradient has as many results as values it is taken by, of their shapes and dtypes, and a seed per loss;
- a loop's arguments, body and results agree in number, shape and dtype, and its sequences in length;
- what draws or loops through effects has one result per effect, of its type;
- primitives have the number of arguments that they need.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, TypeVar

from torch._ops import OpOverload

from mlc.errors import VerifyError
from mlc.ir.core import (
    Alias,
    Custom,
    EffectCall,
    Eqn,
    Feed,
    Grad,
    Index,
    Loop,
    NestedEffects,
    Pack,
    Primitive,
    Region,
    Replay,
    SafeSqrt,
    Stop,
    Var,
)
from mlc.ir.literals import type_text
from mlc.ir.problem import Problem
from mlc.ir.types import SeqType, TensorType, Type

__all__ = ["ROLES", "verify", "verify_program"]

_P = TypeVar("_P", bound=Problem)

ROLES = ("meta", "trained", "state", "data")


def verify_program(p: _P) -> _P:
    """Check a program: its region, and that inputs and number of results fit it.

    Raises:
        VerifyError: saying what does not hold.
    """
    verify(p.region, p.name)
    if len(p.inputs) != len(p.region.inputs):
        raise VerifyError(f"{p.name}: {len(p.inputs)} inputs described, {len(p.region.inputs)} in the region")
    for x, v in zip(p.inputs, p.region.inputs, strict=True):
        if x.type != v.type:
            raise VerifyError(f"{p.name}: input {x.name} is {type_text(v.type)}, described as {type_text(x.type)}")
        if x.role not in ROLES:
            raise VerifyError(f"{p.name}: input {x.name} has the unknown role {x.role}")
    if not 0 <= p.n_outputs <= len(p.region.outputs):
        raise VerifyError(f"{p.name}: returns {p.n_outputs} of {len(p.region.outputs)} results")
    _verify_names(p)
    return p


def _verify_names(p: Problem) -> None:
    levels = {x.name for x in p.levels}
    if len(levels) != len(p.levels):
        raise VerifyError(f"{p.name}: two levels have the same name")
    known = levels | {x.name for x in p.inputs}
    for f in p.flows:
        if f.target not in levels or f.source not in known:
            raise VerifyError(f"{p.name}: a {f.kind} flow from {f.source} to {f.target}, which are not both there")
        if f.kind not in ("value", "response", "gradient", "stop"):
            raise VerifyError(f"{p.name}: unknown kind of flow {f.kind}")


def verify(r: Region, where: str = "program") -> Region:
    """Check the invariants of a region and of the regions in it; returns it.

    Raises:
        VerifyError: naming the equation that breaks one.
    """
    defined: set[Var] = set()
    for v in r.inputs:
        if v in defined:
            raise VerifyError(f"{where}: an input is listed twice")
        defined.add(v)
    if r.names and len(r.names) != len(r.inputs):
        raise VerifyError(f"{where}: {len(r.names)} names for {len(r.inputs)} inputs")
    for i, e in enumerate(r.eqns):
        here = f"{where}: equation {i} ({e.op.name if isinstance(e.op, Primitive) else e.op})"
        for v in e.inputs:
            if v not in defined:
                raise VerifyError(f"{here} reads a value that is not defined yet", loc=e.loc)
        for v in e.outs:
            if v in defined:
                raise VerifyError(f"{here} defines a value again", loc=e.loc)
            defined.add(v)
        problem = _problem(e)
        if problem:
            raise VerifyError(f"{here} {problem}", loc=e.loc)
        _inside(e, where)
    for v in r.outputs:
        if v not in defined:
            raise VerifyError(f"{where}: an output is not defined")
    return r


def _inside(e: Eqn, where: str) -> None:
    if isinstance(e.op, Loop):
        verify(e.op.body, f"{where}.{e.op.title or 'loop'}")
        if e.op.replay is not None:
            verify(e.op.replay.body, f"{where}.{e.op.title or 'loop'}.replay")
    elif isinstance(e.op, Custom):
        verify(e.op.backward, f"{where}.{e.op.title}")


def _problem(e: Eqn) -> str:
    """What is wrong with one equation; empty when nothing is."""
    if isinstance(e.op, OpOverload):
        return ""
    for cls, check in _CHECKS.items():
        if isinstance(e.op, cls):
            return check(e.op, e)
    return ""


def _alike(a: Type, b: Type) -> bool:
    """Same shape and dtype; layout may differ."""
    if isinstance(a, SeqType) or isinstance(b, SeqType):
        if not (isinstance(a, SeqType) and isinstance(b, SeqType)):
            return False
        return _alike(a.elem, b.elem) and (a.length == b.length or None in (a.length, b.length))
    return a.shape == b.shape and a.dtype == b.dtype and a.device == b.device


def _pairs(what: str, one: Sequence[Var], two: Sequence[Var]) -> str:
    for i, (a, b) in enumerate(zip(one, two, strict=True)):
        if not _alike(a.type, b.type):
            return f"{what} {i} changes its type from {type_text(a.type)} to {type_text(b.type)}"
    return ""


def _same(op: Any, e: Eqn) -> str:
    if len(e.args) < len(e.outs) or not e.outs:
        return f"has {len(e.args)} arguments for {len(e.outs)} results"
    return _pairs("result", e.args[: len(e.outs)], e.outs)


def _grad(op: Grad, e: Eqn) -> str:
    if len(e.args) != 2 * op.n_loss + op.n_wrt or len(e.outs) != op.n_wrt:
        return "has the wrong number of arguments"
    losses, wrt, seeds = (
        e.args[: op.n_loss],
        e.args[op.n_loss : op.n_loss + op.n_wrt],
        e.args[op.n_loss + op.n_wrt :],
    )
    for v in (*losses, *wrt):
        if not v.type.is_float:
            return f"differentiates a value of type {type_text(v.type)}"
    return _pairs("seed", losses, seeds) or _pairs("gradient", wrt, e.outs)


def _loop(op: Loop, e: Eqn) -> str:
    ins, outs, n = op.body.inputs, op.body.outputs, op.n_carry
    if len(e.args) != len(ins):
        return f"has {len(e.args)} arguments for a body of {len(ins)} inputs"
    if len(e.outs) != len(outs):
        return f"has {len(e.outs)} results for a body of {len(outs)} outputs"
    if op.n_seq < 0 or op.n_emit < 0:
        return "has more carries and constants than its body has inputs or outputs"
    split = n + op.n_const
    found = _pairs("carry", ins[:n], outs[:n]) or _pairs("argument", e.args[:split], ins[:split])
    found = found or _pairs("result", e.outs[:n], outs[:n])
    if found:
        return found
    rows = [("sequence", a, b.type) for a, b in zip(e.args[split:], ins[split:], strict=True)]
    rows += [("emission", a, b.type) for a, b in zip(e.outs[n:], outs[n:], strict=True)]
    for what, v, elem in rows:
        if not isinstance(v.type, SeqType) or not _alike(v.type.elem, elem):
            return f"has a {what} of type {type_text(v.type)} for elements of type {type_text(elem)}"
        if None not in (v.type.length, op.trips) and v.type.length != op.trips:
            return f"runs {op.trips} times over a {what} of {v.type.length}"
    if any(not 0 <= j < op.n_emit for j in op.host):
        return f"keeps {op.host} of {op.n_emit} emissions on the host"
    return "" if op.replay is None else _replay(op, op.replay)


def _replay(op: Loop, r: Replay) -> str:
    split = op.n_carry + op.n_const
    ins, emitted = op.body.inputs, op.body.outputs[op.n_carry :]
    sizes = (op.n_carry, op.n_const, op.n_seq, op.n_emit)
    for what, size in zip((r.carries, r.consts, r.seqs, r.dense), sizes, strict=True):
        if any(not 0 <= i < size for i in what):
            return f"replays {what} of {size}"
    if r.slots < 1 or len(r.body.outputs) != len(r.carries):
        return f"replays {len(r.carries)} carries from {r.slots} sets with a body of {len(r.body.outputs)} results"
    wanted = [ins[i] for i in r.carries] + [ins[op.n_carry + i] for i in r.consts]
    wanted += [ins[split + i] for i in r.seqs] + [emitted[i] for i in r.dense]
    if len(wanted) != len(r.body.inputs):
        return f"replays with {len(wanted)} values for a body of {len(r.body.inputs)} inputs"
    found = _pairs("replayed input", wanted, r.body.inputs)
    return found or _pairs("replayed carry", wanted[: len(r.carries)], r.body.outputs)


def _pack(op: Pack, e: Eqn) -> str:
    t = e.outs[0].type if len(e.outs) == 1 else None
    if not isinstance(t, SeqType) or t.length != len(e.args):
        return f"makes no sequence of its {len(e.args)} arguments"
    bad = next((v for v in e.args if not _alike(v.type, t.elem)), None)
    return "" if bad is None else f"puts {type_text(bad.type)} into {type_text(t)}"


def _item(op: Index, e: Eqn) -> str:
    t = e.args[0].type if len(e.args) == 1 and len(e.outs) == 1 else None
    if not isinstance(t, SeqType):
        return "picks from what is no sequence"
    if t.length is not None and not -t.length <= op.at < t.length:
        return f"picks element {op.at} of {t.length}"
    return "" if _alike(t.elem, e.outs[0].type) else f"picks {type_text(e.outs[0].type)} from {type_text(t)}"


def _effect_types(effects: Sequence[Any]) -> list[Type]:
    out: list[Type] = []
    for x in effects:
        if isinstance(x, NestedEffects):
            out += [SeqType(t, x.trips) for t in _effect_types(x.effects)]
        else:
            assert isinstance(x, EffectCall)
            out += x.types
    return out


def _feed(op: Feed, e: Eqn) -> str:
    types = [SeqType(t, op.trips) for t in _effect_types(op.effects)]
    if len(types) != len(e.outs):
        return f"has {len(e.outs)} results for {len(types)} drawn values"
    return _pairs("result", [Var(t) for t in types], e.outs)


def _custom(op: Custom, e: Eqn) -> str:
    raw = e.args[op.n_in : op.n_in + op.n_out]
    if len(raw) != op.n_out or len(e.outs) != op.n_out:
        return f"has {len(e.outs)} results for {op.n_out} recorded ones"
    if len(op.present) != op.n_in or sum(op.present) != len(op.backward.outputs):
        return f"has a backward of {len(op.backward.outputs)} results for {op.n_in} inputs"
    if len(op.backward.inputs) != len(e.args) + op.n_out:
        return f"has a backward of {len(op.backward.inputs)} inputs for {len(e.args) + op.n_out} values"
    return _pairs("result", raw, e.outs)


def _plain(op: Any, e: Eqn) -> str:
    if any(not isinstance(v.type, TensorType) for v in e.outs):
        return "has a sequence as result"
    return ""


_CHECKS: dict[type[Primitive], Callable[[Any, Eqn], str]] = {
    Stop: _same, Alias: _same, SafeSqrt: _same, Grad: _grad, Loop: _loop, Pack: _pack, Index: _item,
    Feed: _feed, Custom: _custom, Primitive: _plain,
}  # fmt: skip
