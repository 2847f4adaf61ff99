"""Every error a user of mlc can meet, in one place.

All of them derive from :class:`MlcError`.  The message says what happened, where in the *user's* code
(``file:line``), and what to write instead.  Nothing of the user's is modified when one is raised.
"""

from __future__ import annotations

from typing import Any

__all__ = [
    "BudgetError",
    "CaptureError",
    "CommunicationError",
    "DifferentiationError",
    "LoweringWarning",
    "MemoryWarning",
    "MlcError",
    "MlcWarning",
    "NonfiniteError",
    "PlanError",
    "PrecisionWarning",
    "ResponseWarning",
    "RootWarning",
    "SignWarning",
    "SolverError",
    "SolverWarning",
    "TrainingError",
    "VerifyError",
]


class MlcError(Exception):
    """Base class of all errors that mlc raises on purpose.

    Attributes:
        what: What went wrong, one sentence.
        loc: Where in the user's code (:class:`mlc.ir.types.Loc`), or None when no line of theirs is to blame.
        advice: What to write instead.
    """

    def __init__(self, what: str, *, loc: Any = None, advice: str = "") -> None:
        self.what = what
        self.loc = loc
        self.advice = advice
        super().__init__(self._message())

    def _message(self) -> str:
        lines = [self.what]
        if self.loc is not None:
            lines.append(f"  at {self.loc}")
            source = self.loc.source()
            if source:
                lines.append(f"    {source}")
            if self.loc.caller is not None:
                lines.append(f"  called from {self.loc.caller}")
        if self.advice:
            lines.append(f"  try: {self.advice}")
        return "\n".join(lines)


class CaptureError(MlcError):
    """The loop could not be traced: something in it cannot be represented exactly."""


class CommunicationError(MlcError):
    """Processes do not do the same: their programs differ, one has failed, or one did not come in time."""


class DifferentiationError(MlcError):
    """The program was traced but a derivative that it needs does not exist or may not be asked for."""


class NonfiniteError(MlcError):
    """NaN or infinity in a level; the message names the level, the step and the operator where it began.

    Attributes:
        level: Name of the level; empty where no level is to blame (data, a hypergradient's cotangent).
        steps: Trips of the loops around it, outermost first, from 1.
        kind: ``"NaN"`` or ``"infinity"``.
        operator: Where it began; empty where it was there before.
    """

    def __init__(self, what: str, *, level: str = "", steps: tuple[int, ...] = (), kind: str = "", operator: str = "",
                 loc: Any = None, advice: str = "") -> None:  # fmt: skip
        super().__init__(what, loc=loc, advice=advice)
        self.level, self.steps, self.kind, self.operator = level, steps, kind, operator


class PlanError(MlcError):
    """A plan is malformed, from a newer version, or does not belong to the program it is used with."""


class BudgetError(PlanError):
    """No exact plan fits the memory given; the message states the smallest possible peak.

    Attributes:
        least: That peak, bytes: a budget that can be met.
    """

    def __init__(self, what: str, *, least: int, loc: Any = None, advice: str = "") -> None:
        super().__init__(what, loc=loc, advice=advice)
        self.least = least


class TrainingError(MlcError):
    """Levels of a :class:`mlc.Training` do not fit together; the message names them."""


class VerifyError(MlcError):
    """An internal invariant of the IR does not hold (a bug in a pass, or an edited program text)."""


class SolverError(MlcError):
    """A linear system cannot be solved: NaN or infinity in it, or a setting out of range."""


class MlcWarning(UserWarning):
    """Base class of all warnings that mlc gives on purpose; results are right unless the warning says otherwise."""


class SolverWarning(MlcWarning):
    """A linear system was not solved to its tolerance, or is not what the solver assumes: the gradient is inexact."""


class ResponseWarning(MlcWarning):
    """An approximate response is used where what it rests on does not hold: the gradient may be far off."""


class RootWarning(MlcWarning):
    """An answer is plainly no root of its condition: an implicit gradient taken there is wrong."""


class SignWarning(MlcWarning):
    """An update steps by the sign of its gradient: the derivative of that is zero almost everywhere, and taken so."""


class LoweringWarning(MlcWarning):
    """A part of the program runs slower than asked for: its compiled form failed, or failed its verification."""


class PrecisionWarning(MlcWarning):
    """A precision policy costs more than rounding, or an update rounds: the hypergradient may point elsewhere."""


class MemoryWarning(MlcWarning):
    """A call was planned again: the device refused memory, or a loop is longer than one that fits the budget."""
