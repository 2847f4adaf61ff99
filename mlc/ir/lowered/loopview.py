"""A loop equation by roles: what enters, what goes from trip to trip, what is read per trip, what is emitted."""

from __future__ import annotations

from mlc.ir.core import Eqn, Loop

__all__ = ["LoopView"]


class LoopView:
    """Arguments, body inputs and results of a loop by role."""

    def __init__(self, e: Eqn) -> None:
        op = e.op
        assert isinstance(op, Loop)
        self.op = op
        nc, nk = op.n_carry, op.n_const
        self.init, self.consts, self.seqs = e.args[:nc], e.args[nc : nc + nk], e.args[nc + nk :]
        ins = op.body.inputs
        self.in_carry, self.in_const, self.in_seq = ins[:nc], ins[nc : nc + nk], ins[nc + nk :]
        self.next, self.emit = op.body.outputs[:nc], op.body.outputs[nc:]
        self.final, self.emitted = e.outs[:nc], e.outs[nc:]
