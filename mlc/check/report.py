"""What :func:`mlc.check` found: errors per meta-parameter, differences per direction, and the verdict."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from mlc.check.policyreport import PolicyCheck

__all__ = ["CheckReport", "Difference", "MetaError", "Tolerances", "best_pair", "relative", "worst"]


@dataclass(frozen=True)
class Tolerances:
    """How far apart two results may be.

    Attributes:
        exact: Between the compiled function and the plain unroll or the eager function: the same arithmetic
            in another order.  In float64 that is about 1e-15 per operation, and a loop amplifies it; 1e-7 is
            far above that and far below any wrong derivative.
        differences: Against finite differences.  Truncation is of order h^2, round-off of order eps / h, so a
            good step gives about 1e-10 of the value, and a gradient may be 1e-6 of it.  Where the best two
            steps are themselves further apart (kinks of ReLU or max), five times that is allowed.
        steps: Step sizes, as fractions of a typical entry.
    """

    exact: float
    differences: float
    steps: tuple[float, ...]

    @staticmethod
    def of(eps: float) -> Tolerances:
        """Tolerances for programs whose least precise type has unit round-off ``eps``."""
        if eps <= 1e-15:
            return Tolerances(1e-7, 1e-4, (1e-3, 2.5e-4, 6.3e-5, 1.6e-5, 4e-6))
        return Tolerances(min(0.1, 1000 * eps), min(0.5, 1e5 * eps), (1e-1, 3e-2, 1e-2, 3e-3, 1e-3))


@dataclass(frozen=True)
class MetaError:
    """One meta-parameter against the plain unroll: norm of its gradient, relative error (None: no unroll).

    ``overruled``: differences confirm the compiled gradient, and not the unroll's.
    """

    name: str
    norm: float
    error: float | None
    overruled: bool = False

    def ok(self, allowed: float) -> bool:
        """Whether the unroll confirms it, as far as the unroll counts."""
        return self.error is None or self.overruled or self.error <= allowed


@dataclass(frozen=True)
class Difference:
    """One direction: derivative from the compiled gradient, and from differences.

    ``error`` and ``spread`` (how far the best two neighbouring step sizes are apart) are relative to the
    gradient, whose size is ``scale``; with ``informs`` a disagreement is no failure (a custom backward need not be a
    derivative); ``what`` is compared, the compiled gradient or the recording's own slope.
    """

    name: str
    predicted: float
    measured: float
    error: float
    spread: float
    tolerance: float
    informs: bool = False
    scale: float = 1.0
    what: str = "compiled"

    @property
    def conclusive(self) -> bool:
        """Whether the differences agree with each other well enough to say anything (kinks spoil them)."""
        return self.spread <= 100 * self.tolerance

    @property
    def ok(self) -> bool:
        """Agreement, as far as the differences themselves are determined."""
        return self.informs or not self.conclusive or self.error <= max(self.tolerance, 5 * self.spread)


@dataclass(frozen=True)
class CheckReport:
    """Verdict of :func:`mlc.check`.

    Attributes:
        function: Name of the checked function.
        metas: One entry per meta-parameter.
        differences: One entry per direction; per meta-parameter as well when a direction disagrees.
        value_err: Relative error of the returned values, against the eager function and the plain unroll.
        state_err: Relative error of what the call leaves behind (parameters, buffers, optimizer state).
        unrolled: Whether a plain unroll could be made.
        referee: What the differences were taken of.
        tolerances: What was allowed.
        notes: What a reader should know.
        wrong: Meta-parameters whose gradient is not finite where the function itself gives numbers.
        against: What values and final state were compared with.
        precision: What a precision policy costs, where one was asked about.
        responses: What was asked of which level besides the exact unroll: the gradient is then an approximation, whose
            distance from the exact one is stated, and no failure.
        cosine: Of the angle between it and the exact gradient (of all meta-parameters together); None: no unroll.
        distance: Norm of their difference over that of the exact gradient.
    """

    function: str
    metas: tuple[MetaError, ...]
    differences: tuple[Difference, ...]
    value_err: float
    state_err: float
    unrolled: bool
    referee: str
    tolerances: Tolerances
    notes: tuple[str, ...] = ()
    wrong: tuple[str, ...] = ()
    against: str = "the eager function"
    precision: PolicyCheck | None = None
    responses: tuple[str, ...] = ()
    cosine: float | None = None
    distance: float | None = None

    @property
    def rel_err(self) -> float:
        """Largest relative error of a gradient, against the unroll (against differences where that does not count)."""
        if self.wrong:
            return float("nan")
        counting = [m.error for m in self.metas if m.error is not None and not m.overruled]
        if counting and len(counting) == len(self.metas):
            return worst(counting)
        return worst([*counting, *(d.error for d in self.differences if d.what == "compiled")])

    @property
    def differences_err(self) -> float:
        """Largest error against finite differences, among the directions that say anything."""
        return worst([d.error for d in self.differences if d.conclusive and d.what == "compiled"])

    @property
    def ok(self) -> bool:
        """Whether every comparison agrees, and at least one referee could be asked."""
        exact = self.tolerances.exact
        policy = self.precision is None or self.precision.ok
        if self.responses:
            return policy and not self.wrong and self.value_err <= exact and self.state_err <= exact
        confirmed = self.unrolled and not any(m.overruled for m in self.metas)
        asked = confirmed or any(d.conclusive for d in self.differences if d.what == "compiled")
        return (
            asked
            and not self.wrong
            and all(m.ok(exact) for m in self.metas)
            and self.value_err <= exact
            and self.state_err <= exact
            and all(d.ok for d in self.differences)
            and policy
        )

    @property
    def disagreeing(self) -> tuple[str, ...]:
        """Names of the meta-parameters whose gradient a referee does not confirm."""
        if self.responses:
            return self.wrong
        bad = [*self.wrong, *(m.name for m in self.metas if not m.ok(self.tolerances.exact))]
        names = {m.name for m in self.metas}
        bad += [d.name for d in self.differences if not d.ok and d.name in names]
        if not bad and len(self.metas) == 1 and not all(d.ok for d in self.differences):
            bad = [self.metas[0].name]
        return tuple(dict.fromkeys(bad))

    def as_dict(self) -> dict[str, Any]:
        """JSON-ready form."""
        plain = ("function", "ok", "rel_err", "value_err", "state_err", "differences_err", "referee")
        return {
            **{name: getattr(self, name) for name in plain},
            "responses": list(self.responses),
            "cosine": self.cosine,
            "distance": self.distance,
            "disagreeing": list(self.disagreeing),
            "meta_parameters": [asdict(m) for m in self.metas],
            "differences": [{**asdict(d), "ok": d.ok, "conclusive": d.conclusive} for d in self.differences],
            "notes": list(self.notes),
            "precision": None if self.precision is None else {**asdict(self.precision), "ok": self.precision.ok},
        }

    def __str__(self) -> str:
        t = self.tolerances
        lines = [f"mlc.check of {self.function}: {'ok' if self.ok else 'NOT ok'}"]
        lines.append(f"  values         {_err(self.value_err, t.exact)} against {self.against}")
        if self.against == "the eager function":
            lines.append(f"  final state    {_err(self.state_err, t.exact)} against {self.against}")
        if self.responses:
            return "\n".join([*lines, *self._approximate()])
        shown = [d for d in self.differences if d.conclusive and d.what == "compiled"]
        largest = worst([d.error for d in shown])
        allowed = max([t.differences, *(5 * d.spread for d in shown if d.error > d.tolerance)])
        what = _err(largest, allowed) if shown else "not conclusive"
        lines.append(f"  gradient       {what} against finite differences of {self.referee}")
        if self.unrolled:
            error = worst([m.error for m in self.metas if m.error is not None])
            overruled = any(m.overruled for m in self.metas) and all(m.ok(t.exact) for m in self.metas)
            said = f"{_err(error, t.exact)} against the plain unroll"
            lines.append(f"  gradient       {said}{', which the differences overrule' if overruled else ''}")
        if self.precision is not None:
            lines.append(f"  precision      {self.precision}")
        lines += ["", f"  {'meta-parameter':40s}{'|gradient|':>12s}{'error':>12s}"]
        order = sorted(self.metas, key=lambda m: -m.error if m.error is not None and m.error >= 0 else -1e300)
        for m in order[:20]:
            shown_error = "-" if m.error is None else f"{m.error:.1e}"
            flag = "   <- disagrees" if m.name in self.disagreeing else ""
            lines.append(f"  {m.name:40s}{m.norm:12.3e}{shown_error:>12s}{flag}")
        if len(order) > 20:
            lines.append(f"  and {len(order) - 20} more with smaller errors")
        lines += [
            f"  along {d.name}: {d.what} {d.predicted:.8g}, differences {d.measured:.8g}, error {d.error:.1e}"
            for d in self.differences
            if not d.ok
        ]
        lines += [f"  note: {n}" for n in self.notes]
        return "\n".join(lines)

    def _approximate(self) -> list[str]:
        """Lines about an approximate gradient."""
        lines = [f"  gradient       approximate: {r}" for r in self.responses]
        if self.distance is not None and self.cosine is not None:
            lines.append(f"  distance       {self.distance:.2e} of the exact gradient, cosine {self.cosine:.6f}")
        else:
            lines.append("  distance       unknown: there is no plain unroll to compare with")
        if self.precision is not None:
            lines.append(f"  precision      {self.precision}")
        for m in self.metas[:20]:
            lines.append(f"  {m.name:40s}{m.norm:12.3e}" + ("" if m.error is None else f"{m.error:12.1e}"))
        return [*lines, *[f"  note: {n}" for n in self.notes]]


def _err(error: float, allowed: float) -> str:
    return f"error {error:.1e} ({'allowed' if error <= allowed else 'MORE THAN'} {allowed:.0e})"


def worst(errors: Sequence[float]) -> float:
    """The largest, 0 of none; NaN wins."""
    return math.nan if any(map(math.isnan, errors)) else max(errors, default=0.0)


def relative(a: Tensor, b: Tensor, floor: float = 0.0) -> float:
    """Norm of the difference relative to the norm of ``b``; infinite when the shapes differ."""
    if a.shape != b.shape:
        return float("inf")
    if torch.equal(a, b):
        return 0.0
    wide = torch.complex128 if a.is_complex() or b.is_complex() else torch.float64
    a, b = a.detach().to(wide), b.detach().to(wide)
    same = (a == b) | (a.isnan() & b.isnan())  # infinities and NaNs of the user's own
    a, b = torch.where(same, 0, a), torch.where(same & ~b.isfinite(), 0, b)
    return float((a - torch.where(same, 0, b)).norm() / max(float(b.norm()), floor, 1e-300))


def best_pair(slopes: Sequence[float]) -> tuple[float, float]:
    """Of neighbouring step sizes the two that agree best: mean of their slopes, distance between them.

    Slopes that are not finite (a step left the domain) do not count; NaN and infinity when no pair is left.
    """
    pairs = [(a, b) for a, b in pairwise(slopes) if math.isfinite(a) and math.isfinite(b)]
    if not pairs:
        return math.nan, math.inf
    a, b = min(pairs, key=lambda p: abs(p[0] - p[1]))
    return (a + b) / 2, abs(a - b)
