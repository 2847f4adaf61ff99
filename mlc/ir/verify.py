"""The verifier: every value is defined once, before it is used, with the types that its operator says."""

from __future__ import annotations

from mlc.errors import VerifyError
from mlc.ir.core import Grad, Loop, Region, Var

__all__ = ["verify"]


def verify(r: Region, where: str = "program") -> Region:
    """Check the invariants of a region and of the loop bodies in it.

    Raises:
        VerifyError: naming the equation that breaks one.
    """
    defined: set[Var] = set()
    for v in r.inputs:
        if v in defined:
            raise VerifyError(f"{where}: an input is listed twice")
        defined.add(v)
    for i, e in enumerate(r.eqns):
        for v in e.inputs:
            if v not in defined:
                raise VerifyError(f"{where}: equation {i} ({e.op}) reads a value that is not defined yet", loc=e.loc)
        for v in e.outs:
            if v in defined:
                raise VerifyError(f"{where}: equation {i} ({e.op}) defines a value again", loc=e.loc)
            defined.add(v)
        if isinstance(e.op, Loop):
            _verify_loop(e.op, e.args, e.outs, f"{where}.{e.op.label or 'loop'}")
        elif isinstance(e.op, Grad):
            if len(e.args) != 2 * e.op.n_loss + e.op.n_wrt or len(e.outs) != e.op.n_wrt:
                raise VerifyError(f"{where}: equation {i} (grad) has the wrong number of arguments", loc=e.loc)
    for v in r.outputs:
        if v not in defined:
            raise VerifyError(f"{where}: an output is not defined")
    return r


def _verify_loop(op: Loop, args: tuple[Var, ...], outs: tuple[Var, ...], where: str) -> None:
    if len(args) != len(op.body.inputs):
        raise VerifyError(f"{where}: {len(args)} arguments for a body of {len(op.body.inputs)} inputs")
    if len(outs) != len(op.body.outputs):
        raise VerifyError(f"{where}: {len(outs)} results for a body of {len(op.body.outputs)} outputs")
    for i in range(op.n_carry):
        a, b = op.body.inputs[i].type, op.body.outputs[i].type
        if getattr(a, "shape", None) != getattr(b, "shape", None) or getattr(a, "dtype", None) != getattr(b, "dtype", None):
            raise VerifyError(f"{where}: carry {i} changes its type from {a} to {b}")
    verify(op.body, where)
