"""One decision of a plan, with its reason and what else there was."""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict

__all__ = ["Decision"]


class Decision(BaseModel):
    """One choice: for which level or flow, what, why, and the next best alternative."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    subject: str
    choice: str
    reason: str
    seconds: float | None = None
    bytes: int | None = None
    runner_up: str = ""
