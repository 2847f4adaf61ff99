"""What a check found about a precision policy."""

from __future__ import annotations

from dataclasses import dataclass

from mlc.compiled.precise import COSINE, NORM

__all__ = ["PolicyCheck"]


@dataclass(frozen=True)
class PolicyCheck:
    """A policy's hypergradient beside the exact one.

    Attributes:
        policy: As it was given.
        cosine: Between the two, all meta-parameters together.
        norm: Of the policy's over that of the exact one.
        error: Norm of the difference relative to that of the exact one.
        against: What the exact one was computed in, ``"float64"`` or ``"float32"``.
        errors: Relative error by meta-parameter.
    """

    policy: str
    cosine: float
    norm: float
    error: float
    against: str
    errors: dict[str, float]

    @property
    def ok(self) -> bool:
        """Whether it points where the exact one does: cosine at least 0.99, norm within 10%."""
        return self.cosine >= COSINE and abs(self.norm - 1) <= NORM

    def __str__(self) -> str:
        what = f"cosine {self.cosine:.6f}, norm {self.norm:.4f}, error {self.error:.1e}"
        return f"{what} under {self.policy} ({'ok' if self.ok else 'NOT ok'}), against {self.against}"
