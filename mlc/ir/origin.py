"""Where an equation comes from: what passes decide by, beside what it computes."""

from __future__ import annotations

from enum import StrEnum
from functools import cache

__all__ = ["Origin"]


class Origin(StrEnum):
    """Why an equation is there; as text it is what :attr:`mlc.ir.core.Eqn.tag` holds and listings show.

    The first group is recorded, the second comes from differentiation, the third from passes after it.
    """

    NONE = ""
    FORWARD = "forward"  # what the user's function computes outside of optimizer steps
    UPDATE = "update"  # inside an optimizer step
    STATE = "state"  # a stop on state that a loop hands on, which PyTorch's gradients do not pass
    COPY = "copy"  # a stop on a value that the user copied or detached
    CLONE = "clone"  # an alias that stands for a copy of a module
    HOOK = "hook"  # a stop that stands where a hook of the user's is
    SOLVER = "solver"  # a stop on the start of a solver

    GRAD = "grad"  # an alias that marks what an inner gradient reads
    BACKWARD = "backward"  # a reverse rule
    ADJOINT = "adjoint"  # a loop that runs a loop's reverse rules, or a solve's
    TANGENT = "tangent"  # a forward rule, or a loop of them
    FUSED = "fused"  # forward rules of several equations in one
    SUM = "sum"  # of cotangents
    RESPONSE = "response"  # of an approximate response

    MICRO = "micro"  # for the parts of a batch
    CAST = "cast"  # to the dtype that a policy computes in
    STORE = "store"  # to the dtype that a policy stores in
    INNER = "inner"  # copied from a sweep into another one, in its order
    RECOMPUTED = "recomputed"  # computed again instead of kept; the number of its segment follows

    @classmethod
    def of(cls, tag: str) -> Origin:
        """Of a tag as an equation holds it: without the number of a segment."""
        return _of(tag)


@cache
def _of(tag: str) -> Origin:
    word = tag.partition(" ")[0]
    return next((o for o in Origin if o == word), Origin.NONE)
