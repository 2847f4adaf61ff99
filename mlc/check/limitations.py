"""What in a recording limits a referee: cuts, low precision, custom backwards, gradients through updates."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from mlc.ir.core import Custom, Eqn, Grad, Stop, Var
from mlc.ir.types import TensorType
from mlc.passes.autodiff.reverse import Deeper, active_vars
from mlc.trace.capture import Recording

__all__ = ["customs", "cutting", "precision", "through_updates"]


def cutting(rec: Recording, metas: Sequence[Var]) -> list[Eqn]:
    """Stops that a difference of the function would not see, between a meta-parameter and an output."""
    through = active_vars(rec.eqns, metas, through_stops=True)
    wanted = _wanted(rec)
    cuts = [e for e in rec.eqns if isinstance(e.op, Stop) and not e.op.inner]
    return [e for e in cuts if e.args[0] in through and e.outs[0] in wanted]


def through_updates(rec: Recording) -> bool:
    """Whether a gradient that the result needs is taken through another one.

    PyTorch drops such a path unless ``create_graph`` keeps it; one through a declared level it always drops.
    """
    producer = {v: e for e in rec.eqns for v in e.outs}
    wanted = _wanted(rec)
    for e in rec.eqns:
        if isinstance(e.op, Grad):
            n = e.op.n_loss
            targets = [v for v, o in zip(e.args[n : n + e.op.n_wrt], e.outs, strict=True) if o in wanted]
            active = active_vars(rec.eqns, targets, through_stops=Deeper(e.op.depth, False))
            if _meets_gradient(e.args[:n], active, set(targets), producer):
                return True
    return False


def _meets_gradient(losses: Sequence[Var], active: set[Var], fence: set[Var], producer: dict[Var, Eqn]) -> bool:
    todo, seen = list(losses), set(fence)
    while todo:
        v = todo.pop()
        if v in seen or v not in active:
            continue
        seen.add(v)
        below = producer.get(v)
        if below is not None and isinstance(below.op, Grad):
            return True
        todo.extend(below.inputs if below is not None else ())
    return False


def _wanted(rec: Recording) -> set[Var]:
    """Values that what the function returns is computed from."""
    wanted: set[Var] = set(rec.results[: rec.n_outputs])
    for e in reversed(rec.eqns):
        live = e.outs if not isinstance(e.op, Grad) else [o for o in e.outs if o in wanted]
        if any(v in wanted for v in live):
            wanted.update(e.inputs)
    return wanted


def customs(rec: Recording, metas: Sequence[Var]) -> list[str]:
    """Custom Functions on a path from a meta-parameter: their backward need not be a derivative."""
    active = _active(rec, metas)
    found = [e.op.title for e in rec.eqns if isinstance(e.op, Custom) and any(v in active for v in e.outs)]
    return list(dict.fromkeys(found))


def precision(rec: Recording, metas: Sequence[Var]) -> float:
    """Unit round-off of the least precise floating value on a path from a meta-parameter."""
    active = _active(rec, metas)
    types = [v.type for e in rec.eqns for v in e.outs if v in active]
    return max((torch.finfo(t.dtype).eps for t in types if isinstance(t, TensorType) and t.is_float), default=0.0)


def _active(rec: Recording, metas: Sequence[Var]) -> set[Var]:
    """Values that depend on a meta-parameter or on anything that the loop trains."""
    wrt = [*metas, *(e.var for e in rec.externals if e.written)]
    return active_vars(rec.eqns, wrt, through_stops="inner")
