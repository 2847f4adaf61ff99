"""Lowering a joint graph under levers, as the planner does."""

from mlc.ir.lowered.contract import Context, Levers
from mlc.ir.lowered.stages import Joint, Stages
from mlc.passes.lowering.pipeline import lowered

__all__ = ["finish"]


def finish(joint: Joint | Stages, levers: Levers) -> Stages:
    """All passes after the adjoint."""
    return lowered(joint, Context(levers=levers))
