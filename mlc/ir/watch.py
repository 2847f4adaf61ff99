"""What is measured of a loop while it runs: a mark that changes no value and no comparison."""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["ROWS", "Watch"]

ROWS = 16  # trips for which a buffer of norms is made, where it is not known how many there will be


@dataclass(frozen=True)
class Watch:
    """What is measured while a loop runs, for the report: the norm of some of its carries together, at every trip.

    Attributes:
        level: The level whose state they belong to, as a reader knows it.
        kind: ``"state"`` (what the level trains: nothing is measured, derivatives of the loop are to be),
            ``"adjoint"`` (cotangents of it, on the way of the hypergradient), ``"inner"`` (on the way of a gradient
            that the program itself takes) or ``"tangent"``.
        carries: Positions of the carries; none where the loop only tells that a run begins.
        begins: Whether a new run of the level begins with the loop.
    """

    level: str
    kind: str
    carries: tuple[int, ...]
    begins: bool
