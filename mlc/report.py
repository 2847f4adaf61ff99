"""What a call measured."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from mlc.passes.plan import Plan
    from mlc.runtime.call import Run

__all__ = ["Report"]


@dataclass(frozen=True)
class Report:
    """Measured cost of the last call.

    Attributes:
        seconds: Wall time of all stages run so far, seconds.
        peak_bytes: Largest number of bytes allocated beyond the inputs at any time.
        stages: Seconds per stage.
    """

    seconds: float
    peak_bytes: int
    stages: dict[str, float] = field(default_factory=dict)

    @staticmethod
    def of(plan: Plan, run: Run) -> Report:
        """Report of a run so far."""
        return Report(sum(run.seconds.values()), run.peak_bytes, dict(run.seconds))
