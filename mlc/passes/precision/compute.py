"""Compute dtype: the equations of chosen losses with narrow operands, before anything is differentiated.

Of every gradient of a region that the policy names, the equations that lead to its losses are cast as
:mod:`mlc.passes.precision.ops` says: matrix products and convolutions in the narrow dtype, what follows them as far as
it may, everything else in float32.  What others read of these values (updates, states, results, losses) is cast back,
so that types outside do not change and parameters stay the float32 master values: their cast is an equation, and its
derivative gives a float32 gradient.  As the derivative rules run on the rewritten equations, gradient and product
are narrow where the loss is.  O(equations).
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch._ops import OpOverload

from mlc.ir.core import Alias, Eqn, Grad, Loop, Primitive, Random, Region, Stop, Var, aten, map_vars
from mlc.ir.inplace import schema_of
from mlc.ir.origin import Origin
from mlc.ir.types import TensorType
from mlc.passes.precision.ops import Role, role_of
from mlc.record.retype import shared

__all__ = ["TAG", "Casting", "cast", "losses_of", "slice_of"]

TAG = Origin.CAST
_CAST = aten("_to_copy")


@dataclass(frozen=True)
class Casting:
    """What to cast: equations that lead to ``losses`` and not to ``fence``, in ``dtype`` (None: as they are)."""

    losses: tuple[Var, ...]
    fence: frozenset[Var]
    dtype: torch.dtype | None


def losses_of(e: Eqn, dtype: torch.dtype | None) -> Casting:
    """The casting of a gradient's losses: what lies between the values it differentiates by and them."""
    op = e.op
    assert isinstance(op, Grad)
    return Casting(e.args[: op.n_loss], frozenset(e.args[op.n_loss : op.n_loss + op.n_wrt]), dtype)


def slice_of(made: dict[Var, Eqn], c: Casting) -> dict[Eqn, None]:
    """The equations of a loss: not those of updates, gradients, loops, draws and copies that start a level."""
    found: dict[Eqn, None] = {}
    todo = [v for v in c.losses if v not in c.fence]
    while todo:
        e = made.get(todo.pop())
        if e is None or e in found or not _castable(e):
            continue
        found[e] = None
        todo.extend(v for v in e.inputs if v not in c.fence)
    return found


def _castable(e: Eqn) -> bool:
    return e.origin is not Origin.UPDATE and (not isinstance(e.op, Primitive) or isinstance(e.op, Stop))


def cast(region: Region, castings: Sequence[Casting], twins: Iterable[tuple[Eqn, torch.dtype | None]] = (),
         ) -> tuple[Region, dict[Eqn, tuple[Var, ...]]]:  # fmt: skip
    """The region with the losses of ``castings`` in their dtypes; an equation of two that differ stays as it is.

    Args:
        region: With gradients in it.
        castings: What to cast.
        twins: Gradients that get their losses a second time, in another dtype.

    Returns:
        The region, and for each of ``twins`` the losses made for it.  Inputs, outputs and gradients are the same
        values as before.
    """
    made = {v: e for e in region.eqns for v in e.outs}
    assigned: dict[Eqn, torch.dtype | None] = {}
    for c in castings:
        for e in slice_of(made, c):
            assigned[e] = c.dtype if assigned.get(e, c.dtype) == c.dtype else None
    second = dict(twins)
    if not second and not any(assigned.values()):
        return region, {}
    caster = _Caster(region.inputs)
    losses: dict[Eqn, tuple[Var, ...]] = {}
    for e in region.eqns:
        if e in second:
            losses[e] = _again(caster, e, second[e], made)
        caster.equation(e, assigned.get(e))
    for v in region.outputs:
        caster.wide(v)
    return Region(region.inputs, tuple(caster.eqns), region.outputs, region.names), losses


def _again(caster: _Caster, e: Eqn, dtype: torch.dtype | None, made: dict[Var, Eqn]) -> tuple[Var, ...]:
    """The losses of a gradient once more, in another dtype, from values of their own."""
    c = losses_of(e, dtype)
    chosen = slice_of(made, c)
    order = [x for x in dict.fromkeys(made.values()) if x in chosen]
    env: dict[Var, Var] = {}
    inner = _Caster(())
    for x in order:
        for v in x.inputs:
            if v not in env:
                caster.wide(v)
        copy = x.with_(args=map_vars(x.args, lambda v: env.get(v, v)), outs=tuple(Var(v.type) for v in x.outs),
                       kwargs=tuple((k, map_vars(a, lambda v: env.get(v, v))) for k, a in x.kwargs))  # fmt: skip
        env.update(zip(x.outs, copy.outs, strict=True))
        inner.equation(copy, dtype)
    found = tuple(env.get(v, v) for v in c.losses)
    for v in found:
        inner.wide(v)
        caster.wide(v)
    caster.eqns.extend(inner.eqns)
    return found


class _Caster:
    """Equations as they are cast one after another.

    Attributes:
        eqns: The new equations.
    """

    def __init__(self, inputs: Iterable[Var]) -> None:
        self.eqns: list[Eqn] = []
        self._low: dict[tuple[Var, torch.dtype], Var] = {}
        self._narrow: dict[Var, torch.dtype] = {}  # values that are narrow themselves, and their dtype
        self._pending: dict[Var, Eqn] = {}  # values that exist only narrow so far, and what makes them wide
        self._light: set[Var] = set()  # values that no float enters: masks, draws, constants

    def equation(self, e: Eqn, dtype: torch.dtype | None) -> None:
        """Add an equation; ``dtype`` is that of its loss, None outside of one that is cast."""
        self._note_light(e)
        role = Role.WIDE if dtype is None else role_of(e.op)
        narrow = [v for v in e.inputs if self._narrow.get(v) == dtype]
        if role is Role.NARROW and self._lowered(e, dtype):
            return
        if role is Role.FOLLOWS and narrow and not self._widening(e, narrow) and self._lowered(e, dtype):
            return
        for v in e.inputs:
            self.wide(v)
        if role is Role.ISLAND and e.inputs and e.inputs[0] in narrow:
            self._island(e, dtype)
        else:
            self.eqns.append(e)

    def wide(self, v: Var) -> None:
        """Have ``v`` itself, in the type that it had."""
        e = self._pending.pop(v, None)
        if e is None:
            return
        for x in e.inputs:
            self.wide(x)
        for o in e.outs:
            self._pending.pop(o, None)
        self.eqns.append(e)

    def _note_light(self, e: Eqn) -> None:
        if isinstance(e.op, (Grad, Loop, Alias)):
            return
        if isinstance(e.op, Random) or all(v in self._light or not v.type.is_float for v in e.inputs):
            self._light.update(e.outs)

    def _widening(self, e: Eqn, narrow: Sequence[Var]) -> bool:
        """Whether an operand in float32 makes the result float32, too."""
        size = max((_numel(v) for v in e.outs), default=0)
        return any(
            _is_wide(v) and v not in narrow and v not in self._light and _numel(v) >= size
            for v in e.inputs
        )  # fmt: skip

    def _lowered(self, e: Eqn, dtype: torch.dtype | None) -> bool:
        """Add the equation with narrow operands; False where the types that follow would not do."""
        assert dtype is not None
        if not any(_is_wide(v) for v in e.inputs) or any(_other(v, dtype) for v in e.inputs):
            return False
        fresh = {v: Var(_with_dtype(v, dtype)) for v in e.inputs if _is_wide(v)}
        known = {v: self._low.get((v, dtype), new) for v, new in fresh.items()}
        args = map_vars(e.args, lambda v: known.get(v, v))
        kwargs = tuple((k, map_vars(a, lambda v: known.get(v, v))) for k, a in e.kwargs)
        types = _types(e, args, kwargs)
        view = isinstance(e.op, OpOverload) and schema_of(e.op).view
        if types is None or not all(_fits(t, v, dtype, view) for t, v in zip(types, e.outs, strict=True)):
            return False
        for v in known:
            self._down(v, dtype, known[v])
        outs = tuple(Var(t) if t.dtype == dtype else v for t, v in zip(types, e.outs, strict=True))
        self.eqns.append(e.with_(args=args, kwargs=kwargs, outs=outs))
        for v, low in zip(e.outs, outs, strict=True):
            if low is not v:
                self._low[v, dtype], self._narrow[v] = low, dtype
                self._pending[v] = e if view else _up(low, v, e)
        return True

    def _down(self, v: Var, dtype: torch.dtype, low: Var) -> None:
        """Have ``v`` narrow."""
        if (v, dtype) in self._low:
            return
        self.wide(v)
        self._low[v, dtype] = low
        self.eqns.append(Eqn(_CAST, (v,), (low,), (("dtype", dtype),), tag=TAG))

    def _island(self, e: Eqn, dtype: torch.dtype | None) -> None:
        assert dtype is not None
        v = e.outs[0]
        inside, low = Var(v.type), Var(_with_dtype(v, dtype))
        self.eqns.append(e.with_(outs=(inside, *e.outs[1:])))
        self.eqns.append(Eqn(_CAST, (inside,), (low,), (("dtype", dtype),), e.loc, TAG))
        self._low[v, dtype], self._narrow[v] = low, dtype
        self._pending[v] = _up(low, v, e)


def _up(low: Var, v: Var, e: Eqn) -> Eqn:
    assert isinstance(v.type, TensorType)
    return Eqn(_CAST, (low,), (v,), (("dtype", v.type.dtype),), e.loc, TAG)


def _is_wide(v: Var) -> bool:
    return isinstance(v.type, TensorType) and v.type.dtype == torch.float32


def _other(v: Var, dtype: torch.dtype) -> bool:
    """Whether a value is of a floating type that a policy does not touch."""
    return v.type.is_float and not _is_wide(v) and not (isinstance(v.type, TensorType) and v.type.dtype == dtype)


def _numel(v: Var) -> int:
    return v.type.numel if isinstance(v.type, TensorType) else 0


def _with_dtype(v: Var, dtype: torch.dtype) -> TensorType:
    """The type of ``v`` cast: holes and repetitions of its layout go."""
    (t,) = shared().types(_CAST, (v,), (("dtype", dtype),))
    assert isinstance(t, TensorType)
    return t


def _types(e: Eqn, args: tuple[object, ...], kwargs: tuple[tuple[str, object], ...]) -> list[TensorType] | None:
    """Types of an equation's results on these operands; None where PyTorch does not take them."""
    if isinstance(e.op, Stop):
        (v,) = args
        return [v.type] if isinstance(v, Var) and isinstance(v.type, TensorType) else None
    try:
        found = shared().types(e.op, args, kwargs)
    except (RuntimeError, ValueError, TypeError, IndexError):
        return None
    types = [t for t in found if isinstance(t, TensorType)]
    return types if len(types) == len(e.outs) else None


def _fits(t: TensorType, v: Var, dtype: torch.dtype, view: bool) -> bool:
    """Whether a result has the type that ``v`` had, or that type in ``dtype``, and can be cast back to it."""
    old = v.type
    if not isinstance(old, TensorType) or (t.shape, t.stride, t.device) != (old.shape, old.stride, old.device):
        return False
    if old.dtype != torch.float32:
        return t.dtype == old.dtype
    return t.dtype == dtype and (view or shared().types(_CAST, (Var(t),), (("dtype", torch.float32),)) == (old,))
