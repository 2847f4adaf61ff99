"""The adjoint of a level's state, step by step: whether it grows or vanishes exponentially over the unroll.

An unrolled training is a dynamical system, and the gradient through it a product of Jacobians: its size changes by
about the same factor at every step, the exponential of the Lyapunov exponent (Metz et al. 2021, "Gradients are not all
you need").  Above 1 over many steps, the gradient is dominated by its oldest steps and says little about finite
changes; far below 1, old steps leave nothing in it.  The factor is that of a straight line through the logarithms of
the norms (least squares).  A fast start followed by a plateau, which healthy training shows, is no exponential: a
verdict asks for the same trend in both halves.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, overload

from mlc.errors import AdjointWarning
from mlc.ir.types import Loc
from mlc.runtime.interpreter.meter import Swept

__all__ = ["Adjoints", "say"]

_FEWEST = 8  # steps: less is no trend
_GROWN, _GONE = 1e3, 1e-4  # of its size at the other end of a run
_STEADY = 3  # a half's slope may be so many times smaller than that of the whole

_ADVICE = {
    "grows": "fewer steps, a smaller step size of the level, mlc.Truncated(steps), or mlc.Evolution(sigma=...)",
    "vanishes": "fewer steps, or mlc.Truncated(steps), which costs less and comes to the same; mlc.Implicit where the"
    " level converges",
}


@dataclass(frozen=True)
class Adjoints(Sequence[float]):
    """Norms of the adjoint of what one level trains, after each of its steps, last step first.

    As a sequence: those of all runs, one after the other, the last run first.

    Attributes:
        level: Its name.
        kind: ``"adjoint"``: derivatives of the result, measured at ``backward()``; ``"inner"``: those of a loss of the
            loop, measured where the loop takes its gradient through the level; ``"tangent"``: derivatives by all
            elements of the meta-parameters together, in forward mode.
        runs: The same by run of the level (several where it is trained anew: in a loop above it, for each task).
    """

    level: str
    kind: str
    runs: tuple[tuple[float, ...], ...]

    @overload
    def __getitem__(self, i: int) -> float: ...
    @overload
    def __getitem__(self, i: slice) -> tuple[float, ...]: ...
    def __getitem__(self, i: int | slice) -> float | tuple[float, ...]:
        return self._all[i]

    def __len__(self) -> int:
        return len(self._all)

    @property
    def _all(self) -> tuple[float, ...]:
        return tuple(x for run in self.runs for x in run)

    @property
    def rate(self) -> float | None:
        """By which factor the norm changes at one step, the way that derivatives go; None where no two are there.

        One line through all runs: a common slope, each run with an intercept of its own.
        """
        lines = [_centred(_logs(self._way(run))) for run in self.runs]
        across = sum(t * t for line in lines for t, _ in line)
        return math.exp(sum(t * y for line in lines for t, y in line) / across) if across else None

    @property
    def trend(self) -> str | None:
        """``"grows"`` or ``"vanishes"`` where most runs do so exponentially; None: neither."""
        found = [_trend(self._way(run)) for run in self.runs]
        return next((t for t in ("grows", "vanishes") if 2 * found.count(t) > len(found)), None)

    def _way(self, run: Sequence[float]) -> Sequence[float]:
        """A run in the order in which derivatives go through it."""
        return run[::-1] if self.kind == "tangent" else run

    @staticmethod
    def by_level(swept: Sequence[Swept]) -> dict[str, Adjoints]:
        """The adjoints of a call, by level."""
        return {name: _of([s for s in swept if s.level == name]) for name in dict.fromkeys(s.level for s in swept)}

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return {"kind": self.kind, "norms": list(self._all), "rate": self.rate, "trend": self.trend}

    def __str__(self) -> str:
        what = "tangents" if self.kind == "tangent" else "adjoint"
        rate = "" if self.rate is None else f", {self.rate:.3g} a step"
        ends = f" {self[0]:.2e} (last step) ... {self[-1]:.2e} (first)" if len(self) else ""
        times = f" in {len(self.runs)} runs" if len(self.runs) > 1 else ""
        return f"{self.level}: {what}{ends}{rate}, {len(self)} steps{times}"


def _of(swept: Sequence[Swept]) -> Adjoints:
    """What one level's loops told; where the result's own adjoint went through it, that alone."""
    kinds = {s.kind for s in swept}
    kind = next(k for k in ("adjoint", "tangent", "inner") if k in kinds)
    runs: list[list[float]] = []
    for s in swept:
        if s.kind != kind:
            continue
        if not runs or s.begins:
            runs.append([])
        runs[-1] += s.norms.tolist()
    found = [tuple(run[::-1] if kind == "tangent" else run) for run in runs if run]
    return Adjoints(swept[0].level, kind, tuple(found if kind == "adjoint" else found[::-1]))


# ---- trends


def _logs(run: Sequence[float]) -> list[tuple[int, float]]:
    """Numbered logarithms; numbers that have none (0, what is not finite) are left out."""
    return [(k, math.log(x)) for k, x in enumerate(run) if x > 0 and math.isfinite(x)]


def _centred(points: Sequence[tuple[int, float]]) -> list[tuple[float, float]]:
    n = len(points) or 1
    t0, y0 = sum(t for t, _ in points) / n, sum(y for _, y in points) / n
    return [(t - t0, y - y0) for t, y in points]


def _slope(points: Sequence[tuple[int, float]]) -> float:
    line = _centred(points)
    across = sum(t * t for t, _ in line)
    return sum(t * y for t, y in line) / across if across else 0.0


def _trend(run: Sequence[float]) -> str | None:
    points = _logs(run)
    if len(points) < _FEWEST:
        return None
    slope, half = _slope(points), len(points) // 2
    parts = _slope(points[:half]), _slope(points[-half:])
    steady = all(p * slope > 0 and _STEADY * abs(p) >= abs(slope) for p in parts)
    total = slope * (points[-1][0] - points[0][0])
    if not steady or math.log(_GONE) < total < math.log(_GROWN):
        return None
    return "grows" if slope > 0 else "vanishes"


def say(adjoints: Adjoints, title: str, loc: Loc | None) -> None:
    """Warn of a trend.

    Args:
        adjoints: Of a level.
        title: How a reader knows the level.
        loc: The user's line.
    """
    trend, rate = adjoints.trend, adjoints.rate
    if trend is None or rate is None:
        return
    what = "its tangents change" if adjoints.kind == "tangent" else "its adjoint changes"
    steps = max(len(run) for run in adjoints.runs)
    means = {
        "grows": "the gradient is dominated by the oldest steps and may say little about finite changes (mlc.smoothness"
        " measures that)",
        "vanishes": "the first steps leave nothing in the gradient",
    }[trend]
    where = f"\n  at {loc}" if loc is not None else ""
    warnings.warn(
        AdjointWarning(
            f"level {title}: the gradient {trend} exponentially through its steps: {what} by a factor of {rate:.3g} a"
            f" step over {steps} steps: {means}. Try: {_ADVICE[trend]}{where}"
        ),
        stacklevel=2,
    )
