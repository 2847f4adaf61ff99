"""Formulas of a plan and of its alternatives, and where another choice would win."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from mlc.ir.lowered.stages import Stages
from mlc.ir.program import Program
from mlc.passes.autodiff.jacobian import count
from mlc.passes.formulas.breakeven import BreakEven, break_evens, tangent_break
from mlc.passes.formulas.formulas import Formula, Symbols, formula_of, tangent_costs
from mlc.passes.formulas.peaks import Expr
from mlc.passes.planning.alternatives import Alternatives

__all__ = ["Formulas", "formulas_of"]


@dataclass(frozen=True)
class Formulas:
    """What a plan costs as formulas, and where another choice would win.

    Attributes:
        seconds: Predicted time of forward and backward, seconds: a sympy expression in the symbols.
        peak_bytes: Predicted peak beyond the inputs, bytes; None where no form holds within a percent.
        flops: Floating point operations of matrix products, convolutions and attention.
        symbols: What each symbol means (``{T: "trips of L1", B: "examples of a batch"}``).
        now: The value of each symbol that the plan was made for.
        least: The smallest value for which the formulas hold, by symbol. ``B`` is missing where the peak is known at
            the present size of the batch only.
    """

    seconds: Expr
    peak_bytes: Expr | None
    flops: Expr
    symbols: dict[Expr, str]
    now: dict[Expr, int]
    least: dict[Expr, int]
    _others: Callable[[], dict[str, Formula]] = field(repr=False, compare=False)
    _elements: Callable[[dict[str, Formula]], BreakEven | None] = field(repr=False, compare=False)
    _budget: int | None = None

    @cached_property
    def rivals(self) -> dict[str, Formula]:
        """Formulas of other plans of the program, by name."""
        return self._others()

    @cached_property
    def breaks(self) -> tuple[BreakEven, ...]:
        """Where one of them wins; ``K`` is the number of elements of the meta-parameters."""
        own, more = Formula(self.seconds, self.flops, self.peak_bytes, self.least), self._elements(self.rivals)
        found = break_evens(own, self.rivals, self.now, self._budget)
        return found if more is None else (*found, more)

    def as_dict(self) -> dict[str, Any]:
        """Expressions as text, for JSON."""
        return {
            "symbols": {s.name: {"meaning": m, "now": self.now[s], "least": self.least.get(s)}
                        for s, m in self.symbols.items()},
            **_texts(self), "rivals": {k: _texts(f) for k, f in self.rivals.items()},
            "break_evens": [{"symbol": b.symbol, "at": b.at, "above": b.above, "winner": b.winner, "why": b.why,
                             "text": str(b)} for b in self.breaks],
        }  # fmt: skip


def _texts(f: Formula | Formulas) -> dict[str, str | None]:
    peak = None if f.peak_bytes is None else str(f.peak_bytes)
    return {"seconds": str(f.seconds), "peak_bytes": peak, "flops": str(f.flops)}


def formulas_of(stages: Stages, program: Program | None, rivals: Alternatives | None, *, mode: str, compiled: bool,
                budget: int | None) -> Formulas:  # fmt: skip
    """Formulas of a plan's stages and of its rivals, and where these win.

    Args:
        stages: Of the plan.
        program: Names the symbols by its levels.
        rivals: Other candidates; None when they are not known any more.
        mode: The plan's.
        compiled: Whether the plan's elementwise work is compiled (then so is that of its rivals).
        budget: Bytes, or None.
    """
    symbols = Symbols(program)
    left = rivals.left if rivals is not None and compiled else None
    own = formula_of(stages, symbols, left)
    now = symbols.now()
    if symbols.examples is not None:
        now[symbols.batch] = symbols.examples
    named: dict[str, tuple[Stages, str]] = {}

    def others() -> dict[str, Formula]:
        symbols.batches = symbols.batch in own.least
        named.update({} if rivals is None else rivals.named(budget))
        return {x: formula_of(s, symbols, left) for x, (s, _) in named.items()}

    def elements(found: dict[str, Formula]) -> BreakEven | None:
        other = next((x for x, (_, m) in named.items() if m != mode and "forward" in (m, mode)), None)
        if program is None or other is None or any(x.depth > 1 for x in program.levels):
            return None  # with more levels not every tangent is one of a meta-parameter
        forward, still = (stages, found[other]) if mode == "forward" else (named[other][0], own)
        if still.peak_bytes is None:
            return None
        k, names = count(program), (f"{mode} mode", other)
        fixed = float(still.seconds.subs(now)), int(still.peak_bytes.subs(now))
        return tangent_break(tangent_costs(forward, symbols, left, k), k, fixed, names, budget)

    meanings = {s: symbols.meaning(s) for s in now}
    return Formulas(own.seconds, own.peak_bytes, own.flops, meanings, now, own.least, others, elements, budget)
