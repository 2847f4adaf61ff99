"""Reverse mode over equations: cotangents of results become cotangents of inputs, last equation first."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
from torch._ops import OpOverload

from mlc.errors import DifferentiationError
from mlc.ir.builder import Builder, contiguous_type
from mlc.ir.core import Alias, Custom, Eqn, Index, Loop, Pack, SafeSqrt, Stop, Var, aten
from mlc.ir.opaque.call import Call
from mlc.ir.opaque.estimates import Tell
from mlc.ir.origin import Origin
from mlc.ir.types import SeqType, TensorType
from mlc.passes.precision.sums import sum_of
from mlc.passes.rules.recorded import NoRule, differentiable_outs, reverse_rule

__all__ = [
    "PULL",
    "Deeper",
    "Inside",
    "Passing",
    "active_vars",
    "add_cotangent",
    "dependence",
    "loop_activity",
    "outermost",
    "passes",
    "pull_eqn",
    "pullback",
]


@dataclass(frozen=True)
class Passing:
    """Which stops let a derivative pass: these of the region itself, and some inside its loops."""

    here: frozenset[Eqn]
    inside: Inside


@dataclass(frozen=True)
class Deeper:
    """Stops that a gradient taken in ``depth`` declared levels passes: those of deeper levels, ``hard`` ones if so."""

    depth: int
    hard: bool = False


Inside: TypeAlias = "Deeper | bool | str"
Through: TypeAlias = "Passing | Inside"


def active_vars(eqns: Iterable[Eqn], wrt: Iterable[Var], *, through_stops: Through = False,
                ) -> set[Var]:  # fmt: skip
    """Values that depend on ``wrt`` differentiably (``wrt`` included).

    ``through_stops`` tells which stops let a derivative pass: none, all, ``"inner"`` ones, or some
    (:class:`Deeper`, :class:`Passing`).
    """
    return set(dependence(eqns, dict.fromkeys(wrt, 1), through_stops=through_stops))


def dependence(eqns: Iterable[Eqn], marks: Mapping[Var, int], *, through_stops: Through = False,
               ) -> dict[Var, int]:  # fmt: skip
    """For each value that depends on marked ones differentiably, the union of their marks (bits).

    One sweep for many questions; see :func:`active_vars`.
    """
    found = dict(marks)
    for e in eqns:
        bits = 0
        for v in e.inputs:
            if v in found:
                bits |= found[v]
        if not bits or e.impure or (isinstance(e.op, Stop) and not passes(e, through_stops)):
            continue
        if isinstance(e.op, Loop):
            found.update(_loop_results(e, found, through_stops))
        elif isinstance(e.op, OpOverload) and len(e.outs) > 1:
            found.update((v, bits) for v, d in zip(e.outs, differentiable_outs(e), strict=True) if d)
        else:
            found.update((v, bits) for v in e.outs if v.type.is_float)
    return found


def _loop_results(e: Eqn, found: dict[Var, int], through: Through) -> dict[Var, int]:
    op = e.op
    assert isinstance(op, Loop)
    carries, inside = _loop_dependence(e, found, through)
    out = {e.outs[i]: bits for i, bits in carries.items()}
    for o, v in zip(e.outs[op.n_carry :], op.body.outputs[op.n_carry :], strict=True):
        if v in inside:
            out[o] = inside[v]
    return out


def _loop_dependence(e: Eqn, found: Mapping[Var, int], through: Through) -> tuple[dict[int, int], dict[Var, int]]:
    """Marks of a loop's carries (fixpoint over trips) and of the values of its body."""
    op = e.op
    assert isinstance(op, Loop)
    if isinstance(through, Passing):
        through = through.inside
    ins = op.body.inputs
    carries = {i: found[e.args[i]] for i in range(op.n_carry) if e.args[i] in found}
    others = {
        x: found[v] for x, v in zip(ins[op.n_carry :], e.args[op.n_carry :], strict=True) if v in found
    }  # fmt: skip
    while True:
        marks = {**others, **{ins[i]: bits for i, bits in carries.items()}}
        inside = dependence(op.body.eqns, marks, through_stops=through)
        more = dict(carries)
        for i, v in enumerate(op.body.outputs[: op.n_carry]):
            if v in inside:
                more[i] = more.get(i, 0) | inside[v]
        if more == carries:
            return carries, inside
        carries = more


def loop_activity(e: Eqn, active: set[Var], through: Through) -> tuple[list[int], set[Var]]:
    """Carries of a loop that depend on active inputs (fixpoint over trips), and the active values of its body."""
    carries, inside = _loop_dependence(e, {v: 1 for v in e.args if v in active}, through)
    return sorted(carries), set(inside)


def passes(e: Eqn, through: Through) -> bool:
    """Whether a derivative passes a stop."""
    if e.op.always:  # type: ignore[union-attr]
        return False
    if isinstance(through, bool):
        return through
    if isinstance(through, Passing):
        return e in through.here
    assert isinstance(e.op, Stop)
    if isinstance(through, Deeper):
        return through.hard if e.op.level is None else e.op.level > through.depth
    return e.op.inner and not (through == "torch" and e.origin is Origin.STATE)


def outermost(stop: str) -> Inside:
    """Which stops the hypergradient passes under a meaning of ``stop_gradient``."""
    return True if stop == "inner" else "torch" if stop == "torch" else "inner"


def pullback(b: Builder, eqns: Sequence[Eqn], seeds: dict[Var, Var], wrt: Sequence[Var],
             *, cut: frozenset[Eqn] | None = None, inside: Inside = False) -> dict[Var, Var]:  # fmt: skip
    """Vector-Jacobian product over ``eqns`` (equations of ``b``, in order).

    Args:
        b: Where derivative equations are emitted.
        eqns: The equations to differentiate.
        seeds: Cotangents of results.
        wrt: Values whose cotangents are wanted.
        cut: The stops that hold (None: all of them).
        inside: Which stops pass inside loops (see :class:`Passing`).

    Returns:
        Cotangents found; a value without one has derivative zero.
    """
    here = frozenset(e for e in eqns if cut is not None and isinstance(e.op, Stop) and e not in cut)
    through = False if cut is None else Passing(here, inside)
    active = active_vars(eqns, wrt, through_stops=through)
    cts = {v: c for v, c in seeds.items() if v in active}
    for e in reversed(eqns):
        if any(v in cts for v in e.outs):
            pull_eqn(b, e, cts, active, passing=e in here)
    return cts


# Reverse rules of primitives with regions in them, which differentiate those in turn: filled where these rules are
# (:mod:`mlc.passes.autodiff.loops`).
PULL: dict[type[Any], Callable[[Builder, Eqn, dict[Var, Var], set[Var]], None]] = {}


def pull_eqn(b: Builder, e: Eqn, cts: dict[Var, Var], active: set[Var], *, passing: bool = False) -> None:
    """Reverse rule of one equation, any operator; adds to ``cts``."""
    op = e.op
    if isinstance(op, (Alias, Tell)) or (isinstance(op, Stop) and passing):
        add_cotangent(b, cts, e.args[0], cts[e.outs[0]], active)
    elif isinstance(op, (Stop,)) or e.impure:
        return
    elif isinstance(op, SafeSqrt):
        add_cotangent(b, cts, e.args[0], _safe_sqrt(b, e, cts[e.outs[0]]), active)
    elif type(op) in PULL:
        PULL[type(op)](b, e, cts, active)
    elif isinstance(op, Pack):
        ct = cts[e.outs[0]]
        assert isinstance(ct.type, SeqType)
        for i, v in enumerate(e.args):
            if v in active:
                add_cotangent(b, cts, v, b.emit(Index(i), (ct,), (ct.type.elem,))[0], active)
    elif isinstance(op, Index):
        _pull_index(b, e, cts, active)
    elif isinstance(op, Custom):
        _pull_custom(b, e, cts, active)
    elif isinstance(op, Call):
        _pull_call(b, e, cts, active)
    else:
        _pull_aten(b, e, cts, active)


def add_cotangent(b: Builder, cts: dict[Var, Var], v: Var, ct: Var, active: set[Var]) -> None:
    """Add a cotangent to that of a value, if it may have one."""
    if v in active:
        cts[v] = sum_of(b, v, cts.get(v), ct)


def _safe_sqrt(b: Builder, e: Eqn, ct: Var) -> Var:
    """0.5 * ct / y where y > 0, else 0."""
    y = e.outs[0]
    t = y.type
    assert isinstance(t, TensorType)
    mask_type = TensorType(torch.bool, t.shape, t.stride, t.device)
    (zero,) = b.emit(aten("eq", "Scalar"), (y, 0), (mask_type,))
    (half,) = b.emit(aten("mul", "Scalar"), (ct, 0.5), (ct.type,))
    (quotient,) = b.emit(aten("div", "Tensor"), (half, y), (t,))
    (out,) = b.emit(aten("masked_fill", "Scalar"), (quotient, zero, 0), (t,))
    return out


def _pull_index(b: Builder, e: Eqn, cts: dict[Var, Var], active: set[Var]) -> None:
    """Cotangent of a sequence of which one element is used: zeros elsewhere."""
    seq = e.args[0]
    if seq not in active:
        return
    assert isinstance(seq.type, SeqType) and isinstance(e.op, Index)
    n = seq.type.length
    if n is None:
        raise DifferentiationError("an element of a sequence of unknown length is differentiated", loc=e.loc)
    ct = cts[e.outs[0]]
    zero = b.zero(seq.type.elem)
    at = e.op.at % n
    packed = b.emit(Pack(), tuple(ct if i == at else zero for i in range(n)), (seq.type,))[0]
    cts[seq] = b.add(cts.get(seq), packed)


def _pull_custom(b: Builder, e: Eqn, cts: dict[Var, Var], active: set[Var]) -> None:
    op = e.op
    assert isinstance(op, Custom)
    given = [cts[v] if v in cts else b.zero(v.type) for v in e.outs]
    ins = [*e.args[: op.n_in], *e.outs, *e.args[op.n_in + op.n_out :], *given]
    grads = iter(b.inline(op.backward, ins, loc=e.loc))
    for v, has in zip(e.args[: op.n_in], op.present, strict=True):
        if has:
            g = next(grads)
            if type(v) is Var:
                add_cotangent(b, cts, v, g, active)


def _pull_call(b: Builder, e: Eqn, cts: dict[Var, Var], active: set[Var]) -> None:
    op = e.op
    assert isinstance(op, Call)
    wanted = tuple([v in active and v.type.is_float for v in e.args])
    given = tuple([v in cts for v in e.outs])
    targets = [v for v, w in zip(e.args, wanted, strict=True) if w]
    derived = Call(f"pull {op.title}", op.callee.pulled(wanted, given), op.seconds)
    args = (*e.args, *e.outs, *[cts[v] for v in e.outs if v in cts])
    types = [contiguous_type(v.type) for v in targets]
    for v, ct in zip(targets, b.emit(derived, args, types, loc=e.loc, tag=Origin.BACKWARD), strict=True):
        add_cotangent(b, cts, v, ct, active)


def _pull_aten(b: Builder, e: Eqn, cts: dict[Var, Var], active: set[Var]) -> None:
    ins = e.inputs
    grads_in = [cts[v] for v in e.outs if v in cts]
    try:
        rule = reverse_rule(
            e, tuple([v in active for v in ins]), tuple([cts[v].type if v in cts else None for v in e.outs])
        )
    except NoRule as err:
        raise DifferentiationError(
            f"no derivative: {err}", loc=e.loc, advice="detach the input of this operator, or compute it differently"
        ) from err
    outs = iter(b.inline(rule.region, [*ins, *e.outs, *grads_in], tag=Origin.BACKWARD, loc=e.loc))
    for v, has in zip([v for v in ins if v in active], rule.present, strict=True):
        if has:
            add_cotangent(b, cts, v, next(outs), active)
