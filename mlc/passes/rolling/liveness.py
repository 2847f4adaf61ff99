"""Which recorded equations matter.

Dead code goes first (logging, metrics, gradients nobody reads), but evenly: when an equation is needed in one
iteration of a loop, its counterparts in the others stay, so that iterations remain comparable.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from torch._ops import OpOverload

from mlc.ir.core import Custom, Eqn, Grad, Var

__all__ = ["live_equations"]


def live_equations(eqns: Sequence[Eqn], results: Sequence[Var], paths: dict[int, Any]) -> list[Eqn]:
    """Equations needed for ``results``, impure ones, and their counterparts in other iterations."""
    keys = _keys(eqns, paths)
    live: set[Var] = set(results)
    _sweep(eqns, live, None, keys)
    used = {
        (keys[i], o) for i, e in enumerate(eqns) if keys[i] is not None for o, v in enumerate(e.outs) if v in live
    }  # fmt: skip
    kept = _sweep(eqns, live, used, keys)
    return [_prune(e, live) for e, k in zip(eqns, kept, strict=True) if k]


def _keys(eqns: Sequence[Eqn], paths: dict[int, Any]) -> list[Any]:
    """Position of an equation inside its iteration, comparable between iterations; None outside loops."""
    counts: dict[Any, int] = defaultdict(int)
    out: list[Any] = []
    for e in eqns:
        path = paths[id(e)]
        if not path or e.site is None:
            out.append(None)
            continue
        op: Any = "grad" if isinstance(e.op, Grad) else e.op.title if isinstance(e.op, Custom) else e.op
        if isinstance(op, OpOverload):
            op = id(op)  # its own hash is slow
        here = (path, e.site.key, op)
        counts[here] += 1
        loops = tuple(i for i, _ in path[:1])
        out.append((loops, *here[1:], counts[here]))
    return out


def _sweep(eqns: Sequence[Eqn], live: set[Var], used: set[Any] | None, keys: list[Any]) -> list[bool]:
    kept = [False] * len(eqns)
    for i in range(len(eqns) - 1, -1, -1):
        e = eqns[i]
        if used is not None and keys[i] is not None:
            live.update(v for o, v in enumerate(e.outs) if (keys[i], o) in used)
        if e.impure or any(v in live for v in e.outs):
            kept[i] = True
            if isinstance(e.op, Grad):
                live.update(_prune(e, live).inputs)
            else:
                live.update(e.inputs)
    return kept


def _prune(e: Eqn, live: set[Var]) -> Eqn:
    """A gradient with respect to the values whose gradient is used."""
    op = e.op
    if not isinstance(op, Grad) or all(v in live for v in e.outs):
        return e
    n, wrt = op.n_loss, e.args[op.n_loss : op.n_loss + op.n_wrt]
    chosen = [(w, o) for w, o in zip(wrt, e.outs, strict=True) if o in live]
    args = (*e.args[:n], *[w for w, _ in chosen], *e.args[n + op.n_wrt :])
    return e.with_(op=replace(op, n_wrt=len(chosen)), args=args, outs=tuple(o for _, o in chosen))
